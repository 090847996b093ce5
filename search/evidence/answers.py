"""What a model answers to every row of dev, and the file that keeps it: RUN/predictions/NAME.npz.

    logits   [N, C] float32 logits or log-probabilities, [N, 1] values; or, of other kinds of tasks, another array with
             what is kept of each row (`TaskHead.kept`): scores of question answering, exact match and F1
    labels   [N] int64 class ids or float32 targets; none where the rows hold all that a metric needs

Rows are in the order of the task's dev split. Rejected: keeping metrics alone. Two models are compared row by row,
and whoever wants to see where they differ needs the rows too.
"""

from __future__ import annotations

import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.data import TaskSpec
from engine.errors import UserError
from engine.files import write_atomic

FOLDER = "predictions"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Answers:
    """A model's answers to the rows of dev.

    Attributes:
        name: of the model, as in the names of files.
        rows: what is kept of each row, float32, see the module; None where there is no such model, `note` then says
            why.
        seconds: that fitting the model took; None where nobody measured it.
        note: one line about how it was made, or why it was not.
    """

    name: str
    rows: np.ndarray | None
    seconds: float | None = None
    note: str = ""


def predictions_path(run_dir: str | os.PathLike[str], name: str) -> Path:
    """The file of the model `name` in a run directory; raises `ValueError` where that is no name of a file."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a predictions file")
    return Path(run_dir) / FOLDER / f"{name}.npz"


def write_predictions(
    run_dir: str | os.PathLike[str], name: str, rows: np.ndarray, labels: np.ndarray | None, spec: TaskSpec
) -> Path:
    """Writes a model's answers, whole or not at all, and returns the file's path.

    Args:
        run_dir: the run directory.
        name: of the model.
        rows: as in `Answers.rows`.
        labels: [N] gold labels; None where the kind of task keeps none.
        spec: the task.

    Raises:
        ValueError: rows and labels do not fit together or to the task.
    """
    head = spec.head
    columns = head.kept_columns(spec)
    if rows.ndim != 2 or rows.shape[1] != columns or (labels is None) != (head.label_dtype is None):
        raise ValueError(f"answers {rows.shape} of {name!r}: need [N, {columns}], and labels if the kind keeps them")
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"answers {rows.shape} of {name!r} and {len(labels)} labels")
    arrays: dict[str, np.ndarray] = {head.kept: rows.astype(np.float32)}
    if labels is not None and head.label_dtype is not None:
        arrays["labels"] = labels.astype(head.label_dtype)
    path = predictions_path(run_dir, name)
    with write_atomic(path) as temporary:
        np.savez(temporary, allow_pickle=False, **arrays)
    return path


def read_predictions(run_dir: str | os.PathLike[str], name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows, and labels or None, that `write_predictions` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = predictions_path(run_dir, name)
    try:
        with np.load(path, allow_pickle=False) as file:
            (kept,) = [array for array in file.files if array != "labels"]
            rows = file[kept]
            labels = file["labels"] if "labels" in file.files else None
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{path}: no readable predictions ({reason:.120}): resume the run") from error
    fits = rows.ndim == 2 and rows.dtype == np.float32 and (labels is None or labels.shape == (len(rows),))
    if not fits:
        raise UserError(f"{path}: damaged, {rows.dtype}{rows.shape} are no answers: resume the run")
    return rows, labels
