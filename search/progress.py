"""Progress for a person at a terminal, plain lines elsewhere.

On a terminal: one bar per running phase with count, rate, remaining time and the best score so far (`rich`, which
respects NO_COLOR). Elsewhere: one line when a phase ends, and at most one every `QUIET_SECONDS` in between.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_SECONDS = 20.0
"""Seconds between two progress lines of one phase where output is not a terminal."""


class Bar(Protocol):
    """One running phase."""

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Reports `done` units finished, with a short note such as the best score so far; `total` if it changed."""
        ...


class _Pace:
    """Units per second since the first report; the first one may start anywhere (a resumed phase)."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.first: tuple[int, float] | None = None

    def __call__(self, done: int) -> float:
        now = time.monotonic()
        if self.first is None:
            self.first = (done, now)
        if done == self.first[0]:
            return done / max(now - self.began, 1e-9)
        return (done - self.first[0]) / max(now - self.first[1], 1e-9)


class _RichBar:
    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self.progress = progress
        self.task = progress.add_task(name, total=total, note="", rate="")
        self.pace = _Pace()

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        rate = _rate(self.pace(done))
        self.progress.update(self.task, completed=done, total=total, note=note, rate=rate)


class _LineBar:
    def __init__(self, name: str, total: int, write: Console) -> None:
        self.name, self.total, self.console = name, total, write
        self.began = self.last = time.monotonic()
        self.done, self.note, self.pace = 0, "", _Pace()

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        self.total = total or self.total
        self.done, self.note = done, note
        rate = self.pace(done)
        now = time.monotonic()
        if now - self.last >= QUIET_SECONDS and done < self.total:
            self.last = now
            left = (self.total - done) / max(rate, 1e-9)
            self._line(f"{_rate(rate)}, {left:.0f} s left")

    def close(self) -> None:
        self._line(f"{time.monotonic() - self.began:.1f} s")

    def _line(self, tail: str) -> None:
        note = f", {self.note}" if self.note else ""
        self.console.print(f"{self.name}: {self.done}/{self.total}{note}, {tail}", markup=False, highlight=False)


def _rate(rate: float) -> str:
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"


def silent() -> Reporter:
    """A reporter that says nothing."""
    return Reporter(Console(quiet=True))


class Reporter:
    """Where a run speaks to its user: information lines on standard output, bars while phases run."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, soft_wrap=True)

    def info(self, text: str) -> None:
        """Prints one line."""
        self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Bar]:
        """A phase of `total` units; its bar disappears into one closing line when the phase ends."""
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=self.console) as progress:
                yield _RichBar(progress, name, total)
            return
        bar = _LineBar(name, total, self.console)
        yield bar
        bar.close()
