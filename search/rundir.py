"""The run directory: where every file of a search lies, one process at a time, and its log.

    runs/NAME/  config.yaml   study.db   log.jsonl   summary.json   report.html   checkpoints/   plots/
                stage1/ stage2/ stage3/ (candidates.csv, best.json)   baselines/NAME/   predictions/NAME.npz
                best/architecture.json   best/model/   resolved/NAME/

Chosen: an advisory lock (`flock`) on `.lock` inside the directory. The kernel gives it back when the process ends in
whatever way, so a killed run never has to be unlocked by hand. Rejected: a file that exists while the run is alive; it
outlives `kill -9`.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from engine.errors import UserError
from engine.files import is_leftover, remove_leftovers

LOCK, LAUNCH = ".lock", ".launch"
LATENCY_TABLE = "latency_table.json"
"""Copy of the latency table a run used."""
_TAIL = 1 << 20


class RunDir:
    """Paths of one run directory; `open` creates and locks it. Building one touches no file.

    Args:
        path: the directory, existing or not.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        self._log: IO[bytes] | None = None

    @property
    def config(self) -> Path:
        """config.yaml: the resolved configuration."""
        return self.path / "config.yaml"

    @property
    def ledger(self) -> Path:
        """study.db: finished trials (SQLite)."""
        return self.path / "study.db"

    @property
    def launch(self) -> Path:
        """.launch: which launch of `torchrun` began the run (`search.restart`)."""
        return self.path / LAUNCH

    @property
    def log_file(self) -> Path:
        """log.jsonl: losses while training, one JSON object per line."""
        return self.path / "log.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def architecture(self) -> Path:
        """best/architecture.json: the found architecture."""
        return self.best / "architecture.json"

    @property
    def model(self) -> Path:
        """best/model/: the exported model."""
        return self.best / "model"

    def stage(self, number: int) -> Path:
        """stage1/, stage2/ or stage3/."""
        if number not in (1, 2, 3):
            raise ValueError(f"stage {number}: stages are 1, 2 and 3")
        return self.path / f"stage{number}"

    def candidates(self, number: int) -> Path:
        """stageN/candidates.csv: the trials of a stage."""
        return self.stage(number) / "candidates.csv"

    def baseline(self, name: str) -> Path:
        """baselines/NAME/: weights and trials of a baseline."""
        return self.path / "baselines" / name

    def resolved(self, budget: Mapping[str, Any]) -> Path:
        """resolved/NAME/: the answer under a budget, NAME such as `latency_ms-8` or `params-1500-2000+flops-3000`."""
        parts = []
        for name, value in budget.items():
            values = value if isinstance(value, (list, tuple)) else [value]
            parts.append("-".join([name, *(f"{v:.12g}" for v in values)]))
        return self.path / "resolved" / "+".join(parts)

    def open(self, *, resume: bool = False) -> RunDir:
        """Creates the directory (or enters an existing one) and takes its lock; returns itself.

        Args:
            resume: continue in a directory that holds a run; without it, the directory must be new or empty.

        Raises:
            UserError: there is already something in it, there is nothing to resume, it cannot be written, or another
                process is running in it.
        """
        if resume and not self.config.is_file():
            raise UserError(f"--resume {self.path}: no config.yaml there, so this is no run to resume: check the path")
        if not resume:
            self._refuse_used()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"run directory {self.path}: cannot be written ({reason}): choose another place") from error
        try:
            if not resume:
                self._refuse_used()  # somebody may have been faster between the check and the lock
            remove_leftovers(self.path)  # of a writer that was killed; nobody else writes while we hold the lock
            for folder in (self.checkpoints, self.plots, self.best, *map(self.stage, (1, 2, 3))):
                folder.mkdir(exist_ok=True)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Closes the log and gives the lock back; harmless when not open."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, entry: Mapping[str, Any]) -> None:
        """Appends one line to log.jsonl: whole lines only, NaN and infinity as null.

        The first call after a crash drops a torn last line. Each line reaches the operating system before this
        returns, so killing the process loses none.
        """
        line = json.dumps({k: _finite(v) for k, v in entry.items()}, ensure_ascii=False, allow_nan=False)
        try:
            if self._log is None:
                drop_torn_line(self.log_file)
                self._log = open(self.log_file, "ab", buffering=0)  # noqa: SIM115  kept open for the run
            self._log.write(line.encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self.log_file}: cannot be written ({error.strerror}): free disk space") from error

    def _refuse_used(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run directory {self.path}: a file of that name exists: choose another --name")
        # a run killed before its first file leaves the lock, empty folders and a part of that file: nothing to lose
        if self.path.is_dir() and any(not _is_nothing(entry) for entry in self.path.rglob("*")):
            raise UserError(
                f"run directory {self.path}: is not empty: continue it with --resume {self.path},"
                " or choose another --name"
            )

    def _acquire(self) -> None:
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise UserError(
                f"run directory {self.path}: in use by another process ({holder}): stop it or wait for its end"
            ) from error
        except OSError as error:  # some network file systems know no locks; refusing to run there would help nobody
            warnings.warn(
                f"{self.path} cannot be locked ({error.strerror}): do not start a second run in it", stacklevel=3
            )
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._lock = handle


def default_name(preset: str, runs: str | os.PathLike[str]) -> str:
    """A run name nobody has used in the folder `runs`: `YYYYmmdd-HHMMSS-PRESET`, numbered if taken."""
    base = f"{time.strftime('%Y%m%d-%H%M%S')}-{preset}"
    name, number = base, 2
    while (Path(runs) / name).exists():
        name, number = f"{base}-{number}", number + 1
    return name


def drop_torn_line(path: Path) -> None:
    """Cuts a JSON-lines file behind its last whole, readable line; a missing file is left missing."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - _TAIL)
        file.seek(start)
        tail = file.read()
        keep = len(tail)
        while keep and not _is_json_line(tail[tail.rfind(b"\n", 0, keep - 1) + 1 : keep]):
            keep = tail.rfind(b"\n", 0, keep - 1) + 1
        if keep < len(tail):
            file.truncate(start + keep)


def _is_nothing(path: Path) -> bool:
    return path.name in (LOCK, LAUNCH) or is_leftover(path) or (path.is_dir() and not path.is_symlink())


def _is_json_line(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
