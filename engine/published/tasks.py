"""What the published code knows of its tasks: their names, the order of their classes, their place among several heads.

Classes are those of `engine.data.catalog`, in the same order for every task but MNLI, whose published order is
alphabetical. A checkpoint of several tasks numbers its heads; WNLI has none there and takes QNLI's.
"""

from __future__ import annotations

from engine.data.catalog import TASKS, PublishedTask

MNLI_CLASSES = ("contradiction", "entailment", "neutral")

HEADS = ("glue/mnli", "glue/qqp", "glue/qnli", "glue/sst2", "glue/cola", "glue/stsb", "glue/mrpc", "glue/rte")
"""Tasks of a multi-task checkpoint by the number of their head, `classifiers.N`."""

BORROWED = {"glue/wnli": "glue/qnli"}
"""Tasks without a head of their own, and whose they take."""

_NAMES = {"mnlimm": "glue/mnli", "squad11": "squad", "squad1": "squad", "squad20": "squad_v2", "squad2": "squad_v2"}

KINDS = {
    "classification": "classification",
    "regression": "classification",
    "question_answering": "question-answering",
    "multiple_choice": "multiple-choice",
}
"""Our kinds of tasks, and the kind of model that serves them."""


def known_task(name: str | None) -> PublishedTask | None:
    """The task of a published name (`sst-2`, `mnli-mm`, `squad2.0`) or one of ours (`glue/sst2`); None: not known."""
    if name is None:
        return None
    if name in TASKS:
        return TASKS[name]
    plain = name.casefold().replace("-", "").replace(".", "")
    found = _NAMES.get(plain) or (f"glue/{plain}" if f"glue/{plain}" in TASKS else plain)
    return TASKS.get(found)


def classes(task: PublishedTask) -> tuple[str, ...]:
    """Names of a classification's classes in the order of the published checkpoints' outputs."""
    return MNLI_CLASSES if task.name in ("glue/mnli", "glue/ax") else task.classes


def head_of(task: PublishedTask) -> str | None:
    """N of `classifiers.N` that answers a task; None where no head does."""
    name = BORROWED.get(task.name, task.name)
    return str(HEADS.index(name)) if name in HEADS else None
