"""Metrics against formulas written out by hand, and the cases where they are undefined."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from engine.data import TaskSpec
from engine.evaluation.metrics import compute_metrics, primary

BINARY = TaskSpec("t", "classification", ("a", "b"), "label", ("no", "yes"), "f1")
TERNARY = TaskSpec("t", "classification", ("a",), "label", ("x", "y", "z"))
REGRESSION = TaskSpec("t", "regression", ("a", "b"), "score", metric="pearson")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def confusion(predicted, gold, count):
    table = np.zeros((count, count))
    for p, g in zip(predicted, gold, strict=True):
        table[g, p] += 1
    return table


def f1_of(table, c):
    hit, wrong, missed = table[c, c], table[:, c].sum() - table[c, c], table[c].sum() - table[c, c]
    return 2 * hit / (2 * hit + wrong + missed)


def ranks(values):
    """Average ranks, ties shared."""
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())


@pytest.mark.parametrize("count", [7, 45, 541])
def test_two_classes_equal_the_formulas(count):
    rng = np.random.default_rng(count)
    gold = rng.integers(0, 2, count)
    predicted = np.where(rng.random(count) < 0.7, gold, 1 - gold)
    gold[:4], predicted[:4] = [0, 1, 0, 1], [0, 1, 1, 0]  # every cell of the table is occupied
    (tn, fp), (fn, tp) = confusion(predicted, gold, 2)
    got = compute_metrics(BINARY, predicted, gold)
    assert got["accuracy"] == pytest.approx((tp + tn) / count)
    assert got["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert got["mcc"] == pytest.approx(mcc)
    assert primary(BINARY, got) == ("f1", got["f1"])


def test_second_label_name_is_the_positive_class():
    got = compute_metrics(BINARY, np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0]))
    assert got["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("count", [45, 541])
def test_three_classes_equal_the_formulas(count):
    rng = np.random.default_rng(count)
    gold, logits = rng.integers(0, 3, count), rng.normal(size=(count, 3)).astype(np.float32)
    predicted = logits.argmax(axis=1)
    table = confusion(predicted, gold, 3)
    got = compute_metrics(TERNARY, logits, gold)
    assert got["accuracy"] == pytest.approx(np.trace(table) / count)
    assert got["f1"] == pytest.approx(np.mean([f1_of(table, c) for c in range(3)]))
    # R_K of Gorodkin (2004), the form of MCC for more than two classes
    per_gold, per_predicted = table.sum(axis=1), table.sum(axis=0)
    top = np.trace(table) * count - per_gold @ per_predicted
    bottom = math.sqrt((count**2 - per_predicted @ per_predicted) * (count**2 - per_gold @ per_gold))
    assert got["mcc"] == pytest.approx(top / bottom)
    assert primary(TERNARY, got) == ("accuracy", got["accuracy"])


@pytest.mark.parametrize("count", [2, 7, 541])
def test_correlations_equal_the_formulas(count):
    rng = np.random.default_rng(count)
    gold = np.round(rng.random(count) * 5, 1).astype(np.float32)  # with ties
    predicted = (gold + rng.normal(size=count)).astype(np.float32)
    got = compute_metrics(REGRESSION, predicted[:, None], gold)
    # float32 inputs, float64 sums: agreement to a few float64 roundings
    assert got["pearson"] == pytest.approx(pearson(predicted.astype(np.float64), gold.astype(np.float64)), abs=1e-12)
    assert got["spearman"] == pytest.approx(pearson(ranks(predicted), ranks(gold)), abs=1e-12)
    assert primary(REGRESSION, got) == ("pearson", got["pearson"])


@pytest.mark.parametrize("value", [0, 1])
def test_constant_predictions_give_zero_not_nan(value):
    gold = np.array([0, 1, 0, 1, 1])
    got = compute_metrics(BINARY, np.full(5, value), gold)
    assert got["mcc"] == 0.0
    assert got["f1"] == (0.0 if value == 0 else 0.75)
    scores = np.linspace(0, 5, 5)
    assert compute_metrics(REGRESSION, np.full(5, value + 0.1), scores) == {"pearson": 0.0, "spearman": 0.0}
    assert compute_metrics(REGRESSION, scores, np.full(5, 3.0)) == {"pearson": 0.0, "spearman": 0.0}
    nearly = np.full(5, 1.0) + np.arange(5) * 1e-15
    assert compute_metrics(REGRESSION, nearly, scores) == {"pearson": 0.0, "spearman": 0.0}


def test_one_row_and_one_class_in_the_labels():
    assert compute_metrics(REGRESSION, np.array([1.0]), np.array([2.0])) == {"pearson": 0.0, "spearman": 0.0}
    assert compute_metrics(BINARY, np.array([0, 0]), np.array([0, 0])) == {"accuracy": 1.0, "f1": 0.0, "mcc": 0.0}
    assert compute_metrics(TERNARY, np.array([2]), np.array([2]))["accuracy"] == 1.0


def test_metrics_of_a_split_are_not_means_of_batches():
    gold, predicted = np.array([1, 1, 0, 0, 0, 0]), np.array([1, 0, 0, 0, 1, 0])
    batches = [compute_metrics(BINARY, predicted[i : i + 3], gold[i : i + 3])["f1"] for i in (0, 3)]
    assert compute_metrics(BINARY, predicted, gold)["f1"] != pytest.approx(np.mean(batches))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_are_taken_as_they_are(dtype):
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=dtype, requires_grad=True)
    got = compute_metrics(BINARY, logits, torch.tensor([0, 1]))
    assert got == {"accuracy": 1.0, "f1": 1.0, "mcc": 1.0}
    assert all(type(value) is float for value in got.values())


@pytest.mark.parametrize("kind", ["classification", "multiple_choice"])
def test_neg_log_loss_is_scikit_learns(kind):
    columns = ("text",) if kind == "classification" else ("text", "a", "b", "c")
    spec = TaskSpec("toy", kind, columns, "label", ("a", "b", "c"), "neg_log_loss")
    rng = np.random.default_rng(3)
    gold, logits = rng.integers(0, 2, 61), (3 * rng.normal(size=(61, 3))).astype(np.float32)  # class 2 never
    odds = np.exp(logits.astype(np.float64))
    expected = -log_loss(gold, odds / odds.sum(axis=1, keepdims=True), labels=[0, 1, 2])
    got = compute_metrics(spec, logits, gold)
    assert got["neg_log_loss"] == pytest.approx(expected, rel=1e-12)  # float64 throughout
    assert primary(spec, got) == ("neg_log_loss", got["neg_log_loss"])


def test_neg_log_loss_is_finite_for_any_logits_and_needs_them():
    spec = TaskSpec("toy", "classification", ("text",), "label", ("a", "b"), "neg_log_loss")
    got = compute_metrics(spec, np.array([[1e30, -1e30], [0.0, 0.0]], dtype=np.float32), np.array([1, 0]))
    assert got["neg_log_loss"] == pytest.approx(-1e30)
    with pytest.raises(ValueError, match="neg_log_loss of class ids"):
        compute_metrics(spec, np.array([1, 0]), np.array([1, 0]))
    assert "neg_log_loss" not in compute_metrics(BINARY, np.zeros((2, 2)), np.array([1, 0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_diverged_models_are_reported(bad):
    with pytest.raises(FloatingPointError, match="diverged"):
        compute_metrics(REGRESSION, np.array([1.0, bad]), np.array([1.0, 2.0]))
    with pytest.raises(FloatingPointError, match="diverged"):
        compute_metrics(BINARY, np.array([[1.0, bad]]), np.array([1]))


@pytest.mark.parametrize(
    ("spec", "predicted", "gold"),
    [
        (BINARY, np.zeros((2, 3)), np.zeros(2, int)),
        (BINARY, np.zeros(2), np.zeros(2, int)),
        (BINARY, np.zeros(3, int), np.zeros(2, int)),
        (BINARY, np.zeros(0, int), np.zeros(0, int)),
        (REGRESSION, np.zeros((2, 2)), np.zeros(2)),
        (REGRESSION, np.zeros(2), np.zeros((2, 1))),
    ],
    ids=["classes", "float ids", "count", "empty", "outputs", "label shape"],
)
def test_shapes_that_do_not_fit_are_refused(spec, predicted, gold):
    with pytest.raises(ValueError, match="predictions"):
        compute_metrics(spec, predicted, gold)
