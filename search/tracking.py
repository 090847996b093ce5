"""Scalars of a run: losses of every training phase, trials of every stage, finished models.

    PHASE/TERM                     loss terms over optimizer steps; of the teacher also its evaluations
    last round/students, GROUP     students still trained, and the least divergence of each group
    STAGE/score, best, failed      of trial after trial: the score, the best so far, failures so far
    STAGE/params, seconds, COST    size, wall time and costs (FLOPs, memory, latency) of each trial
    models/NAME/METRIC             of the found model, the baselines and the teacher on the reported split

They go to the trackers the configuration names (`search.console.trackers`). A resumed run goes on; what it repeats has
the same values at the same steps. A tracker that fails on the way, such as for want of a network, is left out from then
on with one line: numbers are for the reader, and results need none of them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.training.loop import PhaseLog
from search.config.options import flat, saved_values
from search.config.schema import SearchConfig
from search.console.trackers import Tracker, names_of, open_trackers
from search.ledger.ledger import Trial


def open_scalars(config: SearchConfig, folder: Path, note: Callable[[str], None]) -> Scalars | None:
    """The scalars of the run in `folder`, its configuration written; None where no tracker is wanted.

    Raises:
        UserError: a tracker is unknown, not installed, or refuses.
    """
    names = names_of(config.tracker)
    if not names:
        return None
    scalars = Scalars(open_trackers(names, folder), note)
    scalars.params(flat(saved_values(config)))
    return scalars


class Scalars:
    """Gives every number to every tracker; may be called from several threads.

    Args:
        trackers: by name.
        note: told when one of them fails.
    """

    def __init__(self, trackers: Mapping[str, Tracker], note: Callable[[str], None]) -> None:
        self.trackers, self.note = dict(trackers), note
        self._best: dict[str, float] = {}
        self._failed: dict[str, int] = {}
        self._lock = threading.Lock()

    def params(self, values: Mapping[str, Any]) -> None:
        """The configuration."""
        self._each(lambda tracker: tracker.params(values))

    def values(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Any scalars of a group; those that are not finite are left out."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if finite:
            self._each(lambda tracker: tracker.log(group, finite, step))

    def phase(self, line: PhaseLog) -> None:
        """One line of mean losses."""
        self.values(line.phase, line.losses, line.step)

    def trial(self, trial: Trial) -> None:
        """One finished trial, whatever its state."""
        stage = trial.stage
        with self._lock:
            self._failed[stage] = self._failed.get(stage, 0) + (trial.state == "failed")
            told: dict[str, float] = {"failed": self._failed[stage], "params": trial.params, "seconds": trial.seconds}
            for name, value in trial.attrs.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    told[name] = value
            if trial.score is not None:
                told["score"] = trial.score
            if trial.score is not None and trial.state == "complete":
                self._best[stage] = told["best"] = max(trial.score, self._best.get(stage, trial.score))
        self.values(stage, told, trial.number)

    def model(self, name: str, metrics: Mapping[str, float]) -> None:
        """Metrics of a finished model on the reported split."""
        named = {f"models/{name}/{metric}": float(v) for metric, v in metrics.items() if math.isfinite(v)}
        self._each(lambda tracker: tracker.final(named))

    def close(self) -> None:
        """Everything is written."""
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        with self._lock:
            for name, tracker in list(self.trackers.items()):
                try:
                    call(tracker)
                except Exception as error:  # whatever somebody else's client raises
                    del self.trackers[name]
                    reason = " ".join(str(error).split()) or type(error).__name__
                    self.note(f"tracker {name} is left out from here on: {reason:.300}")
