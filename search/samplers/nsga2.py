"""The `nsga2` sampler: Optuna's NSGA-II over the genes, for the score and any costs at once.

It looks for the whole front of score against costs (parameters, unless told otherwise) inside the budget; who wants the
best score alone is served better by others. `population` finished trials, in the order they arrive, are a generation.

Rejected: the score as the only objective. Selection is then a plain genetic algorithm's, which `evolution` is already.

Source: Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from engine.architecture.architecture import Architecture
from search.samplers.base import Observation, Space
from search.samplers.library import LibrarySampler

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler, NSGAIISampler


class NSGA2Sampler(LibrarySampler):
    """NSGA-II.

    Args:
        space, seed, initial: see `Sampler`.
        population: members of a generation; so many candidates are random.
        costs: what is to be small beside a large score; None for the parameters.
    """

    name = "nsga2"

    def __init__(
        self,
        space: Space,
        seed: int,
        *,
        initial: Sequence[Architecture] = (),
        population: int = 20,
        costs: Sequence[Callable[[Architecture], float]] | None = None,
    ) -> None:
        if population < 2:
            raise ValueError(f"population {population}: must be at least 2")
        super().__init__(space, seed, initial=initial, startup=population)
        self.population = population
        self.costs = [space.parameters] if costs is None else list(costs)

    @property
    def directions(self) -> tuple[str, ...]:
        """Of score and costs, in Optuna's words."""
        return "maximize", *("minimize" for _ in self.costs)

    def _optuna(self, seed: int) -> BaseSampler:
        from optuna.samplers import NSGAIISampler

        return NSGAIISampler(seed=seed, population_size=self.population)

    def _values(self, observation: Observation) -> list[float]:
        return [*super()._values(observation), *(float(cost(observation.architecture)) for cost in self.costs)]

    def _before_asking(self, study: Study) -> None:
        # Optuna gives a generation's parents in another order when it chooses them than when it looks them up
        cast("NSGAIISampler", study.sampler).get_parent_population(study, self._learned // self.population)

    def _attributes(self, number: int) -> dict[str, Any]:
        return {"NSGAIISampler:generation": number // self.population}
