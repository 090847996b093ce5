"""A task and its rows, before anything is tokenized.

Chosen: columns of Python strings beside one numpy label array. Rejected: handing `datasets.Dataset` objects around;
every consumer would then depend on that library and on its cache files staying where they are.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.data.dataset import EncodedDataset

CLASSIFICATION_METRICS = ("accuracy", "f1", "mcc")
REGRESSION_METRICS = ("pearson", "spearman")


@dataclass(frozen=True)
class TaskSpec:
    """What is predicted from which columns, and the metric that ranks models.

    Attributes:
        name: short name for reports.
        kind: classification or regression.
        text_columns: one column, or two for a pair.
        label_column: the column with the gold label.
        label_names: class names in id order; () for regression. Of two, the second is the positive class of F1.
        metric: one of `metrics`, the value that ranks models; higher is better.
    """

    name: str
    kind: Literal["classification", "regression"]
    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...] = ()
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        if len(self.text_columns) not in (1, 2):
            raise UserError(f"task {self.name!r} has {len(self.text_columns)} text columns: give one or two")
        if self.kind == "classification" and len(self.label_names) < 2:
            raise UserError(f"task {self.name!r} has {len(self.label_names)} class(es): classification needs two")
        if self.kind == "regression" and self.label_names:
            raise UserError(f"task {self.name!r} is a regression and has label names: leave them out")
        if self.metric not in self.metrics:
            raise UserError(
                f"metric {self.metric!r} does not fit a {self.kind} task: choose one of {', '.join(self.metrics)}"
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics that apply, `metric` not necessarily first."""
        return CLASSIFICATION_METRICS if self.kind == "classification" else REGRESSION_METRICS

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head: classes, or 1 for regression."""
        return len(self.label_names) or 1

    @property
    def is_regression(self) -> bool:
        """Whether labels are real numbers."""
        return self.kind == "regression"

    @property
    def is_pair(self) -> bool:
        """Whether an input is two texts."""
        return len(self.text_columns) == 2

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and YAML take them."""
        return {
            "name": self.name,
            "kind": self.kind,
            "text_columns": list(self.text_columns),
            "label_column": self.label_column,
            "label_names": list(self.label_names),
            "metric": self.metric,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskSpec:
        """Inverse of `to_dict`."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class Rows:
    """Texts and labels of one split.

    Attributes:
        texts: one list of N strings per text column.
        labels: [N] int64 class ids or float32 targets; None for unlabelled rows.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        counts = {len(column) for column in self.texts}
        if self.labels is not None:
            counts.add(len(self.labels))
        if len(counts) != 1:
            raise ValueError(f"columns of unequal length: {sorted(counts)}")

    def __len__(self) -> int:
        return len(self.texts[0])

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows at `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        texts = tuple([column[i] for i in indices.tolist()] for column in self.texts)
        return Rows(texts, None if self.labels is None else self.labels[indices])

    def sample(self, count: int | None, seed: int) -> Rows:
        """At most `count` rows drawn without replacement, in their original order."""
        if count is None or count >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))

    def write_csv(self, path: str | Path, spec: TaskSpec) -> None:
        """Write the rows as a CSV file that `load_task` reads back: text columns, then the label by name."""
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*spec.text_columns, spec.label_column])
            for i, texts in enumerate(zip(*self.texts, strict=True)):
                label = "" if self.labels is None else self.labels[i].item()
                named = spec.label_names[label] if spec.label_names and label != "" else label
                writer.writerow([*texts, named])


@dataclass(frozen=True)
class TaskData:
    """A task with its splits, which share no text.

    Attributes:
        spec: the task.
        train: rows to train on.
        score: held out of train; scores candidates.
        select: held out of train; chooses checkpoints.
        dev: only ever reported.
        text: documents for warm-up distillation; none of them is a text of score, select or dev.
        notes: one line for each thing done to the data, for the log and the report.
    """

    spec: TaskSpec
    train: Rows
    score: Rows
    select: Rows
    dev: Rows
    text: list[str]
    notes: tuple[str, ...] = ()

    def encode(
        self, tokenizer: Any, max_length: int, *, text_length: int | None = None, max_positions: int | None = None
    ) -> EncodedTask:
        """Tokenize every split; see `engine.data.encode_task` and `encode_text`."""
        from engine.data.encode import encode_task
        from engine.data.text import encode_text

        splits = {
            name: encode_task(getattr(self, name), self.spec, tokenizer, max_length, max_positions=max_positions)
            for name in ("train", "score", "select", "dev")
        }
        text = encode_text(self.text, tokenizer, text_length or max_length, max_positions=max_positions)
        return EncodedTask(self.spec, text=text, **splits)


@dataclass(frozen=True)
class EncodedTask:
    """The splits of `TaskData`, tokenized."""

    spec: TaskSpec
    train: EncodedDataset
    score: EncodedDataset
    select: EncodedDataset
    dev: EncodedDataset
    text: EncodedDataset
