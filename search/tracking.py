"""TensorBoard scalars of a run: losses of every training phase, trials of every stage, finished models.

    PHASE/TERM                     loss terms over optimizer steps
    STAGE/score, best, failed      of trial after trial: the score, the best so far, failures so far
    STAGE/params, seconds, COST    size, wall time and costs (FLOPs, memory, latency) of each trial
    models/NAME/METRIC             of the found model, the baselines and the teacher on the reported split

A resumed run writes a further event file; what it repeats has the same values at the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.training.loop import PhaseLog
from search.ledger.ledger import Trial


class Scalars:
    """Writes event files under `folder`; view them with `tensorboard --logdir folder`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))
        self._best: dict[str, float] = {}
        self._failed: dict[str, int] = {}

    def phase(self, line: PhaseLog) -> None:
        """One line of mean losses."""
        for term, value in line.losses.items():
            self.writer.add_scalar(f"{line.phase}/{term}", value, line.step)

    def trial(self, trial: Trial) -> None:
        """One finished trial, whatever its state."""
        stage, number = trial.stage, trial.number
        self._failed[stage] = self._failed.get(stage, 0) + (trial.state == "failed")
        self.writer.add_scalar(f"{stage}/failed", self._failed[stage], number)
        self.writer.add_scalar(f"{stage}/params", trial.params, number)
        self.writer.add_scalar(f"{stage}/seconds", trial.seconds, number)
        for name, value in trial.attrs.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.writer.add_scalar(f"{stage}/{name}", value, number)
        if trial.score is not None:
            self.writer.add_scalar(f"{stage}/score", trial.score, number)
        if trial.score is not None and trial.state == "complete":
            self._best[stage] = max(trial.score, self._best.get(stage, trial.score))
            self.writer.add_scalar(f"{stage}/best", self._best[stage], number)

    def model(self, name: str, metrics: Mapping[str, float]) -> None:
        """Metrics of a finished model on the reported split."""
        for metric, value in metrics.items():
            self.writer.add_scalar(f"models/{name}/{metric}", value, 0)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self.writer.close()
