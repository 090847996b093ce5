"""Raw label values of a column to class ids or targets.

Labels are texts exactly as written, outer white space aside: 007, 7 and 7.0 are three classes. Only where every label
of the training data is a whole number in plain spelling (0, 12, -3, or 1.0, as tables with gaps write it) are they
numbers, and "1", "1.0" and 1 the same; so train and dev may differ in type and still agree. What is no text or number
(a list, bytes, a date) is refused.

Rejected: letting the file reader infer a type per file; the same labels then read as 0/1 from one file and 0.0/1.0 or
"0"/"1" from another.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from engine.data.sources import as_text, not_a_word
from engine.errors import UserError

MANY_VALUES = 20
"""Distinct values above which a column called `score` or `similarity` is a regression target even if all are whole."""

_SCORE_NAMES = ("score", "similarity")
_INTEGER = re.compile(r"[+-]?\d{1,15}(\.0*)?")
_PLAIN_INTEGER = re.compile(r"(0|-?[1-9]\d{0,14})(\.0*)?")
_LIST = re.compile(r"\[.*\]", re.DOTALL)
_NEGATION = re.compile(r"(not|non|no|un)[ _-]?")
_ABSENT_WORDS = {"nan", "none", "null", "na", "n/a"}
WITHHELD, NO_GOLD = "-1", "-"
"""What public data sets write where the label is withheld, and where annotators did not agree."""

LEAVE_OUT = "fill it in, or leave such rows out with --data.drop_unlabelled true"


def label_texts(values: Sequence[Any], where: str, column: str, allowed: Collection[str] = ()) -> list[str]:
    """One text per value, as written; "" for None and NaN.

    Args:
        values: the raw column.
        where: the file, for messages.
        column: its name, for messages.
        allowed: class names the user gave.

    Raises:
        UserError: a value is no text or number, or every one is a list written as text, with the row's number.
    """
    texts = []
    for row, value in enumerate(values, start=1):
        if value is None or value != value:
            texts.append("")
            continue
        problem = None if isinstance(value, str) else not_a_word(value)
        if problem is not None:
            if isinstance(value, (Sequence, set)) and not isinstance(value, (bytes, bytearray, memoryview)):
                problem = _SEVERAL
            raise UserError(f"{where}, data row {row}: label column {column!r} holds {problem}")
        texts.append(as_text(value).strip())
    if texts and not allowed and all(_LIST.fullmatch(text) for text in texts):
        raise UserError(f"{where}, data row 1: label column {column!r} holds {texts[0][:40]!r}, {_SEVERAL}")
    return texts


_SEVERAL = (
    "a list: a multi-label task, which is not served: give a column with one label per text (--data.label_column),"
    " and search each label by itself"
)


def unlabelled(keys: Sequence[str], allowed: Collection[str] = ()) -> list[int]:
    """Positions of the keys that stand for no label.

    Empty ones and NaN; words such as `none` among numbers; `-`, unless `+` is a label too; -1, unless other negative
    numbers are. A key among `allowed` is a label in any case.
    """
    present = set(keys)
    numbers = [float(key) for key in present if is_number(key)]
    marks = {key for key in present if key.casefold() in ("", "nan")}
    if numbers:
        marks |= {key for key in present if key.casefold() in _ABSENT_WORDS}
    if "+" not in present:
        marks.add(NO_GOLD)
    if all(number >= 0 or number == -1 for number in numbers):
        marks |= {key for key in present if canonical(key) == WITHHELD}
    marks -= {key for key in present if key in allowed or canonical(key) in allowed}
    return [row for row, key in enumerate(keys) if key in marks]


def label_keys(
    values: Sequence[Any], where: str, allowed: Collection[str] = (), column: str = "label", remedy: str = LEAVE_OUT
) -> list[str]:
    """`label_texts` of a column in which every row has a label.

    Raises:
        UserError: as there; or a label is missing (`unlabelled`), with the row's number and how many are.
    """
    keys = label_texts(values, where, column, allowed)
    missing = unlabelled(keys, allowed)
    if not missing:
        return keys
    key, row = keys[missing[0]], missing[0] + 1
    if key:
        remedy += f", or list every class in --data.label_names if {key} is one"
    raise UserError(
        f"{where}, data row {row}: the label is {values[missing[0]]!r}, that is missing ({len(missing):,} of"
        f" {len(keys):,} rows): {remedy}"
    )


def canonical(key: str) -> str:
    """A plainly written whole number without `.0`; any other key as it is."""
    return key.partition(".")[0] if _PLAIN_INTEGER.fullmatch(key) else key


def infer_kind(keys: Sequence[str], column: str, given: str) -> str:
    """`classification` or `regression`; see `DataConfig.kind`."""
    if given != "auto":
        return given
    if not all(is_number(key) for key in keys):
        return "classification"
    if not all(_INTEGER.fullmatch(key) for key in keys):
        return "regression"
    named_score = column.strip().casefold() in _SCORE_NAMES
    return "regression" if named_score and len(set(keys)) > MANY_VALUES else "classification"


def class_names(keys: Sequence[str], column: str, where: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """Class names in id order: as given; numbers by value; text by alphabet, a negated one ("not_x") before "x".

    Where all are whole numbers in plain spelling, "1" and "1.0" are one class.

    Raises:
        UserError: fewer than two classes, given names that do not cover the labels, or nearly a class per row.
    """
    if not given and all(_PLAIN_INTEGER.fullmatch(key) for key in set(keys)):
        keys = [canonical(key) for key in keys]
    counts = Counter(keys)
    if given:
        names = tuple(str(name).strip() for name in given)
        if len(set(names)) != len(names) or len(names) < 2:
            raise UserError(f"data.label_names {list(given)}: give two or more different names")
        unknown = [key for key in counts if key not in names and canonical(key) not in names]
        if unknown:
            raise UserError(f"{where}: label {unknown[0]!r} is not in data.label_names {list(names)}: add it")
        return names
    if len(counts) < 2:
        only = next(iter(counts))
        raise UserError(f"{where}: every label in column {column!r} is {only!r}: classification needs two classes")
    if len(counts) > max(MANY_VALUES, len(keys) // 2):
        raise UserError(
            f"{where}: column {column!r} has {len(counts)} different labels in {len(keys)} rows: choose another with "
            "--data.label_column, or --data.kind regression"
        )
    if all(is_number(key) for key in counts):
        return tuple(sorted(counts, key=lambda key: (float(key), key)))
    names = tuple(sorted(counts))
    if len(names) == 2 and _is_negation(names[1], names[0]):
        return (names[1], names[0])
    return names


def class_ids(keys: Sequence[str], names: Sequence[str], where: str) -> np.ndarray:
    """[N] int64 ids of `keys` in `names`.

    Raises:
        UserError: a key that is no class of the training data, with the row's number.
    """
    table = {name: i for i, name in enumerate(names)}
    ids = np.empty(len(keys), dtype=np.int64)
    for row, key in enumerate(keys):
        found = table.get(key, table.get(canonical(key)))
        if found is None:
            known = ", ".join(map(repr, names[:12]))
            raise UserError(
                f"{where}, data row {row + 1}: label {key!r} does not occur in the training data (labels: {known}): "
                "correct it or add such rows to the training data"
            )
        ids[row] = found
    return ids


def targets(keys: Sequence[str], column: str, where: str) -> np.ndarray:
    """[N] float32 regression targets.

    Raises:
        UserError: a value that is not a finite number, with the row's number.
    """
    for row, key in enumerate(keys, start=1):
        if not is_number(key):
            raise UserError(
                f"{where}, data row {row}: {column!r} is {key!r}, not a finite number: correct it, or choose "
                "--data.kind classification"
            )
    return np.array([float(key) for key in keys], dtype=np.float32)


def model_class_ids(
    keys: list[str], kept: np.ndarray, raw: Sequence[Any], where: str, names: tuple[str, ...]
) -> tuple[np.ndarray, str]:
    """Ids of labels that are names of a model's classes, but for case, or their numbers.

    Args:
        keys: labels as text, of the rows at `kept` of the column `raw`.
        where: the file, for messages.
        names: of the model's classes.

    Returns:
        [N] int64, and a line on how numbers were taken ("" for names).

    Raises:
        UserError: a label is neither, with the number of its row.
    """
    table = {name: i for i, name in enumerate(names)}
    folded = {name.casefold(): i for i, name in enumerate(names)}
    if len(folded) == len(names):
        table = {**{name.casefold(): i for name, i in table.items()}, **table}
        keys = [key if key in table else key.casefold() for key in keys]
    found = [table.get(key, table.get(canonical(key))) for key in keys]
    if None not in found:
        return np.array(found, dtype=np.int64), ""
    numbers = {str(i): i for i in range(len(names))}
    found = [numbers.get(canonical(key)) for key in keys]
    if None not in found and not any(is_number(name) for name in names):
        return np.array(found, dtype=np.int64), f"labels 0 to {len(names) - 1} are taken for {', '.join(names)}"
    wrong = next(i for i, key in enumerate(keys) if key not in table and canonical(key) not in table)
    row = int(kept[wrong])
    raise UserError(
        f"{where}, data row {row + 1}: label {raw[row]!r} is none of the model's"
        f" ({', '.join(map(repr, names[:12]))}): correct it, or name another column with --label-column"
    )


def is_number(key: str) -> bool:
    """Whether the key reads as a finite number."""
    try:
        return math.isfinite(float(key)) and "_" not in key
    except ValueError:
        return False


def _is_negation(name: str, other: str) -> bool:
    match = _NEGATION.match(name.casefold())
    return match is not None and name.casefold()[match.end() :] == other.casefold()
