"""The `local` sampler: neighbourhood descent with restarts.

From the best of a few random candidates it visits the neighbours (`search.samplers.neighbours`) in random order and
moves to the first better one; where all have been visited it has found a local optimum, and starts again at random.

Rejected: steepest descent. A neighbourhood has dozens of members and evaluations are what counts: on the table of
`benchmarks.samplers` moving at the first improvement needs fewer.

Source: local search is a strong baseline of architecture search: White et al., "Local Search is State of the Art for
Neural Architecture Search Benchmarks", 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.architecture.architecture import Architecture
from search.ledger.records import digest
from search.samplers.base import Observation, Sampler, Space
from search.samplers.neighbours import neighbours


class LocalSampler(Sampler):
    """Neighbourhood descent.

    Args:
        space, seed, initial: see `Sampler`.
        startup: random candidates at every start; the descent begins at the best of them.
    """

    name = "local"

    def __init__(self, space: Space, seed: int, *, initial: Sequence[Architecture] = (), startup: int = 10) -> None:
        super().__init__(space, seed, initial=initial)
        if startup < 1:
            raise ValueError(f"startup {startup}: must be at least 1")
        self.startup = startup
        self._begin = 0

    def _choose(self) -> Architecture | None:
        if len(self.observed) - self._begin < self.startup:
            return self._first_new(self._sample)
        here = self._current()
        if here is not None:
            new = [a for a in neighbours(self.space, here) if digest(self.space.key(a)) not in self._seen]
            while new:
                found = self._accept(new.pop(int(self._rng.integers(len(new)))))
                if found is not None:
                    return found
        if not self._pending:  # those still running may yet be better
            self._begin = len(self.observed)
        return self._first_new(self._sample)

    def _current(self) -> Architecture | None:
        """The best candidate since the last start, the earliest of equals."""
        scored = [o for o in self.observed[self._begin :] if o.score is not None]
        return max(scored, key=_score).architecture if scored else None

    def _own_state(self) -> dict[str, Any]:
        return {"begin": self._begin}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self._begin = int(state["begin"])


def _score(observation: Observation) -> float:
    assert observation.score is not None
    return observation.score
