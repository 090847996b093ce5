"""A line that says what is being done and for how long, drawn by a process of its own while libraries load.

Loading a library of hundreds of megabytes holds Python's lock for seconds where the machine is busy; no thread draws
then. The process is forked before PyTorch is there and before any thread is, so it costs nothing and inherits nothing
that could be held; it ends when it is told to, and when its parent has ended in whatever way.
"""

from __future__ import annotations

import os
import select
import signal
import time

from search.console.pace import in_words

INTERVAL = 0.5
"""Seconds between two drawings."""
ERASE = b"\r\x1b[2K"


class Ticker:
    """Draws at once, and twice a second until `stop`.

    Args:
        terminal: file descriptor of a terminal.
        what: is being done.
    """

    def __init__(self, terminal: int, what: str) -> None:
        read, self._write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._write)
            _tick(read, terminal, what)
        os.close(read)

    def stop(self) -> None:
        """Takes the line away and waits for the end of the process."""
        os.close(self._write)
        os.waitpid(self._pid, 0)


def _tick(told: int, terminal: int, what: str) -> None:
    """The process's whole life."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and tells
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        began, wait = time.monotonic(), 0.0
        while not select.select([told], [], [], wait)[0]:
            os.write(terminal, ERASE + f"{what}  {in_words(time.monotonic() - began)}".encode())
            wait = INTERVAL
        os.write(terminal, ERASE)
    finally:
        os._exit(0)
