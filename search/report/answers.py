"""The found model's answers in the report: class by class, a picture of confusions, rows of dev. From summary.json.

Runs from before these were kept, and tasks without classes or numbers, have none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError
from search.report.fields import field_of
from search.report.theme import INK, WIDTH, figure, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PREFIX = "evidence.answers."


@dataclass(frozen=True)
class ClassScores:
    """One class of the table."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Row:
    """A row of dev: its texts, its label and the model's answer, for people."""

    texts: tuple[str, ...]
    gold: str
    answer: str


@dataclass(frozen=True)
class Answers:
    """What summary.json holds under "evidence.answers" (`engine.evaluation.shown`).

    Attributes:
        classes: in the order of their ids.
        confusion: rows of each label that got each answer, [] where not kept.
        values: correlations and errors of regression, by name.
        right, wrong, errors: rows.
    """

    classes: list[ClassScores]
    confusion: list[list[int]]
    values: dict[str, float]
    right: list[Row]
    wrong: list[Row]
    errors: list[Row]

    @property
    def columns(self) -> int:
        """Texts of a row."""
        return max((len(row.texts) for row in (*self.right, *self.wrong, *self.errors)), default=0)


def read_answers(path: Path, evidence: Mapping[str, Any]) -> Answers | None:
    """The answers in a summary's evidence, None where it has none; `path` is what errors name.

    Raises:
        UserError: a part is damaged.
    """
    if not evidence.get("answers"):
        return None
    raw = field_of(path, evidence, "answers", dict, "evidence.")
    samples = field_of(path, raw, "samples", dict, _PREFIX) if raw.get("samples") else {}
    values = field_of(path, raw, "values", dict, _PREFIX) if raw.get("values") else {}
    classes = [_class(path, entry) for entry in _list(path, raw, "classes")]
    return Answers(
        classes=classes,
        confusion=_confusion(path, raw, len(classes)),
        values={str(name): field_of(path, values, name, float, f"{_PREFIX}values.") for name in values},
        right=[_row(path, row, "samples.right.") for row in _list(path, samples, "right")],
        wrong=[_row(path, row, "samples.wrong.") for row in _list(path, samples, "wrong")],
        errors=[_row(path, row, "largest_errors.") for row in _list(path, raw, "largest_errors")],
    )


def _list(path: Path, parent: Any, name: str) -> list[Any]:
    found: list[Any] = field_of(path, parent, name, list, _PREFIX) if parent.get(name) is not None else []
    return found


def _class(path: Path, raw: Any) -> ClassScores:
    prefix = f"{_PREFIX}classes."
    precision, recall, f1 = (field_of(path, raw, name, float, prefix) for name in ("precision", "recall", "f1"))
    label, support = field_of(path, raw, "label", str, prefix), field_of(path, raw, "support", int, prefix)
    return ClassScores(label, precision, recall, f1, support)


def _confusion(path: Path, raw: Mapping[str, Any], classes: int) -> list[list[int]]:
    table = _list(path, raw, "confusion")
    square = all(isinstance(row, list) and len(row) == classes for row in table) and len(table) in (0, classes)
    if not square or not all(isinstance(n, int) and not isinstance(n, bool) for row in table for n in row):
        raise UserError(f"{path}: {_PREFIX}confusion: must be {classes} lists of {classes} whole numbers")
    return table


def _row(path: Path, raw: Any, where: str) -> Row:
    prefix = _PREFIX + where
    texts = tuple(map(str, field_of(path, raw, "texts", list, prefix)))
    if isinstance(raw.get("gold"), str):
        answer = field_of(path, raw, "answer", str, prefix)
        sure = field_of(path, raw, "probability", float, prefix)
        return Row(texts, raw["gold"], f"{answer} ({sure:.2f})")
    gold, answer = (field_of(path, raw, name, float, prefix) for name in ("gold", "answer"))
    return Row(texts, f"{gold:.3g}", f"{answer:.3g}")


def confusions(answers: Answers | None) -> Figure | None:
    """Counts of labels (rows) and answers (columns), shaded by the share of a label's rows."""
    if answers is None or not answers.confusion:
        return None
    names, table = [shorten(c.label, 24) for c in answers.classes], answers.confusion
    shares = [[n / max(1, sum(row)) for n in row] for row in table]
    side = min(WIDTH, 2.4 + 0.55 * len(names))
    made = figure(WIDTH, side)  # as wide as the others, or the page would blow a small one up
    panel = made.subplots()
    panel.set_anchor("W")
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(table):
        for x, count in enumerate(row):
            color = "white" if shares[y][x] > 0.6 else INK
            panel.text(x, y, f"{count:,}", ha="center", va="center", fontsize=8.5, color=color)
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right")
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel("the model's answer")
    panel.set_ylabel("label")
    panel.grid(visible=False)
    panel.tick_params(length=0)
    return made
