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
from scipy.special import softmax

from engine.data.catalog import TASKS
from engine.data.task import Rows, TaskSpec
from engine.errors import UserError
from engine.files import write_json_atomic, write_text_atomic
from search.commands.predict_rows import Asked

if TYPE_CHECKING:
    from engine.data.catalog import PublishedTask
    from engine.evaluation.answers import Answer

SUFFIXES = (".csv", ".tsv", ".jsonl")
DIGITS = 6
"""Decimals of numbers and probabilities."""


def check_out(out: str | None, *, spans: bool) -> None:
    """Raises `UserError` for a file whose suffix names no format."""
    known = (".json",) if spans else SUFFIXES
    if out is not None and Path(out).suffix.casefold() not in known:
        raise UserError(f"--out {out}: end it in {' or '.join(known)}, or leave it out for standard output")


def write_rows(out: str | None, asked: Asked, spec: TaskSpec, logits: np.ndarray, *, probabilities: bool) -> None:
    """Answers of a classifier, of a regression or of multiple choice.

    Args:
        out: file, or None for standard output, which gets CSV.
        asked: the rows, for their names.
        spec: the task; its label names are those of the answers.
        logits: [N, C], or [N, 1] values.
        probabilities: one for every label, too.
    """
    records = _records(asked, spec, logits, probabilities)
    suffix = ".csv" if out is None else Path(out).suffix.casefold()
    text = _json_lines(records) if suffix == ".jsonl" else _table(records, "\t" if suffix == ".tsv" else ",")
    if out is None:
        sys.stdout.write(text)
    else:
        write_text_atomic(out, text)


def _records(asked: Asked, spec: TaskSpec, logits: np.ndarray, every: bool) -> list[dict[str, Any]]:
    """One mapping per row: its name, the answer, and of classes the answer's probability, or also `every` label's."""
    names = [int(name) for name in asked.names] if asked.key == "row" else asked.names
    if spec.is_regression:
        values = [round(v, DIGITS) for v in logits[:, 0].astype(np.float64).tolist()]
        return [{asked.key: name, "prediction": v} for name, v in zip(names, values, strict=True)]
    shares = softmax(logits.astype(np.float64), axis=1)
    records = []
    for name, row, best in zip(names, shares.tolist(), logits.argmax(axis=1).tolist(), strict=True):
        record = {asked.key: name, "prediction": spec.label_names[best], "probability": round(row[best], DIGITS)}
        if every:
            record["probabilities"] = {label: round(p, DIGITS) for label, p in zip(spec.label_names, row, strict=True)}
        records.append(record)
    return records


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


def write_answers(
    out: str | None, names: Sequence[str], answers: Sequence[Answer], *, no_answer: bool, threshold: float
) -> None:
    """SQuAD's prediction file, {id: text}; beside a file also NAME_nbest.json and, where a question may have no
    answer, NAME_null_odds.json."""
    texts = [answer.at(threshold) if no_answer else answer.text for answer in answers]
    found = dict(zip(names, texts, strict=True))
    if out is None:
        print(json.dumps(found, ensure_ascii=False, indent=2))
        return
    path = Path(out)
    write_json_atomic(path, found)
    best = {
        name: [{"text": text, "score": score} for text, score in answer.best]
        for name, answer in zip(names, answers, strict=True)
    }
    write_json_atomic(path.with_name(f"{path.stem}_nbest.json"), best)
    if no_answer:
        odds = {name: a.no_answer - a.score for name, a in zip(names, answers, strict=True)}
        write_json_atomic(path.with_name(f"{path.stem}_null_odds.json"), odds)


def write_submission(path: Path, task: PublishedTask, rows: Rows, logits: np.ndarray) -> None:
    """A file of a GLUE submission: `index` and `prediction`, classes as GLUE's own files write them.

    Args:
        path: the file.
        task: of GLUE.
        rows: with the names of the test file's first column.
        logits: [N, classes], or [N, 1] of STS-B, whose scores are cut to 0..5 and written with three decimals.
    """
    if task.kind == "regression":
        answers = [f"{min(max(value, 0.0), 5.0):.3f}" for value in logits[:, 0].tolist()]
    else:
        names = task.values or task.classes
        answers = [names[i] for i in logits.argmax(axis=1).tolist()]
    names = rows.ids or [str(i) for i in range(len(rows))]
    lines = ["index\tprediction", *(f"{name}\t{answer}" for name, answer in zip(names, answers, strict=True))]
    write_text_atomic(path, "\n".join(lines) + "\n")


def submission_files() -> list[str]:
    """Names of all files of a GLUE submission."""
    return [name for task in TASKS.values() for name in task.submission.values()]
