"""Is one model better than another? Differences on dev with the interval that resampling its rows gives.

Chosen: a paired percentile bootstrap. Both models answered the same rows, mostly alike; the interval of the difference
is then far narrower than those of the two scores make it look. Rejected: comparing the two scores' own intervals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.data import TaskSpec
from search.evidence.answers import Answers
from search.evidence.resample import resampled

CONFIDENCE = 0.95
_DIGITS = 12
"""Decimals beyond which differences are rounding."""


@dataclass(frozen=True)
class Score:
    """A model's primary metric on dev with its interval."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The found model's primary metric minus that of the model `name`, with its interval."""

    name: str
    value: float
    low: float
    high: float

    @property
    def words(self) -> str:
        """`better than`, `worse than` or `level with`: the last where the interval holds 0."""
        if self.low > 0:
            return "better than"
        return "worse than" if self.high < 0 else "level with"


class Comparison:
    """Scores and differences of models on the same rows; each model is resampled once.

    Args:
        labels: [N] gold labels; None of question answering.
        spec: the task.
        resamples: number of resamples; None: see `search.evidence.resample`.
        seed: of the resamples.
    """

    def __init__(
        self, labels: np.ndarray | None, spec: TaskSpec, *, resamples: int | None = None, seed: int = 0
    ) -> None:
        self.labels, self.spec, self.resamples, self.seed = labels, spec, resamples, seed
        self._values: dict[str, tuple[np.ndarray, float, np.ndarray]] = {}

    def score(self, answers: Answers) -> Score:
        """The metric of `answers` with its interval."""
        value, samples = self._measured(answers)
        return Score(answers.name, value, *interval(samples))

    def difference(self, found: Answers, other: Answers) -> Difference:
        """`found` minus `other`, paired."""
        (value, samples), (other_value, other_samples) = self._measured(found), self._measured(other)
        gaps = np.round(samples - other_samples, _DIGITS)
        return Difference(other.name, round(value - other_value, _DIGITS), *interval(gaps))

    def _measured(self, answers: Answers) -> tuple[float, np.ndarray]:
        rows = answers.rows
        known = self._values.get(answers.name)
        if known is not None and known[0] is rows:
            return known[1:]
        if rows is None:
            raise ValueError(f"{answers.name}: has no answers ({answers.note})")
        if len(rows) == 0 or (self.labels is not None and len(rows) != len(self.labels)):
            raise ValueError(
                f"{answers.name}: {len(rows)} answers to {0 if self.labels is None else len(self.labels)} rows"
            )
        value = self.spec.head.metric(self.spec, rows, self.labels)
        samples = resampled(self.spec, rows, self.labels, resamples=self.resamples, seed=self.seed)
        self._values[answers.name] = rows, value, samples
        return value, samples


def compare(
    found: Answers,
    other: Answers,
    labels: np.ndarray | None,
    spec: TaskSpec,
    *,
    resamples: int | None = None,
    seed: int = 0,
) -> Difference:
    """The difference of the primary metric, `found` minus `other`, with its 95 % interval.

    Args:
        found, other: answers to the same rows.
        labels: [N] gold labels; None of question answering.
        spec: the task.
        resamples: number of resamples; None: 1,000, fewer for very many rows.
        seed: of the resamples; equal seeds give equal intervals.

    Raises:
        ValueError: no rows, or not as many answers as labels.
        FloatingPointError: an answer is NaN or infinite.
    """
    return Comparison(labels, spec, resamples=resamples, seed=seed).difference(found, other)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Low and high end of the central `CONFIDENCE` of the samples."""
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
