"""A metric on bootstrap resamples of rows, all resamples at once.

A resample of N rows is a count per row, so a metric of a resample is a function of weighted sums: of right answers,
of each class' gold, predicted and right rows, of products of centred values, or of ranks among the drawn rows. The
counts depend on seed and N alone: two models' values on resample i are of the same rows, which makes the comparison a
paired one.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 16. Rejected: `compute_metrics`
in a loop; scikit-learn takes a millisecond and more for each of a thousand resamples of each model.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.special import log_softmax

from engine.data.task import NEG_LOG_LOSS, TaskSpec
from engine.evaluation.metrics import POSITIVE, compute_metrics, primary

RESAMPLES = 1000
FEWEST = 200
MOST_DRAWS = 1 << 27
"""Rows drawn in all, beyond which there are fewer resamples, down to `FEWEST`."""
_BLOCK = 1 << 21
_EQUAL = 1e-12
_SPAN_COLUMNS = {"exact_match": 0, "f1": 1}


def default_resamples(rows: int) -> int:
    """How many resamples `rows` rows are given."""
    return max(FEWEST, min(RESAMPLES, MOST_DRAWS // max(rows, 1)))


def metric(spec: TaskSpec, rows: np.ndarray, labels: np.ndarray | None) -> float:
    """The task's primary metric of a model.

    Args:
        spec: the task.
        rows: [N, C] logits, [N, 1] values, or [N, 2] exact match and F1 per question.
        labels: [N]; None of question answering.
    """
    if spec.is_span:
        return float(rows[:, _SPAN_COLUMNS[spec.metric]].astype(np.float64).mean())
    return primary(spec, compute_metrics(spec, rows, labels))[1]


def resampled(
    spec: TaskSpec, rows: np.ndarray, labels: np.ndarray | None, *, resamples: int | None = None, seed: int = 0
) -> np.ndarray:
    """The primary metric on each of `resamples` resamples of the rows, float64 [R]; arguments as of `metric`.

    Equal seeds and numbers of rows give the same resamples.
    """
    count = default_resamples(len(rows)) if resamples is None else resamples
    return np.concatenate([_measure(spec, rows, labels, c) for c in _counts(len(rows), count, seed)])


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


def _measure(spec: TaskSpec, rows: np.ndarray, labels: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
    """The primary metric per row of `counts`, [B]."""
    total = counts.shape[1]
    if spec.is_span:
        return counts @ rows[:, _SPAN_COLUMNS[spec.metric]].astype(np.float64) / total
    if labels is None:
        raise ValueError("labels: needed for every task but question answering")
    if spec.is_regression:
        values = rows[:, 0].astype(np.float64), labels.astype(np.float64)
        return _pearson(*values, counts) if spec.metric == "pearson" else _spearman(*values, counts)
    gold = labels.astype(np.int64)
    if spec.metric == NEG_LOG_LOSS:
        likelihoods = log_softmax(rows.astype(np.float64), axis=1)
        return counts @ np.take_along_axis(likelihoods, gold[:, None], axis=1)[:, 0] / total
    predicted = rows.argmax(axis=1)
    if spec.metric == "accuracy":
        return counts @ (predicted == gold).astype(np.float64) / total
    sums = [counts @ _one_hot(ids, spec.num_labels, kept) for ids, kept in _tables(gold, predicted)]
    return _f1(*sums) if spec.metric == "f1" else _mcc(*sums)


def _tables(gold: np.ndarray, predicted: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    everyone = np.ones(len(gold), dtype=bool)
    return [(gold, predicted == gold), (gold, everyone), (predicted, everyone)]


def _one_hot(ids: np.ndarray, classes: int, kept: np.ndarray) -> np.ndarray:
    """[N, C] float64 with a 1 at each kept row's class."""
    table = np.zeros((len(ids), classes))
    table[np.arange(len(ids))[kept], ids[kept]] = 1.0
    return table


def _f1(right: np.ndarray, gold: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Of class 1 where there are two, else the mean over the classes that occur; arguments [B, C] counts."""
    both = gold + predicted
    scores = np.divide(2 * right, both, out=np.zeros_like(both), where=both > 0)
    if both.shape[1] == 2:
        return scores[:, POSITIVE]
    return scores.sum(axis=1) / (both > 0).sum(axis=1)


def _mcc(right: np.ndarray, gold: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Matthews' correlation of any number of classes; 0 where all labels or all predictions are equal."""
    total = gold.sum(axis=1)
    above = right.sum(axis=1) * total - (gold * predicted).sum(axis=1)
    below = (total**2 - (gold**2).sum(axis=1)) * (total**2 - (predicted**2).sum(axis=1))
    return np.divide(above, np.sqrt(below), out=np.zeros_like(above), where=below > 0)


def _pearson(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    x, y = _standard(x), _standard(y)
    sums = counts @ np.stack([x, y, x * x, y * y, x * y], axis=1) / counts.shape[1]
    return _correlation(*sums.T)


def _standard(values: np.ndarray) -> np.ndarray:
    """Centred and scaled, which changes no correlation and keeps sums of squares exact enough."""
    values = values - values.mean()
    spread = np.abs(values).max()
    return values / spread if spread > 0 else values


def _correlation(x: np.ndarray, y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """From means of x, y and their products; 0 where one of them is constant."""
    spread_x, spread_y = xx - x * x, yy - y * y
    varied = (spread_x > _EQUAL * np.maximum(xx, _EQUAL)) & (spread_y > _EQUAL * np.maximum(yy, _EQUAL))
    root = np.sqrt(np.where(varied, spread_x * spread_y, 1.0))
    return np.where(varied, np.clip((xy - x * y) / root, -1.0, 1.0), 0.0)


def _spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the ranks among the drawn rows; equal values share their mean rank."""
    middle = (counts.shape[1] + 1) / 2
    a, b = _ranks(x, counts) - middle, _ranks(y, counts) - middle
    scale = middle * middle
    means = [(counts * part).mean(axis=1) for part in (a * a / scale, b * b / scale, a * b / scale)]
    zero = np.zeros(len(counts))
    return _correlation(zero, zero, *means)


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[B, N] mean rank that each row has, or would have, in each resample."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.add.reduceat(counts[:, order], starts, axis=1)
    return (np.cumsum(sizes, axis=1) - (sizes - 1) / 2)[:, group]
