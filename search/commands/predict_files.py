"""What `ffnas predict` writes: a row per answer as CSV, TSV or JSON Lines, GLUE's submissions, SQuAD's predictions.

Everything goes where the user says, or to standard output; a file is written whole or not at all.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.catalog import TASKS
from engine.data.results import Predictions
from engine.data.rows import Rows
from engine.errors import UserError
from engine.files import write_json_atomic, write_text_atomic
from engine.tasks.texts import DIGITS

if TYPE_CHECKING:
    from engine.data.catalog import PublishedTask


def check_out(out: str | None, suffixes: Sequence[str]) -> None:
    """Raises `UserError` for a file whose suffix names no format."""
    if out is not None and Path(out).suffix.casefold() not in suffixes:
        known = " or ".join(dict.fromkeys(suffixes))
        raise UserError(f"--out {out}: end it in {known}, or leave it out for standard output")


def write_predictions(out: str | None, predictions: Predictions) -> None:
    """Writes answers into the file `out`, with what goes beside it, or to standard output, which gets CSV or JSON."""
    if predictions.records is None:
        _write_document(out, predictions)
        return
    suffix = ".csv" if out is None else Path(out).suffix.casefold()
    records = predictions.records
    text = _json_lines(records) if suffix == ".jsonl" else _table(records, "\t" if suffix == ".tsv" else ",")
    if out is None:
        sys.stdout.write(text)
    else:
        write_text_atomic(out, text)


def _write_document(out: str | None, predictions: Predictions) -> None:
    if out is None:
        print(json.dumps(predictions.document, ensure_ascii=False, indent=2))
        return
    path = Path(out)
    write_json_atomic(path, predictions.document)
    for end, value in predictions.beside.items():
        write_json_atomic(path.with_name(f"{path.stem}{end}"), value)


def _json_lines(records: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _table(records: Sequence[dict[str, Any]], delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    flat = [_flat(record) for record in records]
    writer.writerow(flat[0])
    writer.writerows(record.values() for record in flat)
    return out.getvalue()


def _flat(record: dict[str, Any]) -> dict[str, str]:
    """A column per label in place of the mapping, and numbers with all their decimals."""
    flat = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat.update({f"probability_{label}": f"{p:.{DIGITS}f}" for label, p in value.items()})
        else:
            flat[name] = f"{value:.{DIGITS}f}" if isinstance(value, float) else str(value)
    return flat


def write_submission(path: Path, task: PublishedTask, rows: Rows, logits: np.ndarray) -> None:
    """A file of a GLUE submission: `index` and `prediction`, classes as GLUE's own files write them.

    Args:
        path: the file.
        task: of GLUE.
        rows: with the names of the test file's first column.
        logits: [N, classes], or [N, 1] of STS-B, whose scores are cut to 0..5 and written with three decimals.
    """
    names = task.values or task.classes
    if names:
        answers = [names[i] for i in logits.argmax(axis=1).tolist()]
    else:
        answers = [f"{min(max(value, 0.0), 5.0):.3f}" for value in logits[:, 0].tolist()]
    ids = rows.ids or [str(i) for i in range(len(rows))]
    lines = ["index\tprediction", *(f"{name}\t{answer}" for name, answer in zip(ids, answers, strict=True))]
    write_text_atomic(path, "\n".join(lines) + "\n")


def submission_files() -> list[str]:
    """Names of all files of a GLUE submission."""
    return [name for task in TASKS.values() for name in task.submission.values()]
