"""A second copy of a SQLite ledger, used when the ledger is damaged or lost.

    .study.db.copy      written whole or not at all, at most once in `EVERY` seconds and when the run ends

What was recorded since the last copy is evaluated again: proposals depend on seed and scores alone, so the run ends as
it would have. A damaged ledger is set aside under the name study.db.damaged, for whoever wants to look.

Chosen: SQLite's own backup, consistent while others write. Rejected: a second file appended to with every trial. It
repeats what the database guarantees, and the two disagree after a kill.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from engine.errors import UserError
from engine.files import copy_atomic, write_atomic
from search.ledger.ledger import Ledger

EVERY = 30.0
"""Seconds between two copies: at most that much work is lost with a ledger."""


def copy_path(ledger: Path) -> Path:
    """Where the copy of `ledger` lies."""
    return ledger.with_name(f".{ledger.name}.copy")


class LedgerCopy:
    """Keeps the copy of a ledger up to date.

    Args:
        ledger: the SQLite file.
        every: least seconds between two copies.
    """

    def __init__(self, ledger: Path, every: float = EVERY) -> None:
        self.ledger, self.every = ledger, every
        self._written = -float("inf")

    def recorded(self) -> None:
        """Call after a trial was recorded."""
        if time.monotonic() - self._written >= self.every:
            self.write()

    def write(self) -> None:
        """Copies the ledger now."""
        if not self.ledger.exists():
            return
        with (
            write_atomic(copy_path(self.ledger)) as temporary,
            contextlib.closing(sqlite3.connect(self.ledger)) as source,
            contextlib.closing(sqlite3.connect(temporary)) as target,
        ):
            try:
                source.backup(target)
            except sqlite3.OperationalError as error:
                if "disk is full" not in str(error) and "disk I/O" not in str(error):
                    raise
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(copy_path(self.ledger))) from error
        self._written = time.monotonic()


def open_ledger(path: Path, stack: contextlib.ExitStack, note: Callable[[str], None]) -> Ledger:
    """The ledger of a run, kept in two copies; a damaged one is replaced by its copy, which is said in one line.

    Args:
        path: the SQLite file, existing or not.
        stack: closes the ledger, and before that writes the copy.
        note: takes the line.

    Raises:
        UserError: the ledger cannot be used, and there is no sound copy.
    """
    copy = LedgerCopy(path)
    try:
        ledger = _sound(path, copy)
    except UserError as error:
        if "damaged" not in str(error) or not restore(path):
            raise
        ledger = _sound(path, copy)
        count = sum(len(ledger.trials(stage)) for stage in ledger.stages())
        note(f"{str(error).partition(': restore')[0]}: its copy with {count} trials is used")
    stack.enter_context(ledger)
    stack.callback(copy.write)
    return ledger


def _sound(path: Path, copy: LedgerCopy) -> Ledger:
    if not path.exists() and copy_path(path).exists():
        raise UserError(f"ledger {path}: is damaged: it is gone, but not its copy")
    problem = problem_of(path) if path.exists() else None
    if problem is None and _entries(path) < _entries(copy_path(path)):
        problem = "it holds fewer trials than its copy"
    if problem is not None:
        raise UserError(f"ledger {path}: is damaged ({problem}): restore a copy or start a new run")
    ledger = Ledger(path, recorded=copy.recorded)
    try:
        for stage in ledger.stages():
            ledger.trials(stage)
    except BaseException:
        ledger.close()
        raise
    return ledger


def _entries(path: Path) -> int:
    """Trials in a SQLite file; 0 where it is missing, empty or no ledger."""
    if not path.exists():
        return 0
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            return connection.execute("SELECT count(*) FROM trials").fetchone()[0]
    except sqlite3.Error as error:
        _refuse_locked(path, error)
        return 0


def problem_of(ledger: Path, *, timeout: float = 30.0) -> str | None:
    """What is wrong with the SQLite file `ledger`, None if it is sound.

    Raises:
        UserError: another process has locked it; that is no damage.
    """
    try:
        with contextlib.closing(sqlite3.connect(ledger, timeout=timeout)) as connection:
            verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        _refuse_locked(ledger, error)
        return str(error)
    return None if verdict == "ok" else verdict.splitlines()[0]


def _refuse_locked(ledger: Path, error: sqlite3.Error) -> None:
    if "locked" in str(error):
        raise UserError(
            f"ledger {ledger}: is locked by another process: end that process or wait, then resume"
        ) from error


def restore(ledger: Path) -> bool:
    """Puts the copy in the place of a damaged or lost `ledger`; False if there is no sound copy."""
    copy = copy_path(ledger)
    if not copy.exists() or problem_of(copy) is not None:
        return False
    if ledger.exists():
        os.replace(ledger, ledger.with_name(f"{ledger.name}.damaged"))
    ledger.with_name(f"{ledger.name}-journal").unlink(missing_ok=True)  # of the damaged file: not to be played back
    copy_atomic(copy, ledger)
    return True
