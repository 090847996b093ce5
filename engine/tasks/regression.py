"""Regression on one text or a pair: one output, a number as label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.data.results import Predictions, Simple
from engine.data.rows import Rows
from engine.data.task import TaskSpec
from engine.errors import UserError
from engine.tasks.classification import is_regression, is_sequence_model, one_or_two_texts
from engine.tasks.texts import DIGITS, RowAnswers, TextsHead, all_labels

if TYPE_CHECKING:
    from torch import Tensor


class Regression(TextsHead):
    """See the module; a missing label is NaN."""

    kind: ClassVar[str] = "regression"
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman")
    from_table: ClassVar[bool] = True
    pooled: ClassVar[bool] = True
    inherits: ClassVar[bool] = True
    merged_as: ClassVar[str] = "mean"
    inferred_from: ClassVar[str] = "labels are numbers with decimals, or many"
    label_dtype: ClassVar[type[np.generic] | None] = np.float32

    def check(self, spec: TaskSpec) -> None:
        """One or two texts, no classes."""
        one_or_two_texts(spec)
        if spec.label_names:
            raise UserError(f"task {spec.name!r} is a regression and has label names: leave them out")

    def choose_metric(self, num_labels: int, is_pair: bool, glue: str | None) -> tuple[str, str]:
        """Pearson's r."""
        return "pearson", "the usual one for numbers"

    def labels(self, keys: Sequence[str], spec: TaskSpec, where: str) -> np.ndarray:
        """float32 targets."""
        from engine.data.labels import targets

        return targets(keys, spec.label_column, where)

    def check_labels(self, labels: np.ndarray, column: str, where: str) -> None:
        """Values that are all equal are refused."""
        if np.ptp(labels) == 0:
            raise UserError(f"{where}: every value of {column!r} is {labels[0]}: there is nothing to learn")

    def allowed(self, spec: TaskSpec, train: np.ndarray | None) -> tuple[str, ...]:
        """-1 is a value where others are negative."""
        return ("-1",) if train is not None and train.min() < 0 else spec.label_names

    def merged(self, values: Sequence[Any]) -> Any:
        """The mean."""
        return np.mean(values)

    def describe_labels(self, spec: TaskSpec, parts: Sequence[Rows]) -> str:
        """Range and mean."""
        labels = all_labels(parts)
        return f"numbers from {labels.min():g} to {labels.max():g}, mean {labels.mean():.3g}"

    def card_lines(self, spec: TaskSpec, labels: np.ndarray) -> list[str]:
        """Range and mean."""
        return [f"labels from {labels.min():g} to {labels.max():g}, mean {labels.mean():.3g}"]

    def student_class(self) -> type[Any]:
        """Sequence classification, which transformers takes for both."""
        from engine.student.heads import FFNASForSequenceClassification

        return FFNASForSequenceClassification

    def config_fields(self, spec: TaskSpec) -> dict[str, Any]:
        """One output."""
        return {"num_labels": 1, "problem_type": "regression"}

    def spec_of(self, config: Mapping[str, Any]) -> TaskSpec | None:
        """Of a sequence classifier with one output."""
        if not is_sequence_model(config) or not is_regression(config):
            return None
        return TaskSpec("rows", self.kind, ("text",), "label", metric="pearson")

    def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean square over the rows that have a label, 0 where none has."""
        known = ~labels.isnan()
        errors = (logits.float().squeeze(-1) - labels.float().nan_to_num()).square() * known
        return errors.sum() / known.sum().clamp(min=1)

    def teacher_loss(self, student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
        """Mean squared difference."""
        return (student.float() - teacher.float()).square().mean()

    def prediction_loss(
        self,
        student: Tensor,
        teacher: Tensor | None,
        mask: Tensor,
        labels: Tensor | None,
        *,
        temperature: float,
        paper_exact: bool,
    ) -> Tensor:
        """Mean square to the gold labels, as EfficientBERT has it."""
        if labels is None:
            raise UserError("prediction: a regression needs labels in every batch: give labelled data")
        return (student.squeeze(-1).float() - labels.float()).square().mean()

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The squared difference."""
        return (student.float() - teacher.float()).square().sum(dim=-1)

    def no_labels(self, count: int, like: np.ndarray) -> np.ndarray:
        """NaN."""
        return np.full(count, np.nan, dtype=like.dtype)

    def row_metrics(self, spec: TaskSpec, predicted: np.ndarray, gold: np.ndarray) -> dict[str, float]:
        """`pearson`, `spearman`."""
        from engine.evaluation.metrics import value_metrics

        return value_metrics(predicted, gold)

    def resampled(self, spec: TaskSpec, rows: np.ndarray, labels: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
        """The correlation of weighted rows."""
        from engine.evaluation.weighted import values_metric

        if labels is None:
            raise ValueError(f"labels: needed for a {self.kind} task")
        return values_metric(spec.metric, rows, labels, counts)

    def shown(self, spec: TaskSpec, rows: np.ndarray, dev: Rows, *, samples: bool, seed: int) -> dict[str, Any]:
        """Correlations and the largest errors."""
        from engine.evaluation.shown import shown_values

        return {} if dev.labels is None else shown_values(spec, rows, dev, samples=samples)

    def simple_models(self) -> Simple:
        """Ridge regression, and the mean."""
        from engine.evaluation.simple import SimpleValues

        return SimpleValues()

    def predictions(
        self, spec: TaskSpec, key: str, names: Sequence[Any], answers: RowAnswers, *, every: bool, threshold: float
    ) -> Predictions:
        """The number."""
        values = [round(v, DIGITS) for v in answers.rows[:, 0].astype(np.float64).tolist()]
        return Predictions([{key: name, "prediction": v} for name, v in zip(names, values, strict=True)])

    def table_gold(
        self, spec: TaskSpec, keys: Sequence[str], kept: np.ndarray, raw: Sequence[Any], column: str, where: str
    ) -> tuple[np.ndarray, str]:
        """Targets."""
        from engine.data.labels import targets

        return targets(keys, column, where), ""
