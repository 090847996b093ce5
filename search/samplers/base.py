"""What every sampler does: propose candidates never seen before, learn from finished trials, and save its state.

A sampler's proposals are a function of its seed, its space and what it observed, in order; never of the clock, of
memory addresses or of the order of a set. Replaying the same calls, or loading a saved state, gives the same
proposals.

Rejected: making duplicates the caller's business. Each sampler would then need a way out of a small space in which
everything has been tried.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from engine.architecture.architecture import Architecture
from engine.errors import UserError
from search.ledger.ledger import Trial
from search.ledger.records import PackedArchitecture, digest
from search.samplers.neighbours import Bounded
from search.space import NoNeighbour

FORMAT = 2
MAX_TRIES = 20_000
"""Draws, at most, before a space counts as exhausted."""


class Space(Bounded, Protocol):
    """What samplers ask of a search space (`search.space.SearchSpace`)."""

    def sample(self, rng: np.random.Generator) -> Architecture:
        """A random architecture of the space."""
        ...

    def mutate(self, architecture: Architecture, rng: np.random.Generator) -> Architecture:
        """A random neighbour of an architecture (which need not lie in the space), in the space."""
        ...

    def contains(self, architecture: Architecture) -> bool:
        """Whether it lies in the space."""
        ...

    def encode(self, architecture: Architecture) -> np.ndarray:
        """The paper's features, float, of a fixed length."""
        ...

    def features(self, architecture: Architecture) -> np.ndarray:
        """Structure and cost, float [layers, D]."""
        ...

    def parameters(self, architecture: Architecture) -> int:
        """Parameter count."""
        ...

    def key(self, architecture: Architecture) -> str:
        """Equal for architectures that are the same candidate."""
        ...


class SpaceExhausted(RuntimeError):
    """Nothing new was found in the space within a bounded number of draws."""


@dataclass(frozen=True)
class Observation:
    """A finished trial as a sampler sees it; `score` is None where it failed."""

    if TYPE_CHECKING:
        architecture: Architecture
    else:
        architecture: PackedArchitecture = PackedArchitecture()
    score: float | None


