"""Which columns hold the text and the label, and which metric ranks models on the task.

Chosen: short ordered lists of the names public data sets use, and an error listing the columns when none matches.
Rejected: guessing from the content (longest strings, fewest distinct values); it is right until it is silently wrong.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import PurePath

from engine.errors import UserError

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("sentence_a", "sentence_b"),
    ("s1", "s2"),
    ("query", "passage"),
)
"""Column names of pairs, first match wins. SQuAD's (question, context) is left out: its label is a span."""

SINGLES = (
    "sentence",
    "text",
    "content",
    "review",
    "question",
    "premise",
    "sentence1",
    "tweet",
    "comment",
    "message",
    "document",
    "body",
    "utterance",
)
"""Column names of single texts, first match wins."""

LABELS = (
    "label",
    "labels",
    "gold_label",
    "sentiment",
    "class",
    "category",
    "target",
    "score",
    "similarity",
    "rating",
    "stars",
    "is_duplicate",
    "quality",
    "y",
)
"""Column names of labels, first match wins."""

IDS = ("id", "idx", "guid")
"""Column names that say which row is which, first match wins."""

GLUE_METRICS = {
    "cola": "mcc",
    "sst2": "accuracy",
    "mrpc": "f1",
    "qqp": "f1",
    "stsb": "pearson",
    "mnli": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
    "wnli": "accuracy",
}
"""GLUE tasks and the metric that ranks models on each."""


def find_text_columns(columns: Sequence[str], wanted: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """The wanted columns after a check, or the first known pair or single name among `columns`.

    Raises:
        UserError: a wanted column is not there, or no known name is.
    """
    if wanted:
        for name in wanted:
            require_column(name, columns, where, "data.text_columns")
        return tuple(wanted)
    for pair in PAIRS:
        found = [_find(name, columns) for name in pair]
        if None not in found:
            return tuple(found)  # type: ignore[arg-type]
    for name in SINGLES:
        match = _find(name, columns)
        if match is not None:
            return (match,)
    raise UserError(f"{where}: no text column among {_listing(columns)}: name it with --data.text_columns")


def find_label_column(columns: Sequence[str], wanted: str | None, texts: Sequence[str], where: str) -> str:
    """The wanted column after a check, or the first known label name among `columns` that holds no text.

    Raises:
        UserError: the wanted column is not there or is a text column, or no known name is there.
    """
    if wanted is not None:
        require_column(wanted, columns, where, "data.label_column")
        if wanted in texts:
            raise UserError(f"data.label_column {wanted!r} is a text column too: choose another")
        return wanted
    found = known_column(LABELS, columns, texts)
    if found is None:
        raise UserError(f"{where}: no label column among {_listing(columns)}: name it with --data.label_column")
    return found


def known_column(names: Sequence[str], columns: Sequence[str], others: Collection[str] = ()) -> str | None:
    """The column with the first of `names` that occurs among `columns`, those in `others` left aside; None if none
    does."""
    rest = [c for c in columns if c not in others]
    return next((match for name in names if (match := _find(name, rest)) is not None), None)


def require_column(name: str, columns: Sequence[str], where: str, option: str) -> None:
    """Raise `UserError` with the nearest names unless `name` is one of `columns`."""
    if name in columns:
        return
    folded = {c.strip().casefold(): c for c in columns}
    near = [folded[m] for m in difflib.get_close_matches(name.strip().casefold(), list(folded), n=3, cutoff=0.6)]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "choose one of them"
    raise UserError(f"{option} {name!r}: {where} has no such column, it has {_listing(columns)}: {hint}")


def glue_task(source: str | None) -> str | None:
    """The GLUE task that a path's file or folder name, or a hub name or configuration, stands for."""
    if source is None:
        return None
    for part in reversed(PurePath(source.split("@")[0]).parts[-2:]):
        words = re.split(r"[^a-z0-9]+", part.casefold())
        joined = ["".join(two) for two in itertools.pairwise(words)]
        for word in [*words, *joined]:
            if word in GLUE_METRICS:
                return word
    return None


def _find(name: str, columns: Sequence[str]) -> str | None:
    """The column equal to `name` but for case and surrounding white space."""
    for column in columns:
        if column.strip().casefold() == name:
            return column
    return None


def _listing(columns: Sequence[str]) -> str:
    shown = ", ".join(map(repr, columns[:12]))
    return shown + (f" and {len(columns) - 12} more" if len(columns) > 12 else "")
