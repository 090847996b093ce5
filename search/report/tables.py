"""candidates.csv: the trials of a stage as a table, for people and for the report.

Columns: number, state, score, params, seconds, architecture, reason, and the costs that are known (flops, memory_mb,
latency_ms). Scores are written with all their digits; a failed trial's score is empty. Rejected: reading the ledger for
the report; a report must open where a run directory was copied without its database.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import UserError
from engine.files import write_text_atomic
from search.ledger.ledger import STATES, Trial

COLUMNS = ("number", "state", "score", "params", "seconds", "architecture", "reason")
COSTS = ("flops", "memory_mb", "latency_ms")
"""Columns behind those, each where any trial has it."""


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
    costs: dict[str, float] = field(default_factory=dict)


def write_candidates(path: str | os.PathLike[str], trials: Iterable[Trial]) -> None:
    """Writes trials, ordered by number, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ordered = sorted(trials, key=lambda t: t.number)
    costs = [name for name in COSTS if any(name in t.attrs for t in ordered)]
    writer.writerow([*COLUMNS, *costs])
    for t in ordered:
        score = "" if t.score is None else repr(t.score)
        known = [repr(t.attrs[name]) if name in t.attrs else "" for name in costs]
        row = [t.number, t.state, score, t.params, repr(t.seconds), str(t.architecture), t.reason or ""]
        writer.writerow([*row, *known])
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
    costs = rows[0][len(COLUMNS) :] if rows else []
    if not rows or tuple(rows[0][: len(COLUMNS)]) != COLUMNS or not set(costs) <= set(COSTS):
        raise UserError(
            f"{path}: the first line must name the columns {','.join(COLUMNS)} and none but {','.join(COSTS)}"
        )
    return [_candidate(Path(path), number, row, costs) for number, row in enumerate(rows[1:], 2)]


def _candidate(path: Path, line: int, row: list[str], costs: list[str]) -> Candidate:
    try:
        number, state, score, params, seconds, architecture, reason, *amounts = row
        known = {name: float(value) for name, value in zip(costs, amounts, strict=True) if value}
        if not all(map(math.isfinite, known.values())):
            raise ValueError(f"costs {known}")
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
            costs=known,
        )
    except ValueError as error:
        raise UserError(f"{path}: line {line} is damaged ({error}): restore it or resume the run") from error
