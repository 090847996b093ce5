"""The `evolution` sampler: regularized evolution.

The population is the `population` youngest trials; the child of the best of `tournament` random members replaces the
oldest. Aging instead of removing the worst keeps a lucky score from breeding for ever.

Rejected: crossover; see `search.space.mutate`.

Source: Real et al., "Regularized Evolution for Image Classifier Architecture Search", AAAI 2019, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.architecture.architecture import Architecture
from search.samplers.base import Sampler, Space


class EvolutionSampler(Sampler):
    """Regularized evolution with the space's mutations.

    Args:
        space, seed, initial: see `Sampler`.
        population: members; so many candidates are random (the initial ones count).
        tournament: members drawn, with replacement, for each child; the best of them is the parent.
    """

    name = "evolution"

    def __init__(
        self,
        space: Space,
        seed: int,
        *,
        initial: Sequence[Architecture] = (),
        population: int = 30,
        tournament: int = 8,
    ) -> None:
        super().__init__(space, seed, initial=initial)
        if population < 1 or tournament < 1:
            raise ValueError(f"population {population}, tournament {tournament}: must be at least 1")
        self.population, self.tournament = population, tournament

    def _choose(self) -> Architecture | None:
        if len(self.observed) < self.population:
            return self._first_new(self._sample)
        return self._first_new(self._child)

    def _child(self) -> Architecture:
        alive = self.observed[-self.population :]
        drawn = [alive[int(i)] for i in self._rng.integers(len(alive), size=self.tournament)]
        parent = max(drawn, key=lambda o: -math.inf if o.score is None else o.score)
        return self._mutation(parent.architecture)
