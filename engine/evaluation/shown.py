"""A model's answers for people: class by class, how classes are confused, and some rows of dev.

classes          [{label, precision, recall, f1, support}], in the order of class ids
confusion        [C, C] rows of each label (row) that got each answer (column); null of more than `MOST_CONFUSED`
values           {name: number} of regression: correlations, mean absolute error
samples          {right: [row], wrong: [row]}, row {texts, gold, answer, probability}; null where texts may not be shown
largest_errors   [{texts, gold, answer}] of regression; without texts where they may not be shown

Right answers are drawn at random, wrong ones are those the model was most sure of: they say where it, or a label, is
wrong. Rejected: the rights it was most sure of. They are the shortest and plainest texts, and look better than it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from engine.data import Rows, TaskSpec
from engine.evaluation.metrics import compute_metrics

SHOWN = 3
"""Rows of each kind."""
LONGEST = 120
"""Characters of a text."""
MOST_CONFUSED = 30
"""Classes of a table of confusions that can still be read."""


def shown_classes(spec: TaskSpec, rows: np.ndarray, dev: Rows, *, samples: bool, seed: int) -> dict[str, Any]:
    """Classes, confusions and samples, as the module says.

    Args:
        spec: the task.
        rows: [N, C] logits, a row per row of `dev`.
        dev: the texts and their labels.
        samples: whether texts may be shown.
        seed: of the rows that are drawn.
    """
    gold, answers, ids = dev.labels, rows.argmax(axis=1), range(spec.num_labels)
    each = zip(*precision_recall_fscore_support(gold, answers, labels=ids, zero_division=0.0), strict=True)
    classes = [
        {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for label, (p, r, f, n) in zip(spec.label_names, each, strict=True)
    ]
    confused = confusion_matrix(gold, answers, labels=ids).tolist() if spec.num_labels <= MOST_CONFUSED else None
    chosen = _samples(spec, rows, dev, answers, seed) if samples else None
    return {"classes": classes, "confusion": confused, "samples": chosen}


def _samples(spec: TaskSpec, rows: np.ndarray, dev: Rows, answers: np.ndarray, seed: int) -> dict[str, Any]:
    sure = softmax(rows.astype(np.float64), axis=1).max(axis=1)
    right, wrong = np.flatnonzero(answers == dev.labels), np.flatnonzero(answers != dev.labels)
    drawn = np.sort(np.random.default_rng(seed).permutation(right)[:SHOWN])
    surest = wrong[np.argsort(-sure[wrong], kind="stable")[:SHOWN]]
    assert dev.labels is not None
    names, gold = spec.label_names, dev.labels

    def told(index: int) -> dict[str, Any]:
        given = {"gold": names[int(gold[index])], "answer": names[int(answers[index])]}
        return {"texts": _texts(dev, index), **given, "probability": round(float(sure[index]), 4)}

    return {"right": [told(i) for i in drawn.tolist()], "wrong": [told(i) for i in surest.tolist()]}


def shown_values(spec: TaskSpec, rows: np.ndarray, dev: Rows, *, samples: bool) -> dict[str, Any]:
    """Values and largest errors, as the module says; rows are [N, 1], arguments as of `shown_classes`."""
    assert dev.labels is not None
    gold, answers = dev.labels.astype(np.float64), rows[:, 0].astype(np.float64)
    off = np.abs(answers - gold)
    values = {**compute_metrics(spec, rows, dev.labels), "mean absolute error": float(off.mean())}
    largest = np.argsort(-off, kind="stable")[:SHOWN].tolist()
    errors = [
        {"texts": _texts(dev, i) if samples else [], "gold": float(gold[i]), "answer": float(answers[i])}
        for i in largest
    ]
    return {"values": values, "largest_errors": errors}


def _texts(dev: Rows, index: int) -> list[str]:
    """The texts of a row, each in one line and cut."""
    lines = [" ".join(column[index].split()) for column in dev.texts]
    return [line if len(line) <= LONGEST else line[: LONGEST - 1] + "…" for line in lines]
