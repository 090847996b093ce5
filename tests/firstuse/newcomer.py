"""What the tests of first use share: small files as people bring them, and `ffnas` called as they call it."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def texts(count: int) -> list[str]:
    """Different texts of four words."""
    return [f"the phone number {i}" for i in range(count)]


def labelled(count: int, labels: Sequence[object]) -> list[tuple[str, object]]:
    """Texts, and the labels again and again."""
    return [(text, labels[i % len(labels)]) for i, text in enumerate(texts(count))]


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]], delimiter: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows([header, *rows])
    path.write_text(out.getvalue(), encoding="utf-8")
    return str(path)


def write_jsonl(path: Path, rows: Iterable[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def started(*arguments: str, code: str | None = None, **variables: str) -> subprocess.CompletedProcess:
    """`ffnas ARGUMENTS`, or Python code, in a process of its own."""
    command = ["-c", code, *arguments] if code is not None else ["-m", "search.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPO), **variables}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
