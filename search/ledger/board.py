"""Where the candidates of a stage are shared out: one process, the ranks of `torchrun`, or workers on one ledger.

Every process runs the same trial loop (`search.scoring.trials`) with a sampler of its own, which proposes the same
candidates everywhere, since proposals depend on the seed and on finished trials only. A board says who evaluates which,
and tells everybody what came out. So there is no process that must live for the others to have work, and what is found
does not depend on how many they are.

Rejected: one process that proposes and hands out. It has to serve the others while it evaluates candidates itself, and
takes the stage with it when it dies.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from engine.architecture.architecture import Architecture
from engine.training.claims import Claims
from engine.training.parallel import Ranks
from search.ledger.ledger import Ledger
from search.ledger.records import Candidate, Trial

POLL = (0.02, 0.25)
"""Seconds between two looks at what the other ranks have finished: at first, and in the end."""


class Board(Protocol):
    """What the trial loop asks. Use as a context manager, for one pass over a stage.

    Attributes:
        workers: among how many processes candidates should be divided; decides how many one takes at a time.
    """

    workers: int

    def __enter__(self) -> Board: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def settle(self, candidates: Sequence[Candidate]) -> list[Architecture]:
        """What is to be evaluated under these numbers: `candidates`, or what another process made of them before."""
        ...

    def finished(self) -> Mapping[int, Trial]:
        """All trials known to be finished, by number."""
        ...

    def claim(self, numbers: Sequence[int], limit: int, *, whole: bool) -> list[int]:
        """Those of `numbers` that are this process's to evaluate now: the first free ones, at most `limit`.

        Args:
            numbers: settled and not finished, ascending.
            limit: at most so many.
            whole: all `numbers` or none.
        """
        ...

    def finish(self, trial: Trial) -> None:
        """Records the trial of a claimed number; another one's trial that was faster stays."""
        ...

    def wait(self) -> None:
        """Returns when something may have changed. Called where others work on everything that is left."""
        ...


class LocalBoard:
    """One process, its own ledger."""

    workers = 1

    def __init__(self, ledger: Ledger, stage: str) -> None:
        self.ledger, self.stage = ledger, stage

    def __enter__(self) -> LocalBoard:
        self._finished = {t.number: t for t in self.ledger.trials(self.stage)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        return None

    def settle(self, candidates: Sequence[Candidate]) -> list[Architecture]:
        return [c.architecture for c in candidates]

    def finished(self) -> Mapping[int, Trial]:
        return self._finished

    def claim(self, numbers: Sequence[int], limit: int, *, whole: bool) -> list[int]:
        return list(numbers)[:limit]

    def finish(self, trial: Trial) -> None:
        self.ledger.record(trial)
        self._finished[trial.number] = trial

    def wait(self) -> None:
        raise RuntimeError("one process waits for nobody")


class RankBoard:
    """The ranks of one run; the first one has the ledger and writes into it what any of them finishes.

    Args:
        ranks: the processes of the run.
        ledger: the first rank's is read and written; the others' is not touched.
        stage: name of the stage, and of nothing else in this run.
        silence: as of `engine.training.claims.Claims`.
    """

    def __init__(self, ranks: Ranks, ledger: Ledger, stage: str, **options: float) -> None:
        self.ranks, self.ledger, self.stage = ranks, ledger, stage
        self.workers = ranks.size
        self._claims = Claims(ranks, stage, on_beat=self._record if ranks.is_first else None, **options)
        self._open: set[int] = set()
        self._finished: dict[int, Trial] = {}
        self._recorded: set[int] = set()
        self._lock = threading.Lock()
        self._pause = POLL[0]

    def __enter__(self) -> RankBoard:
        before = self.ranks.agree(lambda: [t.to_dict() for t in self.ledger.trials(self.stage)])
        self._finished = {t["number"]: Trial.from_dict(t) for t in before}
        self._recorded = set(self._finished)
        self._claims.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._claims.__exit__(kind, *rest)

    def settle(self, candidates: Sequence[Candidate]) -> list[Architecture]:
        first = candidates[0].number
        texts = [str(c.architecture) for c in candidates]
        settled = json.loads(self._claims.settle(first, json.dumps(texts).encode()))
        with self._lock:
            self._open |= {c.number for c in candidates} - set(self._finished)
        return [
            c.architecture if text == own else Architecture.parse(text)
            for c, own, text in zip(candidates, texts, settled, strict=True)
        ]

    def finished(self) -> Mapping[int, Trial]:
        with self._lock:
            for number, text in self._claims.finished(sorted(self._open)).items():
                self._finished[number] = Trial.from_dict(json.loads(text))
                self._open.discard(number)
            return dict(self._finished)

    def claim(self, numbers: Sequence[int], limit: int, *, whole: bool) -> list[int]:
        claimed: list[int] = []
        for number in numbers:
            if len(claimed) == limit:
                break
            if self._claims.claim(number):
                claimed.append(number)
            elif whole:
                return []  # the others are the same rank's, and free as soon as it counts as dead
        self._pause = POLL[0]
        return claimed

    def finish(self, trial: Trial) -> None:
        self._claims.finish(trial.number, json.dumps(trial.to_dict()).encode())
        if self.ranks.is_first:
            self._record()

    def wait(self) -> None:
        time.sleep(self._pause)
        self._pause = min(POLL[1], 1.5 * self._pause)

    def _record(self) -> None:
        """Writes what has come in since the last time; called by the beating thread too."""
        finished = self.finished()
        with self._lock:
            for number in sorted(set(finished) - self._recorded):
                self.ledger.record(finished[number])
                self._recorded.add(number)
