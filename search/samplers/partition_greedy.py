"""The `partition_greedy` sampler: the partition as EfficientBERT's published code has it, for comparison.

It differs from `partition` where that code differs from what it cites: bounds have no exploration term, so the leaf
with the best mean is always taken, and the tree has one level up to 400 trials and one more for every further 400.
Equal scores, which crash that code, are no special case here (`search.samplers.tree`).

Rejected: the published code's remaining differences (its duplicate test, its draws until one fits). They are faults of
execution, and would only make the comparison easier to win.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.architecture.architecture import Architecture
from search.samplers.base import Space
from search.samplers.partition import PartitionSampler

TRIALS_PER_LEVEL = 400


class PartitionGreedySampler(PartitionSampler):
    """`PartitionSampler` without exploration, with a shallow tree. Arguments as there."""

    name = "partition_greedy"

    def __init__(
        self,
        space: Space,
        seed: int,
        *,
        initial: Sequence[Architecture] = (),
        startup: int = 80,
        rebuild_every: int = 10,
    ) -> None:
        super().__init__(space, seed, initial=initial, startup=startup, rebuild_every=rebuild_every, exploration=0.0)

    def _max_depth(self, trials: int) -> int:
        return 1 + trials // TRIALS_PER_LEVEL