class Sampler(ABC):
    """Base of all samplers.

    Args:
        space: where candidates come from.
        seed: of every random choice.
        initial: proposed first, in order (seeds such as hand-designed architectures).

    Attributes:
        duplicates: drawn candidates that were dropped because they had been proposed or observed before.
        observed: finished trials, in the order they arrived.
    """

    name: ClassVar[str]

    def __init__(self, space: Space, seed: int, *, initial: Sequence[Architecture] = ()) -> None:
        self.space = space
        self.duplicates = 0
        self.observed: list[Observation] = []
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._initial = list(initial)
        self._pending: dict[str, Architecture] = {}
        self._seen: set[bytes] = set()  # digests of keys

    def propose(self, n: int = 1) -> list[Architecture]:
        """1 to `n` new candidates; fewer than `n` only where the space has no more.

        Raises:
            SpaceExhausted: the space has nothing new.
        """
        if n < 1:
            raise ValueError(f"propose({n}): ask for at least one candidate")
        proposed: list[Architecture] = []
        while len(proposed) < n:
            architecture = self._next()
            if architecture is None:
                break
            proposed.append(architecture)
        if not proposed:
            raise SpaceExhausted(f"nothing new among {len(self._seen)} candidates after {self._tries()} draws")
        return proposed

    def observe(self, trials: Iterable[Trial]) -> None:
        """Takes in finished trials, of own proposals or not. A candidate observed before keeps its first score."""
        for trial in trials:
            key = self.space.key(trial.architecture)
            if key not in self._pending and digest(key) in self._seen:
                continue
            self._pending.pop(key, None)
            self._seen.add(digest(key))
            self.observed.append(Observation(trial.architecture, trial.score))
            self._learn(self.observed[-1])

    def state_dict(self) -> dict[str, Any]:
        """Everything later proposals depend on, but for space and options, as JSON values."""
        return {
            "format": FORMAT,
            "sampler": self.name,
            "rng": self._rng.bit_generator.state,
            "initial": [str(a) for a in self._initial],
            "pending": [str(a) for a in self._pending.values()],
            "observed": [[str(o.architecture), o.score] for o in self.observed],
            "duplicates": self.duplicates,
            "own": self._own_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict()` of a sampler of the same kind, space and options.

        Raises:
            UserError: the state is damaged or another sampler's.
        """
        kind = (state.get("sampler"), state.get("format"))
        if kind != (self.name, FORMAT):
            raise UserError(
                f"sampler state: is of sampler {kind[0]!r}, format {kind[1]!r}; this is {self.name!r}, format {FORMAT}:"
                " resume with the run's own configuration"
            )
        try:
            initial = [Architecture.parse(text) for text in state["initial"]]
            pending = [Architecture.parse(text) for text in state["pending"]]
            observed = [(Architecture.parse(text), _score(score)) for text, score in state["observed"]]
            self.duplicates = int(state["duplicates"])
            self._rng.bit_generator.state = state["rng"]
            self._load_own_state(state["own"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"sampler state: is damaged ({type(error).__name__}: {error}): start a new run") from error
        self._initial = initial
        self._pending = {self.space.key(a): a for a in pending}
        self.observed = [Observation(a, score) for a, score in observed]
        self._seen = {digest(self.space.key(a)) for a in (*pending, *(a for a, _ in observed))}
        self._forget()
        for observation in self.observed:
            self._learn(observation)

    def diagnostics(self) -> dict[str, Any]:
        """What a report shows of how candidates were chosen, as JSON values."""
        return {"sampler": self.name, "observed": len(self.observed), "duplicates": self.duplicates}

    @abstractmethod
    def _choose(self) -> Architecture | None:
        """The next candidate, new and marked as such by `_accept`; None if none was found in a bounded search."""

    def _learn(self, observation: Observation) -> None:  # noqa: B027  learning nothing is a choice
        """Called once for every entry of `observed`, in order."""

    def _forget(self) -> None:  # noqa: B027
        """Called before everything is learned anew."""

    def _own_state(self) -> dict[str, Any]:
        """What a sampler keeps beside its observations and cannot learn from them again, as JSON values."""
        return {}

    def _load_own_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Takes over what `_own_state` returned."""

    def _next(self) -> Architecture | None:
        while self._initial:
            architecture = self._accept(self._initial.pop(0))
            if architecture is not None:
                return architecture
        return self._choose() or self._first_new(self._anything)

    def _tries(self) -> int:
        """Draws before giving up: enough to meet the last of as many equally likely candidates as have been seen."""
        return min(MAX_TRIES, 100 + 10 * len(self._seen))

    def _first_new(self, draw: Callable[[], Architecture]) -> Architecture | None:
        for _ in range(self._tries()):
            architecture = self._accept(draw())
            if architecture is not None:
                return architecture
        return None

    def _accept(self, architecture: Architecture) -> Architecture | None:
        key = self.space.key(architecture)
        if self._is_known(key):
            return None
        self._seen.add(digest(key))
        self._pending[key] = architecture
        return architecture

    def _is_known(self, key: str) -> bool:
        """Whether a drawn candidate was proposed or observed before; counts it if so."""
        known = digest(key) in self._seen
        self.duplicates += known
        return known

    def _sample(self) -> Architecture:
        return self.space.sample(self._rng)

    def _mutation(self, architecture: Architecture) -> Architecture:
        try:
            return self.space.mutate(architecture, self._rng)
        except NoNeighbour:
            return self._sample()

    def _anything(self) -> Architecture:
        """A draw or a mutation of anything known: the last way to something new where a space repeats itself."""
        known = len(self.observed) + len(self._pending)
        if not known or self._rng.random() < 0.5:
            return self._sample()
        index = int(self._rng.integers(known))
        if index < len(self.observed):
            return self._mutation(self.observed[index].architecture)
        return self._mutation(list(self._pending.values())[index - len(self.observed)])


def _score(value: Any) -> float | None:
    if value is not None and not math.isfinite(value):
        raise ValueError(f"score {value} is not finite")
    return value
