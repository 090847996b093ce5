"""What kinds of tasks have in common whose rows are texts with one answer [C] each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.results import Found, Measured
from engine.data.rows import Rows
from engine.data.task import TaskHead, TaskSpec

if TYPE_CHECKING:
    from engine.data.dataset import EncodedDataset

DIGITS = 6
"""Decimals of numbers and probabilities that are written."""

MOST_CLASSES = 12
"""Classes that are counted in a line about the data."""


@dataclass(frozen=True)
class RowAnswers:
    """Outputs of a model.

    Attributes:
        logits: [N, C] float32, in the order they were computed in.
        order: [N] int64, the row that each belongs to.
    """

    logits: np.ndarray
    order: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """The outputs in the order of the rows."""
        ordered = np.empty_like(self.logits)
        ordered[self.order] = self.logits
        return ordered


class TextsHead(TaskHead):
    """Texts in, one answer [C] and one label each."""

    def encode(
        self,
        rows: Rows,
        spec: TaskSpec,
        tokenizer: Any,
        max_length: int,
        *,
        stride: int | None = None,
        published: bool = False,
    ) -> EncodedDataset:
        """One sequence per row, of one text or two, cut to `max_length`."""
        from engine.data.encode import encode_texts

        return encode_texts(rows.texts, rows.labels, tokenizer, max_length, published=published)

    def answer(self, spec: TaskSpec, data: EncodedDataset, found: Found) -> RowAnswers:
        """The outputs themselves."""
        import torch

        order, logits = [], []
        for rows, outputs in found:
            order.append(rows)
            logits.append(outputs)
        return RowAnswers(torch.cat(logits).numpy(), np.concatenate(order))

    def score(
        self,
        spec: TaskSpec,
        answers: RowAnswers,
        gold: np.ndarray,
        *,
        kept: np.ndarray | None = None,
        threshold: float = 0.0,
    ) -> Measured:
        """`row_metrics`; what is kept of a row are its outputs."""
        from engine.evaluation.metrics import compute_metrics

        if kept is not None:
            chosen = answers.rows[kept]
            return Measured(compute_metrics(spec, chosen, gold), lambda: chosen)
        return Measured(compute_metrics(spec, answers.logits, gold[answers.order]), lambda: answers.rows)

    def metric(self, spec: TaskSpec, rows: np.ndarray, labels: np.ndarray | None) -> float:
        """The task's metric, computed again."""
        from engine.evaluation.metrics import compute_metrics

        return compute_metrics(spec, rows, labels)[spec.metric]


def class_shares(spec: TaskSpec, labels: np.ndarray) -> str:
    """Classes with their counts, of many the most frequent."""
    counts = np.bincount(labels, minlength=spec.num_labels).tolist()
    pairs = list(zip(spec.label_names, counts, strict=True))
    kept = pairs if len(pairs) <= MOST_CLASSES else sorted(pairs, key=lambda pair: -pair[1])[: MOST_CLASSES - 1]
    text = ", ".join(f"{name}: {count:,} ({100 * count / len(labels):.0f} %)" for name, count in kept)
    return text + (f" and {len(pairs) - len(kept)} more classes" if len(kept) < len(pairs) else "")


def all_labels(parts: Sequence[Rows]) -> np.ndarray:
    """Labels of several splits together."""
    return np.concatenate([rows.labels for rows in parts if rows.labels is not None])
