"""A run in progress: where its results go, who evaluates its candidates, how long its phases took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from engine.files import write_json_atomic
from engine.training.loop import PhaseLog
from search.config.identity import facts
from search.context.models import Models
from search.ledger.board import Board, LocalBoard, RankBoard
from search.ledger.joined import load_awaited
from search.ledger.ledger import Ledger
from search.ledger.shared_board import LedgerBoard
from search.rundir import RunDir
from search.tracking import Scalars


@dataclass
class Context(Models):
    """A run in progress.

    Attributes:
        rundir, ledger: where results go.
        scalars: trackers, where wanted.
        joined: run directory of the search this process helps; its weights are waited for and read from there.
        seconds: wall time per finished phase; kept in phases.json, so a resumed run reports the whole time.
        counts_time: whether phases add their time; not where several run at once, whose time is counted in one.
    """

    rundir: RunDir
    ledger: Ledger
    scalars: Scalars | None = None
    joined: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    counts_time: bool = True

    def __post_init__(self) -> None:
        if self._phases.exists():
            try:
                self.seconds = {str(k): float(v) for k, v in json.loads(self._phases.read_text()).items()}
            except (OSError, ValueError, TypeError, AttributeError):  # times are for the reader, results need none
                self.reporter.info(f"{self._phases} is damaged: times are counted from here")

    @property
    def _phases(self) -> Path:
        return self.rundir.path / "phases.json"

    def board(self, stage: str, model: nn.Module) -> Board:
        """Who evaluates which candidates of `stage`; `model` is what their first weights come from."""
        if self.ledger.shared:
            table = self.space.limits.costs.table if self.space.limits is not None else None
            depends = facts(self.config, self.data, self.teacher.model, model, table)
            return LedgerBoard(self.ledger, stage, depends)
        if self.ranks.size > 1:
            return RankBoard(self.ranks, self.ledger, stage)
        return LocalBoard(self.ledger, stage)

    def load_joined(self, name: str | Path, model: nn.Module) -> None:
        """The weights file `name` of the joined search, loaded into `model` (`search.ledger.joined`)."""
        if self.joined is None:
            raise RuntimeError("no search was joined")
        load_awaited(self.joined, name, model, self.reporter)

    def log_phase(self, line: PhaseLog) -> None:
        """Appends one line of mean losses to log.jsonl and, where wanted, to the trackers."""
        self.rundir.log({"phase": line.phase, "step": line.step, "seconds": line.seconds, **line.losses})
        if self.scalars is not None:
            self.scalars.phase(line)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the wall time of the block, if it finishes, to `seconds[name]`; the user is told what is done."""
        self.reporter.doing(name)
        began = time.monotonic()
        yield
        if not self.counts_time:
            return
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
        write_json_atomic(self._phases, self.seconds)
