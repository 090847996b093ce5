"""Published tasks by name: GLUE, SQuAD, SWAG and RACE, in the files they are published as or from the hub.

`glue/cola` ... `glue/wnli`, `glue/ax` (diagnostics, test only), `squad`, `squad_v2`, `swag`, `race`, `race/middle`,
`race/high`. A task knows the layout of its folder, its columns, its classes in the order of their ids (those of the
hub's data sets), the metric that ranks models, and how a GLUE submission names its file.

Chosen: one table. Rejected: one reader class per task; eight of the nine GLUE files differ in a column name only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from engine.data.columns import GLUE_METRICS
from engine.data.task import TaskSpec
from engine.errors import UserError

_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class PublishedTask:
    """How a task is published.

    Attributes:
        name: as the user writes it.
        kind: of the task.
        reader: of its files.
        folder: of its files below `data.dir`, as published ("" and any case also do).
        files: file (or folder) of each split, below `folder`.
        hub: data set on the hub, as NAME[:CONFIG].
        texts: text columns of the files, or positions where a file has no header.
        label: label column, or its position.
        classes: class names in id order.
        values: the classes as the files write them, in id order; () where they are the names.
        submission: GLUE submission file of each test split.
        header: whether train and dev files have a header line.
    """

    name: str
    kind: str = "classification"
    reader: Literal["glue", "squad", "swag", "race"] = "glue"
    folder: str = ""
    files: dict[str, str] = field(default_factory=dict)
    hub: str = ""
    texts: tuple[str, ...] = ("sentence1", "sentence2")
    label: str = "label"
    classes: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    submission: dict[str, str] = field(default_factory=dict)
    header: bool = True

    @property
    def spec(self) -> TaskSpec:
        """What is predicted; columns under plain names."""
        short = self.name.split("/")[-1]
        if self.reader == "squad":
            return TaskSpec(
                self.name, self.kind, ("question", "context"), "answers", metric="f1", no_answer=short.endswith("v2")
            )
        if self.reader in ("swag", "race"):
            columns = ("text", *(f"choice{i}" for i in range(len(self.classes))))
            return TaskSpec(self.name, self.kind, columns, "label", self.classes)
        columns = ("sentence",) if len(self.texts) == 1 else ("sentence1", "sentence2")
        return TaskSpec(self.name, self.kind, columns, "label", self.classes, GLUE_METRICS.get(short, "accuracy"))

    @property
    def further(self) -> tuple[str, ...]:
        """Splits beside `dev` that are only reported."""
        return tuple(name for name in self.files if name.startswith("dev_"))

    @property
    def tests(self) -> tuple[str, ...]:
        """Unlabelled splits."""
        return tuple(name for name in self.files if name.startswith("test"))


def _glue(name: str, folder: str, **options: Any) -> PublishedTask:
    files = {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"}
    return PublishedTask(
        **{
            "name": f"glue/{name}",
            "folder": folder,
            "files": files,
            "hub": f"nyu-mll/glue:{name}",
            "submission": {"test": f"{folder}.tsv"},
            **options,
        }
    )


def _race(name: str, hub: str, level: str) -> PublishedTask:
    files = {split: f"{split}/{level}".rstrip("/") for split in ("train", "dev", "test")}
    letters = ("A", "B", "C", "D")
    return PublishedTask(name, "multiple_choice", "race", "RACE", files, hub, classes=letters)


def _squad(name: str, version: str) -> PublishedTask:
    files = {"train": f"train-{version}.json", "dev": f"dev-{version}.json"}
    return PublishedTask(name, "question_answering", "squad", "SQuAD", files, f"rajpurkar/{name}")


_BINARY = ("0", "1")
_MNLI_FILES = {
    "train": "train.tsv",
    "dev": "dev_matched.tsv",
    "dev_mismatched": "dev_mismatched.tsv",
    "test": "test_matched.tsv",
    "test_mismatched": "test_mismatched.tsv",
}

_ALL = (
    _glue(
        "cola",
        "CoLA",
        texts=("sentence",),
        classes=("unacceptable", "acceptable"),
        values=_BINARY,
        header=False,
    ),
    _glue("sst2", "SST-2", texts=("sentence",), classes=("negative", "positive"), values=_BINARY),
    _glue(
        "mrpc",
        "MRPC",
        texts=("#1 String", "#2 String"),
        label="Quality",
        classes=("not_equivalent", "equivalent"),
        values=_BINARY,
    ),
    _glue(
        "qqp",
        "QQP",
        texts=("question1", "question2"),
        label="is_duplicate",
        classes=("not_duplicate", "duplicate"),
        values=_BINARY,
    ),
    _glue("stsb", "STS-B", kind="regression", label="score"),
    _glue(
        "mnli",
        "MNLI",
        label="gold_label",
        classes=_NLI,
        files=_MNLI_FILES,
        submission={"test": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
    ),
    _glue("qnli", "QNLI", texts=("question", "sentence"), classes=_ENTAILMENT),
    _glue("rte", "RTE", classes=_ENTAILMENT),
    _glue("wnli", "WNLI", classes=("not_entailment", "entailment"), values=_BINARY),
    _glue("ax", "AX", classes=_NLI, files={"test": "diagnostic.tsv"}),
    _squad("squad", "v1.1"),
    _squad("squad_v2", "v2.0"),
    PublishedTask(
        "swag",
        "multiple_choice",
        "swag",
        "SWAG",
        {"train": "train.csv", "dev": "val.csv", "test": "test.csv"},
        "allenai/swag:regular",
        classes=("0", "1", "2", "3"),
    ),
    _race("race", "ehovy/race:all", ""),
    _race("race/middle", "ehovy/race:middle", "middle"),
    _race("race/high", "ehovy/race:high", "high"),
)

TASKS = {task.name: task for task in _ALL}
"""Published tasks by name."""

GLUE_TASKS = tuple(name for name in TASKS if name.startswith("glue/") and name != "glue/ax")
"""The nine tasks of the GLUE score."""


def published(name: str) -> PublishedTask:
    """The task of that name.

    Raises:
        UserError: there is none.
    """
    if name not in TASKS:
        raise UserError(f"data.task {name!r} is not known: choose one of {', '.join(TASKS)}")
    return TASKS[name]
