"""Progress for a person at a terminal, plain lines elsewhere.

On a terminal a live view of the running phase: a bar with count, rate, time spent and time left, below it what matters
most (the best score so far) and, if candidates failed, how many for which reason. When the phase ends the view gives
way to one closing line. Elsewhere: the closing lines alone, and at most one line every `QUIET_SECONDS` in between.
`rich` decides what a terminal is and leaves colours out where NO_COLOR is set.

Rejected: a full-screen view. What earlier phases said would be gone when it ends, and so would it from a log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from search.console.phase_names import phase_name

QUIET_SECONDS = 20.0
"""Seconds between two progress lines of one phase where output is not a terminal."""
REASONS = 4
"""Reasons of failures shown in the live view, the most frequent ones."""


class Bar(Protocol):
    """One running phase."""

    def update(
        self, done: int, note: str = "", total: int | None = None, failures: Mapping[str, int] | None = None
    ) -> None:
        """Reports `done` units finished, with a short note such as the best score so far; `total` if it changed,
        `failures` by reason."""
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


class _State:
    """What a phase last reported."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.began = time.monotonic()
        self.done, self.note, self.rate = 0, "", 0.0
        self.failures: dict[str, int] = {}
        self._pace = _Pace()

    def take(self, done: int, note: str, total: int | None, failures: Mapping[str, int] | None) -> None:
        self.done, self.note, self.total = done, note, total or self.total
        self.rate = self._pace(done)
        if failures is not None:
            self.failures = dict(failures)

    def line(self, tail: str) -> str:
        """The state in one line."""
        failed = sum(self.failures.values())
        parts = [f"{self.name}: {self.done}/{self.total}", self.note, f"{failed} failed" if failed else "", tail]
        return ", ".join(part for part in parts if part)

    def closing(self) -> str:
        """The line that stays when the phase has ended."""
        return self.line(f"{time.monotonic() - self.began:.1f} s")


class _LiveBar:
    """The live view of a phase."""

    def __init__(self, state: _State, console: Console) -> None:
        self.state = state
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task(state.name, total=state.total, rate="")
        self.live = Live(self._view(), console=console, transient=True, refresh_per_second=4)

    def update(
        self, done: int, note: str = "", total: int | None = None, failures: Mapping[str, int] | None = None
    ) -> None:
        self.state.take(done, note, total, failures)
        self.progress.update(self.task, completed=done, total=self.state.total, rate=_rate(self.state.rate))
        self.live.update(self._view())

    def _view(self) -> Group:
        lines = [Text(self.state.note, style="green")] if self.state.note else []
        ordered = sorted(self.state.failures.items(), key=lambda item: (-item[1], item[0]))
        for reason, count in ordered[:REASONS]:
            lines.append(Text(f"failed {count}: {reason}", style="red", overflow="ellipsis", no_wrap=True))
        if len(ordered) > REASONS:
            rest = sum(count for _, count in ordered[REASONS:])
            lines.append(Text(f"failed {rest}: other reasons", style="red"))
        return Group(self.progress, *(Padding(line, (0, 0, 0, 2)) for line in lines))


class _LineBar:
    """Lines in place of the live view."""

    def __init__(self, state: _State, console: Console) -> None:
        self.state, self.console = state, console
        self.last = state.began

    def update(
        self, done: int, note: str = "", total: int | None = None, failures: Mapping[str, int] | None = None
    ) -> None:
        state = self.state
        state.take(done, note, total, failures)
        now = time.monotonic()
        if now - self.last >= QUIET_SECONDS and done < state.total:
            self.last = now
            left = (state.total - done) / max(state.rate, 1e-9)
            self.console.print(state.line(f"{_rate(state.rate)}, {left:.0f} s left"), markup=False, highlight=False)


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
        """A phase of `total` units, called what `phase_name` says.

        What shows its progress gives way to one closing line when the phase ends.
        """
        state = _State(phase_name(name), total)
        if self.console.is_terminal:
            bar = _LiveBar(state, self.console)
            with bar.live:
                yield bar
        else:
            yield _LineBar(state, self.console)
        self.info(state.closing())
