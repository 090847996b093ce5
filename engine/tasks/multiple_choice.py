"""Multiple choice: what all choices share and one text per choice; a score for each choice, the right one as label."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.data.rows import Rows
from engine.data.task import NEG_LOG_LOSS, TaskSpec
from engine.errors import UserError
from engine.tasks.classification import ClassesHead

if TYPE_CHECKING:
    from engine.data.dataset import EncodedDataset


class MultipleChoice(ClassesHead):
    """See the module. A row becomes C sequences, pairs of the shared text and a choice."""

    kind: ClassVar[str] = "multiple_choice"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", NEG_LOG_LOSS)

    def check(self, spec: TaskSpec) -> None:
        """A column of shared texts, and one per choice."""
        columns = len(spec.text_columns)
        if columns < 3 or columns != len(spec.label_names) + 1:
            raise UserError(
                f"task {spec.name!r} has {columns} text columns and {len(spec.label_names)} names of choices: give the"
                " shared text's column and one for each of two or more choices"
            )

    def groups(self, rows: Rows) -> Sequence[str] | None:
        """Choices after one text stay together."""
        return rows.texts[0]

    def sequences(self, texts: Sequence[Sequence[str]]) -> list[Sequence[Sequence[str]]]:
        """The shared text with each choice."""
        return [(texts[0], choice) for choice in texts[1:]]

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
        """C sequences per row, one after the other."""
        from engine.data.encode import encode_texts

        choices = len(rows.texts) - 1
        shared = [text for text in rows.texts[0] for _ in range(choices)]
        columns = (shared, list(chain.from_iterable(zip(*rows.texts[1:], strict=True))))
        return encode_texts(columns, rows.labels, tokenizer, max_length, choices=choices)

    def student_class(self) -> type[Any]:
        """Multiple choice."""
        from engine.student.heads import FFNASForMultipleChoice

        return FFNASForMultipleChoice

    def answer_shape(self, spec: TaskSpec, rows: int, columns: int) -> tuple[int, ...]:
        """[B, C] of B * C sequences."""
        return (rows // spec.num_labels, spec.num_labels)

    def row_metrics(self, spec: TaskSpec, predicted: np.ndarray, gold: np.ndarray) -> dict[str, float]:
        """`accuracy`, and `neg_log_loss` where that ranks models."""
        from engine.evaluation.metrics import class_ids, neg_log_loss

        metrics = {"accuracy": float((class_ids(predicted, spec.num_labels) == gold).mean())}
        return {**metrics, NEG_LOG_LOSS: neg_log_loss(predicted, gold)} if spec.metric == NEG_LOG_LOSS else metrics
