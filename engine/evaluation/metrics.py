"""Metrics of a whole split, computed once over all its predictions.

F1 and the correlations are not means over batches, so nothing here takes a batch. Values come from scikit-learn and
SciPy; where a metric is undefined (constant predictions, constant labels, fewer than two rows for a correlation) the
value is 0.0, as GLUE's own script reports it, never NaN and without a warning.

Chosen: all metrics of a task's kind every time; they cost about a millisecond and reports want them. Rejected:
the `evaluate` library, which fetches each metric's code from the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import log_softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from engine.data.task import NEG_LOG_LOSS, TaskSpec

POSITIVE = 1
"""Class id that counts as positive in the F1 of two classes: the second label name."""

_CONSTANT = 1e-12
"""Spread, relative to the largest magnitude, below which values count as constant in float64."""


def compute_metrics(spec: TaskSpec, predictions: Any, labels: Any) -> dict[str, float]:
    """All metrics that apply to a task whose rows have one label each.

    Args:
        spec: the task.
        predictions: logits [N, C], class ids [N], or values [N] or [N, 1]. Array or tensor.
        labels: [N] gold class ids or targets.

    Returns:
        What `TaskHead.row_metrics` of its kind gives.

    Raises:
        ValueError: shapes do not fit, there are no rows, or the task's rows have no labels of their own.
        FloatingPointError: a prediction is NaN or infinite: the model has diverged.
    """
    predicted, gold = _array(predictions), _array(labels)
    if len(gold) == 0 or len(predicted) != len(gold) or gold.ndim != 1:
        raise ValueError(f"predictions {predicted.shape} and labels {gold.shape}: need [N, ...] and [N] with N >= 1")
    if predicted.dtype.kind == "f" and not np.isfinite(predicted).all():
        raise FloatingPointError("predictions contain NaN or infinity: the model has diverged")
    return spec.head.row_metrics(spec, predicted, gold)


def primary(spec: TaskSpec, metrics: Mapping[str, float]) -> tuple[str, float]:
    """Name and value of the metric that ranks models on this task; higher is better."""
    return spec.metric, metrics[spec.metric]


def class_ids(predicted: np.ndarray, classes: int) -> np.ndarray:
    """[N] chosen classes of logits [N, C] or ids [N].

    Raises:
        ValueError: neither of them.
    """
    if predicted.ndim == 2 and predicted.shape[1] == classes:
        return predicted.argmax(axis=1)
    if predicted.ndim != 1 or predicted.dtype.kind not in "iu":
        raise ValueError(f"predictions {predicted.dtype}{predicted.shape}: need logits [N, {classes}] or ids [N]")
    return predicted


def class_metrics(predicted: np.ndarray, gold: np.ndarray, classes: int) -> dict[str, float]:
    """`accuracy`, `f1` (two classes: of class 1; more: the unweighted mean over classes) and `mcc` (Matthews'
    correlation) of logits [N, C] or ids [N]."""
    predicted = class_ids(predicted, classes)
    if classes == 2:
        f1 = f1_score(gold, predicted, labels=[POSITIVE], average="macro", zero_division=0.0)
    else:
        f1 = f1_score(gold, predicted, average="macro", zero_division=0.0)
    return {
        "accuracy": float((predicted == gold).mean()),
        "f1": float(f1),
        "mcc": 0.0 if np.ptp(gold) == 0 or np.ptp(predicted) == 0 else float(matthews_corrcoef(gold, predicted)),
    }


def neg_log_loss(logits: np.ndarray, gold: np.ndarray) -> float:
    """Mean log of the softmax's probability of the gold class, of logits [N, C].

    Raises:
        ValueError: class ids are given.
    """
    if logits.ndim != 2:
        raise ValueError(f"{NEG_LOG_LOSS} of class ids {logits.shape}: needs logits [N, C]")
    likelihoods = log_softmax(logits.astype(np.float64), axis=1)
    return float(np.take_along_axis(likelihoods, gold.astype(np.int64)[:, None], axis=1).mean())


def value_metrics(predicted: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """`pearson` and `spearman` of values [N] or [N, 1]."""
    if predicted.ndim == 2 and predicted.shape[1] == 1:
        predicted = predicted[:, 0]
    if predicted.ndim != 1:
        raise ValueError(f"predictions {predicted.shape}: need [N] or [N, 1]")
    predicted, gold = predicted.astype(np.float64), gold.astype(np.float64)
    if len(gold) < 2 or _is_constant(predicted) or _is_constant(gold):
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(predicted, gold).statistic),
        "spearman": float(spearmanr(predicted, gold).statistic),
    }


def _is_constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= _CONSTANT * np.abs(values).max())


def _array(values: Any) -> np.ndarray:
    """NumPy view or copy of a tensor (any device, bfloat16 included), array or list."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)
