"""Classification of one text or a pair: C logits, a class id as label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.data.columns import GLUE_METRICS
from engine.data.results import Predictions, Simple
from engine.data.rows import Rows
from engine.data.task import NEG_LOG_LOSS, TaskSpec
from engine.errors import UserError
from engine.tasks.texts import DIGITS, RowAnswers, TextsHead, all_labels, class_shares

if TYPE_CHECKING:
    from torch import Tensor

    from engine.data.dataset import EncodedDataset

CARD_CLASSES = 30
"""Classes whose rows are counted in the model card."""


class ClassesHead(TextsHead):
    """One of C classes or choices: cross-entropy, KL, probabilities."""

    def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over the rows that have a label."""
        from engine.tasks.losses import cross_entropy

        return cross_entropy(logits, labels)

    def teacher_loss(self, student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
        """T² KL(teacher || student), mean over rows."""
        from engine.tasks.losses import divergence

        return divergence(student, teacher, temperature)

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
        """Soft cross-entropy with temperature."""
        from engine.tasks.losses import soft_labels

        return soft_labels(student, teacher, temperature, paper_exact)

    def divergence(self, student: Tensor, teacher: Tensor, places: Tensor | None = None) -> Tensor:
        """KL(teacher || student)."""
        from engine.tasks.losses import divergence_of_rows

        return divergence_of_rows(student, teacher)

    def labels(self, keys: Sequence[str], spec: TaskSpec, where: str) -> np.ndarray:
        """int64 class ids."""
        from engine.data.labels import class_ids

        return class_ids(keys, spec.label_names, where)

    def describe_labels(self, spec: TaskSpec, parts: Sequence[Rows]) -> str:
        """Classes with their counts."""
        return class_shares(spec, all_labels(parts))

    def resampled(self, spec: TaskSpec, rows: np.ndarray, labels: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
        """The metric of weighted rows."""
        from engine.evaluation.weighted import classes_metric

        if labels is None:
            raise ValueError(f"labels: needed for a {self.kind} task")
        return classes_metric(spec.metric, rows, labels, spec.num_labels, counts)

    def predictions(
        self, spec: TaskSpec, key: str, names: Sequence[Any], answers: RowAnswers, *, every: bool, threshold: float
    ) -> Predictions:
        """The answer and its probability, or also every class's."""
        from scipy.special import softmax

        logits = answers.rows
        shares = softmax(logits.astype(np.float64), axis=1)
        records = []
        for name, row, best in zip(names, shares.tolist(), logits.argmax(axis=1).tolist(), strict=True):
            record = {key: name, "prediction": spec.label_names[best], "probability": round(row[best], DIGITS)}
            if every:
                given = zip(spec.label_names, row, strict=True)
                record["probabilities"] = {label: round(p, DIGITS) for label, p in given}
            records.append(record)
        return Predictions(records)


class Classification(ClassesHead):
    """See the module."""

    kind: ClassVar[str] = "classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "mcc", NEG_LOG_LOSS)
    from_table: ClassVar[bool] = True
    named_outputs: ClassVar[bool] = True
    pooled: ClassVar[bool] = True
    inherits: ClassVar[bool] = True
    stratified: ClassVar[bool] = True

    def check(self, spec: TaskSpec) -> None:
        """One or two texts, two or more classes."""
        one_or_two_texts(spec)
        if len(spec.label_names) < 2:
            raise UserError(f"task {spec.name!r} has {len(spec.label_names)} class(es): classification needs two")

    def choose_metric(self, num_labels: int, is_pair: bool, glue: str | None) -> tuple[str, str]:
        """The GLUE task's own where it fits; else accuracy, or for pairs and two classes F1, as GLUE's paraphrases."""
        metric = GLUE_METRICS.get(glue or "", "")
        if metric == "accuracy" or (metric in ("f1", "mcc") and num_labels == 2):
            return metric, f"GLUE's for {glue}, which the path names"
        if is_pair and num_labels == 2:
            return "f1", "the usual one for pairs of texts and two classes, F1 of the second"
        return "accuracy", "the usual one for classes"

    def class_names(self, keys: Sequence[str], column: str, where: str, given: Sequence[str] | None) -> tuple[str, ...]:
        """As given, or found in the labels (`engine.data.labels.class_names`)."""
        from engine.data.labels import class_names

        return class_names(keys, column, where, given)

    def card_lines(self, spec: TaskSpec, labels: np.ndarray) -> list[str]:
        """How many rows each class has."""
        counts = np.bincount(labels, minlength=spec.num_labels)
        pairs = list(zip(spec.label_names, counts.tolist(), strict=True))
        told = ", ".join(
            f"{label} {count:,} ({100 * count / len(labels):.0f} %)" for label, count in pairs[:CARD_CLASSES]
        )
        more = f" and {len(pairs) - CARD_CLASSES} more" if len(pairs) > CARD_CLASSES else ""
        return [f"classes of the rows to learn from: {told}{more}"]

    def student_class(self) -> type[Any]:
        """Sequence classification."""
        from engine.student.heads import FFNASForSequenceClassification

        return FFNASForSequenceClassification

    def config_fields(self, spec: TaskSpec) -> dict[str, Any]:
        """The names of the classes."""
        names = dict(enumerate(spec.label_names))
        return {
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
            "num_labels": len(names),
            "problem_type": "single_label_classification",
        }

    def spec_of(self, config: Mapping[str, Any]) -> TaskSpec | None:
        """Of a sequence classifier with two or more outputs."""
        if not is_sequence_model(config) or is_regression(config):
            return None
        names = dict(config.get("id2label") or {})
        labels = tuple(str(names[key]) for key in sorted(names, key=int)) or ("LABEL_0", "LABEL_1")
        return TaskSpec("rows", self.kind, ("text",), "label", labels)

    def row_metrics(self, spec: TaskSpec, predicted: np.ndarray, gold: np.ndarray) -> dict[str, float]:
        """`accuracy`, `f1`, `mcc`, and `neg_log_loss` where that ranks models."""
        from engine.evaluation.metrics import class_metrics, neg_log_loss

        metrics = class_metrics(predicted, gold, spec.num_labels)
        return {**metrics, NEG_LOG_LOSS: neg_log_loss(predicted, gold)} if spec.metric == NEG_LOG_LOSS else metrics

    def constant_score(self, spec: TaskSpec, data: EncodedDataset) -> float | None:
        """Of answering the shares of the classes, whatever the text."""
        from engine.evaluation.metrics import compute_metrics

        labels = np.asarray(data.labels)
        shares = np.bincount(labels, minlength=spec.num_labels) / len(labels)
        logits = np.tile(np.log(np.maximum(shares, 1e-9)), (len(labels), 1))
        return compute_metrics(spec, logits, labels)[spec.metric]

    def shown(self, spec: TaskSpec, rows: np.ndarray, dev: Rows, *, samples: bool, seed: int) -> dict[str, Any]:
        """Class by class, confusions, samples."""
        from engine.evaluation.shown import shown_classes

        return {} if dev.labels is None else shown_classes(spec, rows, dev, samples=samples, seed=seed)

    def simple_models(self) -> Simple:
        """Logistic regression, and the most frequent class."""
        from engine.evaluation.simple import SimpleClasses

        return SimpleClasses()

    def table_gold(
        self, spec: TaskSpec, keys: Sequence[str], kept: np.ndarray, raw: Sequence[Any], column: str, where: str
    ) -> tuple[np.ndarray, str]:
        """Ids of labels that are names of the model's classes, but for case, or their numbers."""
        from engine.data.labels import model_class_ids

        return model_class_ids(list(keys), kept, raw, where, spec.label_names)


def one_or_two_texts(spec: TaskSpec) -> None:
    """Raises `UserError` for another number of text columns."""
    if len(spec.text_columns) not in (1, 2):
        raise UserError(f"task {spec.name!r} has {len(spec.text_columns)} text columns: give one or two")


def is_sequence_model(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is one of a sequence classifier."""
    return str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")


def is_regression(config: Mapping[str, Any]) -> bool:
    """Whether a sequence classifier's one output is a value."""
    one = config.get("num_labels") == 1 or len(config.get("id2label") or {}) == 1
    return config.get("problem_type") == "regression" or one
