"""What `ffnas predict` is asked: rows of a table, texts given one by one, a published split; read without a framework.

A mistake in a file is told before the model is looked for. Labels in a table are only compared with the answers, and
may be missing; a column that was found by its name and holds no labels of the model is left alone with a line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.columns import (
    IDS,
    LABELS,
    find_text_columns,
    glue_task,
    known_column,
    require_column,
)
from engine.data.config import words
from engine.data.labels import label_texts, unlabelled
from engine.data.published_files import find_split, read_split
from engine.data.rows import Rows
from engine.data.sources import as_text, read_table
from engine.data.task import TaskSpec
from engine.errors import UserError
from search.console.arguments import reading

if TYPE_CHECKING:
    from engine.data.catalog import PublishedTask


@dataclass(frozen=True)
class Asked:
    """Rows to answer.

    Attributes:
        name: what messages call them.
        rows: texts; labels where all rows have one.
        key: header of what names a row: `row`, `id`, or the id column's own.
        names: the name of every row; those of a table without ids are counted from 1, as in messages about files.
        columns: text columns of a table, () where there is none.
        labels: raw values of a table's label column, None where there is none.
        label_column: its name.
        insist: whether the label column was named by the user.
    """

    name: str
    rows: Rows
    key: str
    names: list[str]
    columns: tuple[str, ...] = ()
    labels: list[Any] | None = None
    label_column: str = ""
    insist: bool = False


def given_texts(texts: Sequence[str]) -> Asked:
    """Texts of the command line."""
    return Asked("texts", Rows((list(texts),)), "row", [str(i) for i in range(1, len(texts) + 1)])


def piped_texts(encoding: str) -> Asked:
    """One text a line of standard input, named by its line; blank lines are left out.

    Raises:
        UserError: a terminal, no text at all, or another encoding.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("nothing to answer: give --data FILE, texts behind the model, or lines on standard input")
    try:
        lines = sys.stdin.buffer.read().decode(encoding).replace("\r\n", "\n").split("\n")
    except (UnicodeDecodeError, LookupError) as error:
        raise UserError(f"standard input: {error}: say how it is written with --encoding") from error
    numbered = [(str(number), line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError("standard input: no text in it: write one text a line, or give --data FILE")
    return Asked("standard input", Rows(([line for _, line in numbered],)), "row", [number for number, _ in numbered])


def table_rows(options: argparse.Namespace) -> Asked:
    """Rows of a table, with the names its id column gives them and its labels, where it has such columns.

    Raises:
        UserError: not readable, or a column that is named is not there.
    """
    table = read_table(options.data, **reading(options))
    wanted = words(options.text_columns) if options.text_columns else None
    columns = find_text_columns(table.columns, wanted, options.data)
    for name, option in ((options.id_column, "--id-column"), (options.label_column, "--label-column")):
        if name is not None:
            require_column(name, table.columns, options.data, option)
    key = options.id_column or known_column(IDS, table.columns, columns)
    label = options.label_column or known_column(LABELS, table.columns, (*columns, *([key] if key else [])))
    return Asked(
        options.data,
        Rows(tuple(table.texts(column) for column in columns)),
        key or "row",
        [str(i) for i in range(1, len(table) + 1)] if key is None else [as_text(v) for v in table.values(key)],
        columns,
        None if label is None else table.values(label),
        label or "",
        options.label_column is not None,
    )


def published_rows(task: PublishedTask, name: str, options: argparse.Namespace) -> Asked:
    """The rows of a split of a published task; gold labels of a test split are never read.

    Raises:
        UserError: no such split, or its file is not there or not as published.
    """
    if name not in task.files:
        raise UserError(f"--split {name!r}: {task.name} has {', '.join(task.files)}")
    given = options.data if options.data is not None and Path(options.data).is_file() else None
    source = find_split(task, options.data, name, given)
    if source is None:
        raise UserError(f"--data {options.data}: no {task.files[name]} of {task.name} in it")
    return published(name, read_split(task, source, labelled=name not in task.tests, encoding=options.encoding))


def published(name: str, rows: Rows) -> Asked:
    """Published rows under the names their file gives them, or else counted from 0, as such tasks do."""
    return Asked(name, rows, "id" if rows.ids else "row", rows.ids or [str(i) for i in range(len(rows))])


def fitted(asked: Asked, spec: TaskSpec) -> TaskSpec:
    """The task that a model answers on the rows of a table: their columns, and the metric usual for it."""
    columns = asked.columns or spec.text_columns
    task = glue_task(str(Path(asked.name).absolute())) if asked.columns else None
    metric, _ = spec.head.choose_metric(len(spec.label_names), len(columns) == 2, task)
    return replace(spec, text_columns=columns, metric=metric)


def gold(asked: Asked, spec: TaskSpec) -> tuple[np.ndarray, np.ndarray, str] | None:
    """The labels a table has: [M] class ids or targets, the M rows' positions, and a line on how they were taken.

    None where it has none.

    Raises:
        UserError: the label column, which was found by its name, does not fit the model; `insist` says whether that
            is the user's mistake.
    """
    if asked.labels is None:
        return None
    keys = label_texts(asked.labels, asked.name, asked.label_column, spec.label_names)
    kept = np.setdiff1d(np.arange(len(keys)), unlabelled(keys, spec.label_names))
    if not len(kept):
        return None
    keys = [keys[row] for row in kept.tolist()]
    found, note = spec.head.table_gold(spec, keys, kept, asked.labels, asked.label_column, asked.name)
    return found, kept, note
