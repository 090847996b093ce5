"""TensorBoard scalars of a run: the loss terms of every training phase, the score of every trial."""

from __future__ import annotations

from pathlib import Path

from engine.training import PhaseLog
from search.ledger import Trial


class Scalars:
    """Writes event files under `folder`; view them with `tensorboard --logdir folder`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def phase(self, line: PhaseLog) -> None:
        """One line of mean losses."""
        for term, value in line.losses.items():
            self.writer.add_scalar(f"{line.phase}/{term}", value, line.step)

    def trial(self, trial: Trial) -> None:
        """Score and size of one finished trial."""
        if trial.score is not None:
            self.writer.add_scalar(f"{trial.stage}/score", trial.score, trial.number)
            self.writer.add_scalar(f"{trial.stage}/params", trial.params, trial.number)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self.writer.close()
