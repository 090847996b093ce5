"""A task (`TaskSpec`) and what a kind of task is (`TaskHead`): everything that differs between one kind and another.

The kinds that are there live in `engine.tasks`, a file each, and are registered when `engine` is imported. Nothing else
in `engine` or `search` asks what kind a task is: it asks the task's head, `spec.head`.

How to add a kind: subclass `TaskHead` (or `engine.tasks.texts.TextsHead`, for texts with one answer each) in a file of
`engine.tasks`, and name it in `engine/tasks/__init__.py`. This file loads no framework, so that mistakes in files are
told at once; heads import torch and transformers inside their methods.

Rejected: a table by kind wherever one is needed; a new kind touches fifteen files.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.data.comparison import Comparison
from engine.data.results import Found, Measured, Predictions, Simple
from engine.data.rows import Rows
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.data.dataset import EncodedDataset

NEG_LOG_LOSS = "neg_log_loss"
"""Name, as scikit-learn's, of the mean log-likelihood of the gold classes: continuous where accuracy has steps."""


@dataclass(frozen=True)
class TaskSpec:
    """What is predicted from which columns, and the metric that ranks models.

    Attributes:
        name: short name for reports.
        kind: what is predicted: the name of a registered `TaskHead`.
        text_columns: one column, or two for a pair; of multiple choice the shared text and one column per choice.
        label_column: the column with the gold label.
        label_names: class names in id order, or those of the choices; () where there are no classes. Of two, the
            second is the positive class of F1.
        metric: one of `metrics`, the value that ranks models; higher is better.
        no_answer: question answering: whether a question may have no answer in its context (SQuAD v2.0).
    """

    name: str
    kind: str
    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...] = ()
    metric: str = "accuracy"
    no_answer: bool = False

    def __post_init__(self) -> None:
        self.head.check(self)
        if self.metric not in self.metrics:
            raise UserError(
                f"metric {self.metric!r} does not fit a {self.kind} task: choose one of {', '.join(self.metrics)}"
            )

    @property
    def head(self) -> TaskHead:
        """What is special about its kind."""
        return head_of(self.kind)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics that apply, `metric` not necessarily first."""
        return self.head.metrics

    @property
    def num_labels(self) -> int:
        """Classes or choices, or 1 where there are none."""
        return len(self.label_names) or 1

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
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


class TaskHead(Comparison):
    """One kind of task, from its labels to its predictions; how answers are compared is in `Comparison`. Heads hold no
    state: one instance serves all tasks.

    Names used below: B sequences or rows of a batch, S tokens, C outputs; *answers* are what `answer` makes of a
    model's outputs, *gold* is what `gold` gives.

    Attributes:
        kind: its name, as in `TaskSpec.kind`, words joined by `_`.
        metrics: names of the metrics that can rank models.
        from_table: whether a table with a label column can be such a task, so that `data.kind` may name it.
        from_files: whether it has files of its own (`reads`) of which `data.kind` may say that they are such a task.
        named_outputs: whether output c stands for `label_names[c]`, so that a loaded head is put into their order.
        pooled: whether a sequence has one answer [C], read from its pooled vector: candidates then share their work
            when scored, and tasks may be trained beside each other.
        inherits: whether strategy inherit serves it; needs `divergence` (or `rows_apart`).
        windows: whether texts longer than `data.max_length` are read in windows instead of cut.
        default_length: tokens of a sequence where `ffnas predict` is not told.
        most_rows: most sequences per forward pass of an evaluation; None: as many as the caller says.
        stratified: whether held-out rows have each class in its share.
        merged_as: what `merged` gives, in words.
        inferred_from: what a table's labels look like where the kind was found by them.
        kept: name of the array of `Measured.rows` in predictions files.
        label_dtype: of the gold labels in predictions files; None where those files hold none.
        suffixes: of the files `ffnas predict` writes.
    """

    kind: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    from_table: ClassVar[bool] = False
    from_files: ClassVar[bool] = False
    named_outputs: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    inherits: ClassVar[bool] = False
    windows: ClassVar[bool] = False
    default_length: ClassVar[int] = 128
    most_rows: ClassVar[int | None] = None
    stratified: ClassVar[bool] = False
    merged_as: ClassVar[str] = "most frequent"
    inferred_from: ClassVar[str] = "labels are words or whole numbers"
    kept: ClassVar[str] = "logits"
    label_dtype: ClassVar[type[np.generic] | None] = np.int64
    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".tsv", ".jsonl")

    @abstractmethod
    def check(self, spec: TaskSpec) -> None:
        """Raises `UserError` where columns or label names of the task do not fit the kind."""

    def choose_metric(self, num_labels: int, is_pair: bool, glue: str | None) -> tuple[str, str]:
        """The metric that ranks models where the user names none, and why; `glue`: the GLUE task the path names."""
        return self.metrics[0], f"the usual one for {self.kind.replace('_', ' ')}"

    def reads(self, source: str) -> bool:
        """Whether `data.train` names files that only this kind can read, in a way of its own (`read`)."""
        return False

    def read(self, config: Any, notes: list[str]) -> tuple[TaskSpec, Rows, Rows | None, Any]:
        """The task, its training rows, those of the dev file if any, and an `engine.data.task_data.Understood`.

        Args:
            config: an `engine.data.config.DataConfig` whose `train` this kind `reads`.
            notes: what was done to the data is added here, a line each.
        """
        raise NotImplementedError(f"{self.kind}: has no files of its own")

    def asked_rows(self, source: str, encoding: str, spec: TaskSpec) -> Rows:
        """The rows of a file that some kind `reads`, for a model of this one to answer; golds where it has them."""
        raise UserError(f"{source}: holds words with tags, and the model is for {self.kind}: give a table, or a tagger")

    def class_names(self, keys: Sequence[str], column: str, where: str, given: Sequence[str] | None) -> tuple[str, ...]:
        """Class names in id order, found in the labels of a table's training rows; () for kinds without classes.

        Args:
            keys: one label per row, as text (`engine.data.labels.label_keys`).
            column, where: name of the column and the file, for messages.
            given: names the user gave.
        """
        return ()

    def labels(self, keys: Sequence[str], spec: TaskSpec, where: str) -> np.ndarray:
        """[N] labels of a table's rows as numbers; raises `UserError` with the row's number where one does not fit."""
        raise UserError(f"{where}: a {self.kind} task is not read from a table: leave data.kind out")

    def check_labels(self, labels: np.ndarray, column: str, where: str) -> None:
        """Raises `UserError` where a table's training labels [N] leave nothing to learn."""

    def allowed(self, spec: TaskSpec, train: np.ndarray | None) -> tuple[str, ...]:
        """Labels of a dev file that are labels even if they look like a mark for a missing one, as -1 does."""
        return spec.label_names

    def merged(self, values: Sequence[Any]) -> Any:
        """The label (or gold, where rows have those) of several rows with one text: the most frequent, of equals the
        first."""
        return Counter(values).most_common(1)[0][0]

    def groups(self, rows: Rows) -> Sequence[str] | None:
        """[N] the group of each row, where rows of one group have to stay in one split; None where they need not."""
        return None

    def describe_labels(self, spec: TaskSpec, parts: Sequence[Rows]) -> str:
        """The labels of all splits in a few words."""
        return f"{sum(map(len, parts)):,} rows"

    def card_lines(self, spec: TaskSpec, labels: np.ndarray) -> list[str]:
        """Lines of the model card about the training labels [N]."""
        return []

    def sequences(self, texts: Sequence[Sequence[str]]) -> list[Sequence[Sequence[str]]]:
        """Text columns of the sequences that a row becomes: mostly one, with all of them."""
        return [texts]

    @abstractmethod
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
        """Rows as token arrays; arguments as of `engine.data.encode.encode_task`, which has checked `max_length`."""

    @abstractmethod
    def student_class(self) -> type[Any]:
        """Our model with this head, an `engine.student.modeling.FFNASPreTrainedModel`."""

    def auto_class(self) -> Any:
        """transformers' Auto class for it, which loads teachers."""
        import transformers

        return getattr(transformers, self.student_class().hand_over.auto)

    def config_fields(self, spec: TaskSpec) -> dict[str, Any]:
        """Fields of a model's configuration that say what its head answers."""
        return {}

    def own_fields(self, spec: TaskSpec) -> dict[str, Any]:
        """Further ones that only models of ours have."""
        return {}

    def headed(self, model: Any) -> Any:
        """A model of ours that was made of a transformers model, with the head that the kind wants."""
        return model

    def spec_of(self, config: Mapping[str, Any]) -> TaskSpec | None:
        """The task that a saved model answers, where its `config.json` alone tells it; None: it does not."""
        return None

    def answer_shape(self, spec: TaskSpec, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of a model's output for `rows` sequences of `columns` tokens; the teacher's is kept on disk so."""
        return (rows, spec.num_labels)

    @abstractmethod
    def answer(self, spec: TaskSpec, data: EncodedDataset, found: Found) -> Any:
        """Answers to the rows of `data`, which needs no labels.

        Raises:
            FloatingPointError: an output is NaN or infinite: the model has diverged.
        """

    def gold(self, rows: Rows) -> Any:
        """What answers to `rows` are compared with; None where there is nothing."""
        return rows.labels

    def gold_of(self, data: EncodedDataset) -> Any:
        """The same of encoded rows."""
        return data.labels

    @abstractmethod
    def score(
        self, spec: TaskSpec, answers: Any, gold: Any, *, kept: np.ndarray | None = None, threshold: float = 0.0
    ) -> Measured:
        """How good answers are.

        Args:
            answers: see `answer`.
            gold: of the same rows, or of those at `kept`.
            kept: [M] positions of the rows that have a label; None: all do.
            threshold: see `threshold`.
        """

    def threshold(self, spec: TaskSpec, answers: Callable[[], Any], gold: Any) -> float:
        """A decision that is made on the select split and not on dev (when to say "no answer"), 0 where there is none;
        `answers` gives those to the select split."""
        return 0.0

    def constant_score(self, spec: TaskSpec, data: EncodedDataset) -> float | None:
        """The task's metric of the best answer that looks at no text, which a head that is loaded has to beat before it
        is used without fine-tuning; None: such heads are always fine-tuned."""
        return None

    def row_metrics(self, spec: TaskSpec, predicted: np.ndarray, gold: np.ndarray) -> dict[str, float]:
        """Metrics of outputs [N, C] against labels [N], for kinds whose rows have one label each."""
        raise ValueError(f"a {self.kind} task has no metrics of rows")

    def kept_columns(self, spec: TaskSpec) -> int:
        """K."""
        return spec.num_labels

    def metric(self, spec: TaskSpec, rows: np.ndarray, labels: np.ndarray | None) -> float:
        """The task's metric, from what is kept of each row and the labels in the predictions file."""
        if labels is None:
            raise ValueError(f"labels: needed for a {self.kind} task")
        return self.row_metrics(spec, rows, labels)[spec.metric]

    @abstractmethod
    def resampled(self, spec: TaskSpec, rows: np.ndarray, labels: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
        """[R] the task's metric on resamples; `counts` [R, N] says how often each holds each row."""

    def shown(self, spec: TaskSpec, rows: np.ndarray, dev: Rows, *, samples: bool, seed: int) -> dict[str, Any]:
        """The answers for people, as `engine.evaluation.shown` describes it; {} for none."""
        return {}

    def simple_models(self) -> Simple | None:
        """Models that need no network, for comparison; None: there are none."""
        return None

    @abstractmethod
    def predictions(
        self, spec: TaskSpec, key: str, names: Sequence[Any], answers: Any, *, every: bool, threshold: float
    ) -> Predictions:
        """What is written of answers.

        Args:
            key: what the names of rows are called.
            names: of the rows.
            answers, threshold: see `score`.
            every: also what was not chosen: the probabilities of all classes.
        """

    def table_gold(
        self, spec: TaskSpec, keys: Sequence[str], kept: np.ndarray, raw: Sequence[Any], column: str, where: str
    ) -> tuple[np.ndarray, str]:
        """Labels of a table that was answered, as the model numbers them, and a line on how they were taken ("").

        Args:
            keys: labels as text, of the rows at `kept`.
            kept: [M] their positions.
            raw: the whole column, as it was read.
            column, where: names for messages.
        """
        return self.labels(keys, spec, where), ""


_HEADS: dict[str, TaskHead] = {}


def register(head: TaskHead) -> None:
    """Makes a kind of task known; one of the same name is replaced."""
    _HEADS[head.kind] = head


def head_of(kind: str) -> TaskHead:
    """The head of that kind.

    Raises:
        UserError: there is none.
    """
    if kind not in _HEADS:
        raise UserError(f"task kind {kind!r} is not known: choose one of {', '.join(_HEADS)}")
    return _HEADS[kind]


def heads() -> tuple[TaskHead, ...]:
    """All kinds of tasks, in the order they were registered."""
    return tuple(_HEADS.values())
