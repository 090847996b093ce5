"""Samplers: who proposes candidates. One interface, one registry; `make_sampler` builds one by name."""

from __future__ import annotations

import inspect
from types import MappingProxyType
from typing import Any

from engine.errors import UserError
from search.samplers.base import Observation, Sampler, Space, SpaceExhausted
from search.samplers.evolution import EvolutionSampler
from search.samplers.gaussian import GaussianSampler
from search.samplers.local import LocalSampler
from search.samplers.nsga2 import NSGA2Sampler
from search.samplers.partition import PartitionSampler
from search.samplers.partition_greedy import PartitionGreedySampler
from search.samplers.random_search import RandomSampler
from search.samplers.tpe import TPESampler

__all__ = [
    "SAMPLERS",
    "EvolutionSampler",
    "GaussianSampler",
    "LocalSampler",
    "NSGA2Sampler",
    "Observation",
    "PartitionGreedySampler",
    "PartitionSampler",
    "RandomSampler",
    "Sampler",
    "Space",
    "SpaceExhausted",
    "TPESampler",
    "make_sampler",
    "sampler_options",
]

SAMPLERS = MappingProxyType(
    {
        cls.name: cls
        for cls in (
            RandomSampler,
            PartitionSampler,
            PartitionGreedySampler,
            EvolutionSampler,
            LocalSampler,
            TPESampler,
            NSGA2Sampler,
            GaussianSampler,
        )
    }
)


def sampler_options(name: str) -> list[str]:
    """Options a sampler in `SAMPLERS` knows, `initial` among them."""
    return [p for p in inspect.signature(SAMPLERS[name]).parameters if p not in ("space", "seed")]


def make_sampler(name: str, space: Space, seed: int, **options: Any) -> Sampler:
    """Builds a sampler by name.

    Args:
        name: a name in `SAMPLERS`.
        space: where candidates come from.
        seed: of every random choice.
        options: `initial` and the sampler's own options.

    Raises:
        UserError: unknown name or option.
    """
    if name not in SAMPLERS:
        raise UserError(f"sampler.name: {name!r} is not known: choose one of {', '.join(SAMPLERS)}")
    known = sampler_options(name)
    for option in options:
        if option not in known:
            raise UserError(f"sampler.{option}: sampler {name!r} has no such option; it knows {', '.join(known)}")
    return SAMPLERS[name](space, seed, **options)
