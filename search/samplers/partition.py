"""The `partition` sampler: a learned partition of the space decides where the next candidate is drawn.

After `startup` random candidates a tree (`search.samplers.tree`) parts the observed architectures into good and bad
regions; the next candidate comes from the leaf with the highest upper confidence bound: draws from the space and
mutations of the leaf's best members, until one lies in the leaf. The tree is rebuilt every `rebuild_every` trials. A
failed trial counts as the worst score seen; candidates still running count as visits.

Source: LaNAS, Wang et al. 2019, "Sample-Efficient Neural Architecture Search by Learning Action Space"; EfficientBERT,
Dong et al. 2021, section 3 (80 random candidates, then a rebuild every 10). Variants: docs/decisions/0026.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.architecture.architecture import Architecture
from search.samplers.base import Observation, Sampler, Space
from search.samplers.tree import Node, agreement, build, count, descend, describe, ranks

MIN_LEAF = 10
MAX_DEPTH = 8
CHUNK = 4
"""Candidates drawn and encoded at once."""
CHUNKS = 32
"""Chunks drawn before the candidate nearest to the leaf is taken."""
MUTATION = 0.5
"""Share of mutations of the leaf's best members among the draws."""
ELITE = 0.25
"""Share of the leaf's members that are mutated."""


class PartitionSampler(Sampler):
    """Learned partition of the space with upper confidence bounds.

    Args:
        space, seed, initial: see `Sampler`.
        startup: finished trials before the first tree; until then candidates are random.
        rebuild_every: finished trials between two trees.
        exploration: constant c of the bound, in units of the score's range (scores are ranked into [0, 1]).
    """

    name = "partition"

    def __init__(
        self,
        space: Space,
        seed: int,
        *,
        initial: Sequence[Architecture] = (),
        startup: int = 80,
        rebuild_every: int = 10,
        exploration: float = 0.3,
    ) -> None:
        super().__init__(space, seed, initial=initial)
        if startup < 0 or rebuild_every < 1 or not 0 <= exploration < float("inf"):
            raise ValueError(
                f"startup {startup}, rebuild_every {rebuild_every}, exploration {exploration}: must be >= 0, >= 1, >= 0"
            )
        self.startup, self.rebuild_every, self.exploration = startup, rebuild_every, exploration
        self._features: list[np.ndarray] = []
        self._tree: tuple[int, Node] | None = None

    def _learn(self, observation: Observation) -> None:
        self._features.append(self._encode(observation.architecture))

    def _forget(self) -> None:
        self._features, self._tree = [], None

    def _choose(self) -> Architecture | None:
        if len(self.observed) < max(self.startup, 1):
            return self._first_new(self._sample)
        values, running = self._values(len(self.observed)), list(self._pending.values())
        features = np.array(self._features)
        tree = self._partition(features)
        everywhere = np.concatenate([features, *([np.array([self._encode(a) for a in running])] if running else [])])
        count(tree, everywhere, np.concatenate([values, np.full(len(running), np.nan)]))
        path = descend(tree, self.exploration)
        members = np.flatnonzero(agreement(path, features) == len(path))
        return self._from_leaf(path, self._elite(members, values))

    def diagnostics(self) -> dict[str, Any]:
        """With the tree over all trials: per node visits, mean rank and the features that part it."""
        found = super().diagnostics()
        if len(self.observed) >= max(self.startup, 1):
            features = np.array(self._features)
            tree = self._partition(features)
            count(tree, features, self._values(len(features)))
            names = self.space.feature_names() if hasattr(self.space, "feature_names") else []
            found["tree"] = describe(tree, features.std(axis=0), names)
        return found

    def _partition(self, features: np.ndarray) -> Node:
        """The tree of the last rebuild: a function of the first trials alone, however they were handed in."""
        known = self.startup + (len(features) - self.startup) // self.rebuild_every * self.rebuild_every
        if self._tree is None or self._tree[0] != known:
            tree = build(features[:known], self._values(known), min_leaf=MIN_LEAF, max_depth=self._max_depth(known))
            self._tree = (known, tree)
        return self._tree[1]

    def _max_depth(self, trials: int) -> int:
        """Most splits above a leaf of a tree over this many trials."""
        return MAX_DEPTH

    def _values(self, number: int) -> np.ndarray:
        """Ranks in [0, 1] of the first `number` trials, failed ones as the worst among them."""
        scores = np.array([np.nan if o.score is None else o.score for o in self.observed[:number]])
        worst = 0.0 if np.isnan(scores).all() else np.nanmin(scores)
        return ranks(np.where(np.isnan(scores), worst, scores))

    def _elite(self, members: np.ndarray, values: np.ndarray) -> list[Architecture]:
        """The best quarter of the leaf's members, all of equal value with the last of them included."""
        if not len(members):
            members = np.arange(len(values))
        ordered = np.sort(values[members])[::-1]
        least = ordered[min(len(ordered), max(1, round(ELITE * len(ordered)))) - 1]
        return [self.observed[i].architecture for i in members if values[i] >= least]

    def _from_leaf(self, path: list[Any], elite: list[Architecture]) -> Architecture | None:
        """A new candidate in the leaf at the end of `path`, or the drawn one that shares most of the path."""
        nearest: tuple[int, Architecture] | None = None
        for _ in range(CHUNKS):
            drawn = [a for a in (self._near(elite) for _ in range(CHUNK)) if not self._is_known(self.space.key(a))]
            if not drawn:
                continue
            shared = agreement(path, np.array([self._encode(a) for a in drawn]))
            best = int(np.argmax(shared))
            if nearest is None or shared[best] > nearest[0]:
                nearest = (int(shared[best]), drawn[best])
            if nearest[0] == len(path):
                break
        return self._accept(nearest[1]) if nearest is not None else None

    def _near(self, elite: list[Architecture]) -> Architecture:
        if self._rng.random() < MUTATION:
            return self._mutation(elite[int(self._rng.integers(len(elite)))])
        return self._sample()

    def _encode(self, architecture: Architecture) -> np.ndarray:
        features = np.asarray(self.space.encode(architecture), dtype=np.float64)
        if not np.isfinite(features).all():
            raise ValueError(f"encode() of {architecture} gave NaN or infinity")
        return features
