"""Work shared out among the ranks of a run, outside of collectives: claims, results, and who is still alive.

    key "claim/7" -> the rank that works on 7        key "done/7" -> its result, the first one written
    key "beat/1"  -> a counter that rank 1 raises while it lives

A rank takes what is free, or what a dead rank had claimed; taking is one compare-and-set, so two never get the same.
No rank waits for another to take part in anything: one that dies leaves its claims to the others, and nothing else
changes for them until the next collective.

Chosen: torch's TCPStore, held by the first rank, which owns the run and without which nothing goes on anyway.
Rejected: the key-value store of the process group itself. It is reached through private names only, and `torchrun`
keeps it across restarts, so that claims of an earlier attempt would have to be told apart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

import torch.distributed as dist

from engine.errors import UserError
from engine.training.parallel import RankLost, Ranks, contact

BEAT = 0.25
"""Seconds between two signs of life."""

SILENCE = 30.0
"""Seconds without a sign of life after which a rank counts as dead. Longer than anything holds Python's lock."""


class Claims:
    """Work of one phase, by number.

    Use as a context manager: inside, a thread gives signs of life and calls `on_beat`.

    Args:
        ranks: the processes; more than one.
        name: of the phase; the same on every rank, another for every phase.
        silence: seconds after which a silent rank's claims are free.
        on_beat: called by the thread between two signs of life, and once more at the end; its `UserError` and
            `RankLost` are raised by the next call of any other method.
    """

    def __init__(
        self, ranks: Ranks, name: str, *, silence: float = SILENCE, on_beat: Callable[[], None] | None = None
    ) -> None:
        if ranks.store is None:
            raise ValueError("claims are for several ranks")
        self.ranks = ranks
        self.silence = silence
        self._store = dist.PrefixStore(f"ffnas/{name}", ranks.store)
        self._on_beat = on_beat
        self._heard: dict[str, tuple[bytes, float]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: UserError | RankLost | None = None

    def __enter__(self) -> Claims:
        self._beat(0)
        self._thread = threading.Thread(target=self._live, name="ffnas-claims", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if kind is None:
            self._check()
            if self._on_beat is not None:
                self._on_beat()

    def claim(self, number: int) -> bool:
        """Whether `number` is this rank's to work on now: nobody else's, or only a dead rank's."""
        self._check()
        me = str(self.ranks.rank)
        with contact():
            owner = self._store.compare_set(f"claim/{number}", "", me).decode()
            if owner != me and not self._alive(owner):
                owner = self._store.compare_set(f"claim/{number}", owner, me).decode()
        return owner == me

    def finish(self, number: int, result: bytes) -> None:
        """Publishes the result of `number`; if there is one already, that one stays."""
        self._check()
        with contact():
            self._store.compare_set(f"done/{number}", "", result.decode())

    def finished(self, numbers: Iterable[int]) -> dict[int, bytes]:
        """The results there are of `numbers`."""
        self._check()
        with contact():
            return {n: self._store.get(f"done/{n}") for n in numbers if self._store.check([f"done/{n}"])}

    def settle(self, number: int, value: bytes) -> bytes:
        """`value`, or what the first rank to ask for `number` gave."""
        self._check()
        with contact():
            return self._store.compare_set(f"settled/{number}", "", value.decode())

    def _alive(self, rank: str) -> bool:
        if rank == str(self.ranks.rank):
            return True
        beat, now = self._store.get(f"beat/{rank}"), time.monotonic()  # it beat before it claimed anything
        last, since = self._heard.get(rank, (b"", now))
        if beat != last:
            since = now
        self._heard[rank] = (beat, since)
        return now - since < self.silence

    def _beat(self, count: int) -> None:
        with contact():
            self._store.set(f"beat/{self.ranks.rank}", str(count))

    def _live(self) -> None:
        count = 0
        try:
            while not self._stop.wait(BEAT):
                count += 1
                self._beat(count)
                if self._on_beat is not None:
                    self._on_beat()
        except (UserError, RankLost) as error:
            self._error = error

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
