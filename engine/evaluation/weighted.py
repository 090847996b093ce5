"""Metrics of many resamples of rows at once: how often each resample holds each row is all they need.

A metric of a resample is a function of weighted sums: of right answers, of each class' gold, predicted and right rows,
of products of centred values, or of ranks among the drawn rows. `counts` is [R, N] float64 below, R resamples of N
rows; results are [R] float64. They equal `engine.evaluation.metrics` on the resampled rows.
"""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax

from engine.data.task import NEG_LOG_LOSS
from engine.evaluation.metrics import POSITIVE

_EQUAL = 1e-12


def mean_of(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean of one value per row [N]."""
    return counts @ values.astype(np.float64) / counts.shape[1]


def classes_metric(metric: str, rows: np.ndarray, labels: np.ndarray, classes: int, counts: np.ndarray) -> np.ndarray:
    """Accuracy, F1, Matthews' correlation or mean log-likelihood of logits [N, C] and class ids [N]."""
    gold = labels.astype(np.int64)
    if metric == NEG_LOG_LOSS:
        likelihoods = log_softmax(rows.astype(np.float64), axis=1)
        return mean_of(np.take_along_axis(likelihoods, gold[:, None], axis=1)[:, 0], counts)
    predicted = rows.argmax(axis=1)
    if metric == "accuracy":
        return mean_of(predicted == gold, counts)
    sums = [counts @ _one_hot(ids, classes, kept) for ids, kept in _tables(gold, predicted)]
    return _f1(*sums) if metric == "f1" else _mcc(*sums)


def values_metric(metric: str, rows: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson's or Spearman's correlation of values [N, 1] and targets [N]."""
    values = rows[:, 0].astype(np.float64), labels.astype(np.float64)
    return _pearson(*values, counts) if metric == "pearson" else _spearman(*values, counts)


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
