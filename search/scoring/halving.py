"""Successive halving of proxy training: at rungs in between, candidates that lag behind stop.

Rungs lie at total / reduction^k optimizer steps of the task phase, k = `rungs`..1. At each a candidate is scored, and
trains on only if it is among the best 1 / reduction of the stage's candidates that have reached this rung: those whose
scores the sampler had seen, and those of the same population. A stopped candidate has its score at the last rung.
Trials keep their scores at the rungs, so a resumed run decides as the undisturbed one would have (docs/decisions/0028).

Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning" (ASHA), MLSys 2020, in the form that stops.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from search.ledger.ledger import Trial

ATTRIBUTE = "rungs"
"""Name of a trial's attribute that holds its scores at rungs, {"steps": score}."""


class SuccessiveHalving:
    """Decides who trains on.

    Args:
        rungs: times to look before the end; 0 stops nobody.
        reduction: 1 of so many goes on, at least 2.
        total_steps: of a full training.
        finished: trials of the stage that ended before.
    """

    def __init__(self, rungs: int, reduction: int, total_steps: int, finished: Iterable[Trial] = ()) -> None:
        if rungs < 0 or reduction < 2:
            raise ValueError(f"rungs {rungs}, reduction {reduction}: must be >= 0 and >= 2")
        self.reduction = reduction
        steps = {total_steps // reduction**k for k in range(rungs, 0, -1)}
        self.steps = tuple(sorted(s for s in steps if 0 < s < total_steps))
        self._reached: dict[int, list[float]] = {s: [] for s in self.steps}
        for trial in finished:
            for step, score in trial.attrs.get(ATTRIBUTE, {}).items():
                self._reached.setdefault(int(step), []).append(float(score))

    def go_on(self, step: int, scores: Sequence[float]) -> list[bool]:
        """Which of the candidates that have just reached rung `step` with these scores train on."""
        reached = self._reached[step]
        reached.extend(scores)
        places = max(1, len(reached) // self.reduction)
        least = sorted(reached, reverse=True)[places - 1]
        return [score >= least for score in scores]


def attributes(rungs: dict[int, float]) -> dict[str, Any]:
    """Trial attributes that hold scores at rungs."""
    return {ATTRIBUTE: {str(step): score for step, score in rungs.items()}} if rungs else {}
