"""Racing of a supernet's subnets: `engine.evaluation.racing` over the slices of `engine.evaluation.shared`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.architecture.architecture import Architecture
from engine.data import TaskSpec
from engine.errors import UserError
from engine.evaluation.racing import CONFIDENCE, Finish, race
from engine.evaluation.shared import SharedEvaluator

RACED_METRIC = "accuracy"
"""The metric that is a mean over examples; others are properties of a whole split."""


def race_subnets(
    evaluator: SharedEvaluator,
    candidates: Sequence[Architecture],
    spec: TaskSpec,
    *,
    confidence: float = CONFIDENCE,
    costs: Sequence[float] | None = None,
) -> list[Finish]:
    """Scores candidates, those that cannot reach the front on part of the data only.

    Args:
        evaluator: over data cut into several slices.
        candidates: subnets of its supernet.
        spec: the task; its metric must be accuracy.
        confidence, costs: as for `engine.evaluation.racing.race`.

    Raises:
        UserError: the task's metric is no mean over examples.
    """
    if spec.metric != RACED_METRIC:
        raise UserError(f"racing: the metric {spec.metric!r} is not a mean over examples: evaluate without racing")
    labels = [evaluator.labels(part) for part in evaluator.slices]

    def answer(alive: list[int], index: int) -> np.ndarray:
        logits = evaluator.logits([candidates[i] for i in alive], evaluator.slices[index])
        return logits.argmax(axis=-1) == labels[index]

    return race(answer, [len(part) for part in labels], len(candidates), confidence=confidence, costs=costs)
