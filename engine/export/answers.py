"""The parts of a model card that show answers: class by class, and some rows of dev, right and wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.export.markdown import plain, table

MOST_CLASSES = 30
"""Rows of the table of classes; of more classes those with the lowest F1."""


def answers_section(answers: Mapping[str, Any], split: str) -> str:
    """Markdown of a model's answers.

    Args:
        answers: as `engine.evaluation.shown` makes them; all parts are optional.
        split: that they are of.
    """
    parts = [_classes(answers, split), _values(answers, split), _samples(answers, split), _errors(answers, split)]
    return "\n\n".join(part for part in parts if part)


def _classes(answers: Mapping[str, Any], split: str) -> str:
    classes = answers.get("classes") or []
    if not classes:
        return ""
    shown = classes
    if len(classes) > MOST_CLASSES:
        worst = {id(c) for c in sorted(classes, key=lambda c: c["f1"])[:MOST_CLASSES]}
        shown = [c for c in classes if id(c) in worst]
    left_out = f" The {len(shown)} of {len(classes)} classes with the lowest F1." if len(shown) < len(classes) else ""
    rows = [
        [plain(c["label"]), *(f"{c[name]:.3f}" for name in ("precision", "recall", "f1")), f"{c['support']:,}"]
        for c in shown
    ]
    return "\n".join(
        [
            "## Class by class",
            "",
            f"On {plain(split)}. Precision: how many of its answers of this class are right; recall: how many rows of"
            f" this class it finds.{left_out}",
            "",
            *table(["class", "precision", "recall", "F1", "rows"], rows),
        ]
    )


def _values(answers: Mapping[str, Any], split: str) -> str:
    values = answers.get("values")
    if not values:
        return ""
    rows = [[plain(name), f"{value:.4f}"] for name, value in values.items()]
    return "\n".join(["## Agreement with the labels", "", *table([f"on {plain(split)}", ""], rows)])


def _samples(answers: Mapping[str, Any], split: str) -> str:
    samples = answers.get("samples")
    if not samples:
        return ""
    lines = ["## Sample answers", ""]
    for kind, told in (("right", "Right, drawn at random"), ("wrong", "Wrong, those it was most sure of")):
        rows = [
            [*map(plain, row["texts"]), plain(row["gold"]), f"{plain(row['answer'])} ({row['probability']:.2f})"]
            for row in samples.get(kind, ())
        ]
        if rows:
            columns = [f"text {n + 1}" if len(rows[0]) > 3 else "text" for n in range(len(rows[0]) - 2)]
            lines += [f"{told} (rows of {plain(split)}):", "", *table([*columns, "label", "its answer"], rows), ""]
    return "\n".join(lines) if len(lines) > 2 else ""


def _errors(answers: Mapping[str, Any], split: str) -> str:
    errors = answers.get("largest_errors") or []
    if not errors:
        return ""
    rows = [[*map(plain, row["texts"]), f"{row['gold']:.3g}", f"{row['answer']:.3g}"] for row in errors]
    count = len(rows[0]) - 2
    columns = [f"text {n + 1}" if count > 1 else "text" for n in range(count)]
    return "\n".join(
        ["## Largest errors", "", f"Rows of {plain(split)}.", "", *table([*columns, "label", "its answer"], rows)]
    )
