"""A task and its rows, before anything is tokenized.

Four kinds: classification and regression of one text or a pair; question answering by a span of a context
(text columns: question, context; gold: `Gold`); multiple choice (text columns: what all choices share, then one per
choice; label: the right one).

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
    pass

NEG_LOG_LOSS = "neg_log_loss"
"""Name, as scikit-learn's, of the mean log-likelihood of the gold classes: continuous where accuracy has steps."""

METRICS = {
    "classification": ("accuracy", "f1", "mcc", NEG_LOG_LOSS),
    "regression": ("pearson", "spearman"),
    "question_answering": ("f1", "exact_match"),
    "multiple_choice": ("accuracy", NEG_LOG_LOSS),
}
"""Per kind of task the metrics that can rank models."""

Kind = Literal["classification", "regression", "question_answering", "multiple_choice"]


@dataclass(frozen=True)
class TaskSpec:
    """What is predicted from which columns, and the metric that ranks models.

    Attributes:
        name: short name for reports.
        kind: what is predicted, see the module.
        text_columns: one column, or two for a pair; of multiple choice the shared text and one column per choice.
        label_column: the column with the gold label.
        label_names: class names in id order, or those of the choices; () where there are no classes. Of two, the
            second is the positive class of F1.
        metric: one of `metrics`, the value that ranks models; higher is better.
        no_answer: question answering: whether a question may have no answer in its context (SQuAD v2.0).
    """

    name: str
    kind: Kind
    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...] = ()
    metric: str = "accuracy"
    no_answer: bool = False

    def __post_init__(self) -> None:
        columns = len(self.text_columns)
        if self.kind in ("classification", "regression") and columns not in (1, 2):
            raise UserError(f"task {self.name!r} has {columns} text columns: give one or two")
        if self.kind == "question_answering" and columns != 2:
            raise UserError(f"task {self.name!r} has {columns} text columns: give the question's and the context's")
        if self.kind == "multiple_choice" and (columns < 3 or columns != len(self.label_names) + 1):
            raise UserError(
                f"task {self.name!r} has {columns} text columns and {len(self.label_names)} names of choices: give the"
                " shared text's column and one for each of two or more choices"
            )
        if self.kind == "classification" and len(self.label_names) < 2:
            raise UserError(f"task {self.name!r} has {len(self.label_names)} class(es): classification needs two")
        if self.kind in ("regression", "question_answering") and self.label_names:
            raise UserError(f"task {self.name!r} is a {self.kind} and has label names: leave them out")
        if self.metric not in self.metrics:
            raise UserError(
                f"metric {self.metric!r} does not fit a {self.kind} task: choose one of {', '.join(self.metrics)}"
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics that apply, `metric` not necessarily first."""
        return METRICS[self.kind]

    @property
    def num_labels(self) -> int:
        """Classes or choices, or 1 where there are none."""
        return len(self.label_names) or 1

    @property
    def is_regression(self) -> bool:
        """Whether labels are real numbers."""
        return self.kind == "regression"

    @property
    def is_span(self) -> bool:
        """Whether the answer is a span of the second text."""
        return self.kind == "question_answering"

    @property
    def is_choice(self) -> bool:
        """Whether an input is several texts of which one is right."""
        return self.kind == "multiple_choice"

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
            **({"no_answer": True} if self.no_answer else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskSpec:
        """Inverse of `to_dict`."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class Gold:
    """Accepted answers to one question; none at all where the context does not answer it.

    Attributes:
        texts: as they stand in the context.
        starts: character at which each begins.
    """

    texts: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rows:
    """Texts and labels of one split.

    Attributes:
        texts: one list of N strings per text column.
        labels: [N] int64 class ids or float32 targets; None for unlabelled rows and for question answering.
        ids: names of the rows in their published file, for prediction files; None where there are none.
        golds: N entries for question answering with answers, otherwise None.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray | None = None
    ids: list[str] | None = None
    golds: list[Gold] | None = None

    def __post_init__(self) -> None:
        counts = {len(column) for column in self.texts}
        counts.update(len(part) for part in (self.labels, self.ids, self.golds) if part is not None)
        if len(counts) != 1:
            raise ValueError(f"columns of unequal length: {sorted(counts)}")

    def __len__(self) -> int:
        return len(self.texts[0])

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows at `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        texts = tuple([column[i] for i in indices.tolist()] for column in self.texts)
        return Rows(
            texts,
            None if self.labels is None else self.labels[indices],
            None if self.ids is None else [self.ids[i] for i in indices.tolist()],
            None if self.golds is None else [self.golds[i] for i in indices.tolist()],
        )

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


def join_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of several splits of one task, one after the other."""
    labels = [part.labels for part in parts if part.labels is not None]
    ids = [part.ids for part in parts if part.ids is not None]
    golds = [part.golds for part in parts if part.golds is not None]
    return Rows(
        tuple(
            [text for column in columns for text in column] for columns in zip(*(p.texts for p in parts), strict=True)
        ),
        np.concatenate(labels) if len(labels) == len(parts) else None,
        [name for names in ids for name in names] if len(ids) == len(parts) else None,
        [gold for answers in golds for gold in answers] if len(golds) == len(parts) else None,
    )
