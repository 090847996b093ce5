"""candidates.csv: the trials of a stage as a table, for people and for the report.

Columns: number, state, score, params, seconds, architecture, reason. Scores are written with all their digits; a
failed trial's score is empty. Rejected: reading the ledger for the report; a report must open where a run directory
was copied without its database.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError
from engine.files import write_text_atomic
from search.ledger import STATES, Trial

COLUMNS = ("number", "state", "score", "params", "seconds", "architecture", "reason")


@dataclass(frozen=True)
class Candidate:
    """One row: a trial as the table holds it, the architecture as text."""

    number: int
    state: str
    score: float | None
    params: int
    seconds: float
    architecture: str
    reason: str


def write_candidates(path: str | os.PathLike[str], trials: Iterable[Trial]) -> None:
    """Writes trials, ordered by number, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for t in sorted(trials, key=lambda t: t.number):
        score = "" if t.score is None else repr(t.score)
        writer.writerow([t.number, t.state, score, t.params, repr(t.seconds), str(t.architecture), t.reason or ""])
    write_text_atomic(path, text.getvalue())


def read_candidates(path: str | os.PathLike[str]) -> list[Candidate]:
    """Reads what `write_candidates` wrote.

    Raises:
        UserError: the file cannot be read or is damaged; the message names the line.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}): restore it or resume the run") from error
    if not rows or tuple(rows[0]) != COLUMNS:
        raise UserError(f"{path}: the first line must name the columns {','.join(COLUMNS)}")
    return [_candidate(Path(path), number, row) for number, row in enumerate(rows[1:], 2)]


def _candidate(path: Path, line: int, row: list[str]) -> Candidate:
    try:
        number, state, score, params, seconds, architecture, reason = row
        if state not in STATES:
            raise ValueError(f"unknown state {state!r}")
        if score and not math.isfinite(float(score)):
            raise ValueError(f"score {score}")
        return Candidate(
            number=int(number),
            state=state,
            score=float(score) if score else None,
            params=int(params),
            seconds=float(seconds),
            architecture=architecture,
            reason=reason,
        )
    except ValueError as error:
        raise UserError(f"{path}: line {line} is damaged ({error}): restore it or resume the run") from error
