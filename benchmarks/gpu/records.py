"""Results as JSON lines: one is appended when a case begins and one when it ends, so that a kill costs a case at most.

    {"family": "ffn", "case": "bf16 fwd ...", "state": "began", "side": "eager"}
    {"family": "ffn", "case": "bf16 fwd ...", "state": "done", ...}

An illegal access ends every later call of its process ("sticky" errors of CUDA). So a case that leaves the device
unusable ends the process, with exit code `BROKEN`; started again, a family goes on after what the file has. A case that
died while a side was named by `attempt` is tried again without that side, any other is left behind as "crashed".

Rejected: one file per process, to be joined at the end. Nobody joins them when the whole run is killed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

BROKEN = 86
"""Exit code of a process whose device no longer works."""
NAME = "results.jsonl"
Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """All whole lines of a results file; none where there is no file."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:  # the line a killed process was writing
            continue
    return found


def append(path: Path, line: Line) -> None:
    """Adds a line in one write, so that processes can share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def usable() -> bool:
    """Whether the device still answers; True without one."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


class Records:
    """One family's lines in a results file.

    Args:
        path: the file.
        family: its name in the lines.

    Attributes:
        lost: per case the sides an earlier process died in.
    """

    def __init__(self, path: Path, family: str) -> None:
        self.path, self.family = path, family
        self.finished: set[str] = set()
        self.lost: dict[str, set[str]] = {}
        began: dict[str, str | None] = {}
        for line in read(path):
            if line.get("family") != family or "case" not in line:
                continue
            name = line["case"]
            self.lost.setdefault(name, set()).update(line.get("lost", ()))
            if line["state"] == "began":
                began[name] = line.get("side")
            else:
                began.pop(name, None)
                self.finished.add(name)
        for name, side in began.items():
            if side is None:
                self._end(name, "crashed", {"reason": "the process died"})
            else:
                self.lost[name].add(side)

    def case(self, name: str, measure: Callable[[], Line]) -> None:
        """Runs a case and appends its result, or why there is none; not one that the file has already.

        Raises:
            SystemExit: the device no longer works (`BROKEN`).
        """
        if name in self.finished:
            return
        self._write(name, "began")
        try:
            found = measure()
        except Exception as error:  # part of the result
            self._end(name, "failed", {"reason": reason(error)})
        else:
            self._end(name, "done", found)
        if not usable():
            print(f"{self.family}: the device no longer works after {name}", flush=True)
            sys.exit(BROKEN)

    def attempt(self, name: str, side: str | None) -> bool:
        """Notes that a side of a case is begun, None: what all sides do; False where an earlier process died in it."""
        if side in self.lost.get(name, ()):
            return False
        self._write(name, "began", **({} if side is None else {"side": side}))
        return True

    def _write(self, name: str, state: str, **more: Any) -> None:
        lost = sorted(self.lost.get(name, ()))
        line = {"family": self.family, "case": name, "state": state, **more}
        append(self.path, {**line, "lost": lost} if lost else line)

    def _end(self, name: str, state: str, found: Line) -> None:
        self.finished.add(name)
        self._write(name, state, **found)
        print(f"{self.family}: {name}: {state} {_short(found)}", flush=True)


def reason(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:300]


def refusal(error: BaseException) -> str:
    """`reason` of a side that could not run.

    Raises:
        SystemExit: the device no longer works (`BROKEN`): nothing more can be said in this process.
    """
    if not usable():
        sys.exit(BROKEN)
    return reason(error)


LOST = "it ended the process, or left the device unusable"
"""Why a side is left out that an earlier process died in."""


def _short(found: Line) -> str:
    return json.dumps(found)[:400]


def ended(lines: list[Line], family: str) -> Iterator[Line]:
    """The lines of a family's cases that have ended."""
    return (line for line in lines if line.get("family") == family and line.get("state") not in (None, "began"))
