"""A metric on bootstrap resamples of rows, all resamples at once.

A resample of N rows is a count per row (`engine.evaluation.weighted`). The counts depend on seed and N
alone: two models' values on resample i are of the same rows, which makes the comparison a paired one.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 16. Rejected: `compute_metrics`
in a loop; scikit-learn takes a millisecond and more for each of a thousand resamples of each model.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.data.task import TaskSpec

RESAMPLES = 1000
FEWEST = 200
MOST_DRAWS = 1 << 27
"""Rows drawn in all, beyond which there are fewer resamples, down to `FEWEST`."""
_BLOCK = 1 << 21


def default_resamples(rows: int) -> int:
    """How many resamples `rows` rows are given."""
    return max(FEWEST, min(RESAMPLES, MOST_DRAWS // max(rows, 1)))


def resampled(
    spec: TaskSpec, rows: np.ndarray, labels: np.ndarray | None, *, resamples: int | None = None, seed: int = 0
) -> np.ndarray:
    """The primary metric on each of `resamples` resamples of the rows, float64 [R].

    Equal seeds and numbers of rows give the same resamples.

    Args:
        spec: the task.
        rows: what is kept of each row (`engine.data.results.Measured.rows`).
        labels: [N]; None of kinds whose rows hold all that is needed.
        resamples: how many; None: `default_resamples`.
        seed: of the draws.
    """
    count = default_resamples(len(rows)) if resamples is None else resamples
    return np.concatenate([spec.head.resampled(spec, rows, labels, c) for c in _counts(len(rows), count, seed)])


def _counts(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is drawn, [B, N] float64, block after block."""
    generator = np.random.default_rng([seed, rows])
    block = max(1, _BLOCK // rows)
    for begin in range(0, resamples, block):
        size = min(block, resamples - begin)
        counts = np.empty((size, rows))
        for row in counts:
            row[:] = np.bincount(generator.integers(0, rows, size=rows), minlength=rows)
        yield counts
