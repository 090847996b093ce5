"""A pytest plugin: outcomes of tests as records, a limit per test, and a share of the tests for each of many processes.

    FFNAS_RECORDS=out/results.jsonl FFNAS_SHARE=0/4 FFNAS_TEST_LIMIT=20 python -m pytest -p benchmarks.gpu.recorder ...

A test that takes longer than its limit (a hanging kernel), or leaves the device unusable, ends the process with exit
code `records.BROKEN`; started again, it goes on with the tests that are not in the file. Needs no other plugin.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.records import BROKEN, Line, Records, append, usable


class Recorder:
    """See the module."""

    def __init__(self, path: Path, share: str, limit: float) -> None:
        self.share, self.count = map(int, share.split("/"))
        self.limit = limit
        self.records = Records(path, f"tests {share}")
        self._reports: list[pytest.TestReport] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        own = [item for k, item in enumerate(items) if k % self.count == self.share]
        items[:] = [item for item in own if item.nodeid not in self.records.finished]
        if not config.option.collectonly:
            append(self.records.path, {"family": self.records.family, "state": "collected", "count": len(own)})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._reports = []
        watch = threading.Timer(self.limit, self._late, (item.nodeid,))
        watch.daemon = True
        watch.start()
        start = time.monotonic()
        self._append(item.nodeid, {"state": "began"})
        try:
            return (yield)
        finally:
            watch.cancel()
            self._append(item.nodeid, {**self._outcome(), "seconds": round(time.monotonic() - start, 2)})
            if not usable():
                self._end(f"{item.nodeid} left the device unusable")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def _outcome(self) -> Line:
        """State and reason of the test whose reports are there."""
        for report in self._reports:
            if report.outcome != "passed":
                state = "skipped" if report.outcome == "skipped" else "failed"
                return {"state": state, "reason": _last_line(report)}
        return {"state": "done"}

    def _append(self, name: str, line: Line) -> None:
        append(self.records.path, {"family": self.records.family, "case": name, **line})

    def _late(self, name: str) -> None:
        self._append(name, {"state": "failed", "reason": f"took more than {self.limit:.0f} s"})
        self._end(f"{name} took more than {self.limit:.0f} s")

    def _end(self, why: str) -> None:
        print(f"recorder: {why}", flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        os._exit(BROKEN)


def _last_line(report: pytest.TestReport) -> str:
    text: Any = report.longrepr
    text = text[2] if isinstance(text, tuple) else report.longreprtext
    lines = [line for line in str(text).splitlines() if line.startswith("E ")] or str(text).splitlines()[-1:]
    return (lines[0][1:].strip() if lines and lines[0].startswith("E ") else "".join(lines).strip())[:300]


def pytest_configure(config: pytest.Config) -> None:
    """Registers the recorder where FFNAS_RECORDS names a file."""
    path = os.environ.get("FFNAS_RECORDS")
    if path:
        share, limit = os.environ.get("FFNAS_SHARE", "0/1"), float(os.environ.get("FFNAS_TEST_LIMIT", "30"))
        config.pluginmanager.register(Recorder(Path(path), share, limit), "ffnas-recorder")
