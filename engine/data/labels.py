"""Raw label values of a column to class ids or targets.

Label columns come as text, integers, floats such as 1.0, booleans or class ids with names; every value is first turned
into one text key ("1", "1.0" and 1 all give "1"), so that train and dev may differ in type and still agree.

Chosen: one key per value and a table from key to id. Rejected: letting the file reader infer a type per file; the same
labels then read as 0/1 from one file and 0.0/1.0 or "0"/"1" from another.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.errors import UserError

MANY_VALUES = 20
"""Distinct values above which a column called `score` or `similarity` is a regression target even if all are whole."""

_SCORE_NAMES = ("score", "similarity")
_INTEGER = re.compile(r"[+-]?\d{1,15}(\.0*)?")
_NEGATION = re.compile(r"(not|non|no|un)[ _-]?")
_ABSENT_WORDS = {"nan", "none", "null", "na", "n/a"}
UNLABELLED = "-1"
"""Key that public data sets write where the label is withheld."""


def label_keys(values: Sequence[Any], where: str, allowed: Sequence[str] | None = None) -> list[str]:
    """One text key per value.

    Args:
        values: the raw column.
        where: the file, for messages.
        allowed: class names the user gave; a key among them is never taken for a missing label.

    Raises:
        UserError: a label is missing (empty, None, NaN or -1), with the row's number.
    """
    keys = [_key(value) for value in values]
    numeric = any(is_number(key) for key in keys)
    allowed = allowed or ()
    for row, (key, value) in enumerate(zip(keys, values, strict=True), start=1):
        absent = key == "" or (numeric and key.casefold() in _ABSENT_WORDS) or (key.casefold() == "nan")
        if key in allowed or not (absent or key == UNLABELLED):
            continue
        remedy = "remove the row or fill in its label"
        if key == UNLABELLED:
            remedy += ", or list every class in --data.label_names if -1 is one"
        raise UserError(f"{where}, data row {row}: the label is {value!r}, that is missing: {remedy}")
    return keys


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

    Raises:
        UserError: fewer than two classes, given names that do not cover the labels, or nearly a class per row.
    """
    counts = Counter(keys)
    if given:
        names = tuple(_key(name) for name in given)
        if len(set(names)) != len(names) or len(names) < 2:
            raise UserError(f"data.label_names {list(given)}: give two or more different names")
        unknown = [key for key in counts if key not in names]
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
        return tuple(sorted(counts, key=float))
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
        found = table.get(key)
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


def is_number(key: str) -> bool:
    """Whether the key reads as a finite number."""
    try:
        return math.isfinite(float(key)) and "_" not in key
    except ValueError:
        return False


def _key(value: Any) -> str:
    """Text key of one raw value; "" for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value).strip()
    return str(int(float(text))) if _INTEGER.fullmatch(text) else text


def _is_negation(name: str, other: str) -> bool:
    match = _NEGATION.match(name.casefold())
    return match is not None and name.casefold()[match.end() :] == other.casefold()
