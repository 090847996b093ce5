"""Ranks find one another in a store that may hold what earlier processes left there.

`torchrun --max-restarts` starts all ranks anew, but (seen with torch 2.13) keeps the store through which they exchange
their addresses: the new ranks read the dead ones' and wait for ever. So they first agree on a name that none used
before, under which everything else is kept:

    rank r   hello/r = a random word of this process
    rank 0   round = {id: random, words: those in hello/0, 1, ...}, again whenever one changes
    rank r   ack/r = id of a round that names its word
    rank 0   go = id, once every rank has acknowledged that round

Rejected: the environment's restart counter as the name. Each machine counts its own failures, so the counters of a
run's machines may differ.
"""

from __future__ import annotations

import json
import time
import uuid

import torch.distributed as dist

POLL = 0.05
"""Seconds between two looks at the store."""

ARRIVAL = 600.0
"""Seconds within which all ranks must have started."""


def fresh(store: dist.Store, rank: int, size: int, *, patience: float = ARRIVAL) -> dist.Store:
    """A part of `store` that is the same on all `size` ranks and was never used before.

    Raises:
        dist.DistError: not all ranks arrived in `patience` seconds.
    """
    store = dist.PrefixStore("ffnas/rendezvous", store)
    word = uuid.uuid4().hex
    store.set(f"hello/{rank}", word)
    deadline = time.monotonic() + patience
    call: dict = {"id": "", "words": []}
    while time.monotonic() < deadline:
        if rank == 0:
            words = [_get(store, f"hello/{r}") for r in range(size)]
            if words != call["words"] and all(words):
                call = {"id": uuid.uuid4().hex, "words": words}
                store.set("round", json.dumps(call))
            if call["id"] and all(_get(store, f"ack/{r}") == call["id"] for r in range(1, size)):
                store.set("go", call["id"])
                return dist.PrefixStore(call["id"], store)
        else:
            call = json.loads(_get(store, "round") or '{"id": "", "words": []}')
            if word in call["words"]:
                store.set(f"ack/{rank}", call["id"])
                if _get(store, "go") == call["id"]:
                    return dist.PrefixStore(call["id"], store)
        time.sleep(POLL)
    raise dist.DistError(f"not all {size} ranks arrived within {patience:.0f} s")


def _get(store: dist.Store, key: str) -> str:
    """The value of a key, empty if it has none."""
    return store.get(key).decode() if store.check([key]) else ""
