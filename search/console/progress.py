"""Progress for a person at a terminal, plain lines elsewhere.

On a terminal there is a sign of life at all times: what is being done and for how long, redrawn twice a second by a
thread of its own. While a phase runs it is the phase's bar with count, rate, time spent and, once there is evidence
(`search.console.pace`), time left; below it what matters most (the best score so far) and, if candidates failed, how
many for which reason. When the phase ends its bar gives way to one closing line. Elsewhere: the closing lines alone,
and at most one line every `QUIET_SECONDS` in between. `rich` decides what a terminal is and leaves colours out where
NO_COLOR is set.

Rejected: a full-screen view. What earlier phases said would be gone when it ends, and so would it from a log.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from search.console.pace import Costs, Pace, in_words
from search.console.phase_names import phase_name
from search.console.ticker import Ticker

QUIET_SECONDS = 20.0
"""Seconds between two progress lines of one phase where output is not a terminal."""
REASONS = 4
"""Reasons of failures shown in the live view, the most frequent ones."""
REFRESH = 2.0
"""Times a second that the terminal's view is drawn again: often enough to see it live, a few milliseconds each."""


class Bar(Protocol):
    """One running phase."""

    def update(
        self, done: int, note: str = "", total: int | None = None, failures: Mapping[str, int] | None = None
    ) -> None:
        """Reports `done` units finished, with a short note such as the best score so far; `total` if it changed,
        `failures` by reason."""
        ...


class _State:
    """What a phase last reported; `most` and `limit` as of `Reporter.phase`."""

    def __init__(self, name: str, total: int, costs: Costs | None, most: bool, limit: float | None) -> None:
        self.name, self.total, self.most, self.limit = name, total, most, limit
        self.began = time.monotonic()
        self.done, self.note = 0, ""
        self.failures: dict[str, int] = {}
        self.pace = Pace(total, costs)

    def take(self, done: int, note: str, total: int | None, failures: Mapping[str, int] | None) -> None:
        self.done, self.note, self.total = done, note, total or self.total
        self.pace.take(done, self.total)
        if failures is not None:
            self.failures = dict(failures)

    def rate(self) -> str:
        """Units per second, or seconds per unit; nothing before the first report."""
        rate = self.pace.rate
        if not rate:
            return ""
        return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"

    def left(self) -> str:
        """The time left in words; nothing as long as it is a guess."""
        left = self.pace.left
        if left is not None and self.limit is not None:
            left = min(left, max(0.0, self.limit - (time.monotonic() - self.began)))
        return "" if left is None else f"{'at most ' if self.most else ''}{in_words(left)} left"

    def line(self, tail: str) -> str:
        """The state in one line."""
        failed = sum(self.failures.values())
        parts = [f"{self.name}: {self.done}/{self.total}", self.note, f"{failed} failed" if failed else "", tail]
        return ", ".join(part for part in parts if part)

    def closing(self) -> str:
        """The line that stays when the phase has ended."""
        return self.line(f"{time.monotonic() - self.began:.1f} s")


class _Said(ProgressColumn):
    """A column whose text is asked for at every drawing."""

    def __init__(self, say: Any) -> None:
        self.say = say
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(self.say())


class _LiveBar:
    """The live view of a phase."""

    def __init__(self, state: _State, console: Console) -> None:
        self.state = state
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            _Said(state.rate),
            _Said(lambda: in_words(time.monotonic() - state.began)),
            _Said(state.left),
        )
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task(state.name, total=state.total)

    def update(
        self, done: int, note: str = "", total: int | None = None, failures: Mapping[str, int] | None = None
    ) -> None:
        self.state.take(done, note, total, failures)
        self.progress.update(self.task, completed=done, total=self.state.total)

    def view(self) -> Group:
        """The bar and the lines below it."""
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
            tail = ", ".join(part for part in (state.rate(), state.left()) if part)
            self.console.print(state.line(tail), markup=False, highlight=False)


def silent() -> Reporter:
    """A reporter that says nothing."""
    return Reporter(Console(quiet=True))


def is_first() -> bool:
    """Whether this is the process that speaks, of several that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def reporter_of_rank() -> Reporter:
    """A reporter of the process that speaks, and a silent one of the others."""
    return Reporter() if is_first() else silent()


class Reporter:
    """Where a run speaks to its user: information lines on standard output, bars while phases run.

    Used as a context manager it also shows, on a terminal, what is being done between the phases.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, soft_wrap=True)
        self._doing, self._since = "working", time.monotonic()
        self._bar: _LiveBar | None = None
        self._live: Live | None = None
        self._ticker: Ticker | None = None

    @classmethod
    def on_error(cls) -> Reporter:
        """A reporter on standard error, for commands whose results go to standard output."""
        return cls(Console(file=sys.stderr, soft_wrap=True))

    def __enter__(self) -> Reporter:
        if self._shows:
            self._tick() if self._may_fork() else self._draw()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._still()

    @property
    def _shows(self) -> bool:
        """Whether anything moves."""
        return self.console.is_terminal and not self.console.quiet

    def _may_fork(self) -> bool:
        """Whether libraries are still to be loaded, on a terminal that a process of its own can draw on."""
        if "torch" in sys.modules or self.console.is_dumb_terminal or threading.active_count() > 1:
            return False
        return self.console.file in (sys.stdout, sys.stderr) and _is_terminal(self.console.file)

    def _tick(self) -> None:
        self._still()
        self._ticker = Ticker(self.console.file.fileno(), self._doing)

    def _draw(self) -> None:
        """Lets this process draw, in place of the one that did while libraries were loaded."""
        if self._live is None:
            self._still()
            ours = self.console.file is sys.stdout
            self._live = Live(
                console=self.console,
                transient=True,
                refresh_per_second=REFRESH,
                get_renderable=self._view,
                redirect_stdout=ours and _is_terminal(sys.stdout),
                redirect_stderr=_is_terminal(sys.stderr),
            )
            self._live.start(refresh=True)

    def _still(self) -> None:
        ticker, self._ticker = self._ticker, None
        if ticker is not None:
            ticker.stop()
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def doing(self, what: str) -> None:
        """Says what comes next, where nothing else shows that the program is alive."""
        self._doing, self._since = what, time.monotonic()
        if self._ticker is not None:
            self._tick() if self._may_fork() else self._draw()

    def info(self, text: str) -> None:
        """Prints one line."""
        if self._ticker is not None:
            self._draw()
        self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def phase(
        self, name: str, total: int, *, costs: Costs | None = None, most: bool = False, limit: float | None = None
    ) -> Iterator[Bar]:
        """A phase; what shows its progress gives way to one closing line when the phase ends.

        Args:
            name: what is done; shown as `phase_name` calls it.
            total: units of work.
            costs: what each costs, where they differ and that is known; the time left is estimated from it.
            most: the phase may end before `total`, so the time left is an upper bound.
            limit: seconds after which it ends in any case.
        """
        state = _State(phase_name(name), total, costs, most, limit)
        if self._shows:
            self._bar = _LiveBar(state, self.console)
            try:
                if self._ticker is not None:
                    self._draw()
                with nullcontext() if self._live is not None else self:
                    yield self._bar
            finally:
                self._bar = None
                self.doing("working")
        else:
            yield _LineBar(state, self.console)
        self.info(state.closing())

    def _view(self) -> RenderableType:
        bar = self._bar
        if bar is not None:
            return bar.view()
        return Text(f"{self._doing}  {in_words(time.monotonic() - self._since)}", style="dim")


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()
