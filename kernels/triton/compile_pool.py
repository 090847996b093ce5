"""Background processes that compile kernels into Triton's cache on disk (`kernels.triton.compile_worker`).

A process that dies takes one job with it, whose caller hears of it; the next job starts another.

Rejected: multiprocessing. Forked processes inherit a CUDA context they must not use; spawned ones run the caller's
main module again.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

PROCESSES = max(1, min(4, (os.cpu_count() or 2) // 4))
"""Compilers at work at once: a quarter of the processors, so that data loading keeps its own."""

_COMMAND = (sys.executable, "-m", "kernels.triton.compile_worker")

Finished = Callable[[str | None], None]


class CompilePool:
    """Jobs are compiled in the order they come; processes start on demand and end with this one.

    Args:
        processes: processes at once.
        command: what a process is started with; for tests.
    """

    def __init__(self, processes: int = PROCESSES, command: tuple[str, ...] = _COMMAND) -> None:
        self._jobs: queue.SimpleQueue[tuple[dict[str, Any], Finished]] = queue.SimpleQueue()
        self._command = command
        self._room = processes
        self._idle = 0
        self._lock = threading.Lock()

    def submit(self, job: dict[str, Any], finished: Finished) -> None:
        """Queues {"words", "recipe", "arch"}; `finished` gets None or what failed, on another thread."""
        with self._lock:
            start = self._idle == 0 and self._room > 0
            self._room -= start
        self._jobs.put((job, finished))
        if start:
            threading.Thread(target=self._serve, name="ffnas-compile", daemon=True).start()

    def _serve(self) -> None:
        process: subprocess.Popen[str] | None = None
        while True:
            with self._lock:
                self._idle += 1
            job, finished = self._jobs.get()
            with self._lock:
                self._idle -= 1
            if process is None or process.poll() is not None:
                process = self._start()
            finished(_ask(process, job))

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "FFNAS_SPECIALIZE": "0"}
        folder = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, environment.get("PYTHONPATH"))))
        return subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip


def _ask(process: subprocess.Popen[str], job: dict[str, Any]) -> str | None:
    """Has a process do a job: None, or one line saying what failed."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except OSError as error:
        return f"a process that compiles kernels ended: {error}"
    if not answer:
        return f"a process that compiles kernels ended with exit code {process.wait()}"
    return json.loads(answer).get("error")
