"""Random search: independent draws from the space, without repetition; the baseline every sampler has to beat.

Rejected: a low-discrepancy sequence. Spaces of expressions have no coordinates it could fill evenly.
"""

from __future__ import annotations

from engine.architecture.architecture import Architecture
from search.samplers.base import Sampler


class RandomSampler(Sampler):
    """Draws from the space; learns nothing."""

    name = "random"

    def _choose(self) -> Architecture | None:
        return self._first_new(self._sample)
