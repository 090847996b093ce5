"""Who enters the last round: solved students of many sets of layers, uniform ones, random ones.

Which layers a student keeps decides most, and no score of undistilled students ranks such sets: measured on SST-2, the
first three layers of MiniLM-L6 end best and start worst (replace-one sums and whole undistilled students agree in the
wrong order). Widths and heads inside one set are ranked well. So the solver chooses widths and heads set by set, for
the sets people choose by hand and for its own best, and training decides between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.architecture.architecture import Architecture
from engine.errors import UserError
from search.inherit.controls import random_students, uniform
from search.inherit.last_round import Entrant
from search.inherit.library import Library
from search.inherit.solve import solve
from search.inherit.variants import Variants, kept

MANY = 4000
"""Assignments the solver is asked for, to find enough different sets of layers among them."""


@dataclass(frozen=True)
class Budget:
    """Limits on sums over layers.

    Attributes:
        names: of the limits.
        costs: [K, L, V].
        limits: [K].
    """

    names: tuple[str, ...]
    costs: np.ndarray
    limits: tuple[float, ...]

    def fits(self, variants: Variants, architecture: Architecture) -> bool:
        """Whether an architecture of these variants keeps every limit and at least one layer."""
        number = {spec: k for k, spec in enumerate(variants.specs)}
        picks = [number[layer] for layer in architecture.layers]
        sums = self.costs[:, np.arange(len(picks)), picks].sum(axis=1)
        return bool(kept(architecture)) and all(s <= m * (1 + 1e-9) for s, m in zip(sums, self.limits, strict=True))


def entrants(library: Library, budget: Budget, *, solved: int, controls: int, drawn: int, seed: int) -> list[Entrant]:
    """Entrants of the last round, different from one another within their group.

    Args:
        library: with its losses.
        budget: what students must keep.
        solved, controls, drawn: how many solved, uniform and random ones, at most.
        seed: of the random ones.

    Raises:
        UserError: no student keeps the budget.
    """
    variants = library.variants

    def fits(architecture: Architecture) -> bool:
        return budget.fits(variants, architecture)

    by_hand = uniform(variants, fits)
    by_hand.sort(key=lambda a: (-variants.encoder(a), kept(a)))
    chosen = _solved(library, budget, [kept(a) for a in by_hand], solved)
    if not chosen:
        raise UserError(
            f"budget: no student of this teacher keeps it ({', '.join(budget.names)}): raise the budget,"
            " or allow narrower layers (--inherit.ratios)"
        )
    groups = (
        ("solved", chosen),
        ("uniform", _spread(by_hand, controls)),
        ("random", random_students(variants, fits, drawn, seed)),
    )
    return [Entrant(group, architecture) for group, members in groups for architecture in members]


def _solved(library: Library, budget: Budget, hand: Sequence[tuple[int, ...]], count: int) -> list[Architecture]:
    """The best assignment for each of `count` sets of layers: half of them people's, half the solver's own."""
    specs, losses = library.variants.specs, library.losses
    skipped = [k for k, spec in enumerate(specs) if spec.skipped]
    found: dict[tuple[int, ...], Architecture] = {}

    def add(losses: np.ndarray, many: int, most: int) -> None:
        try:
            answers = solve(losses, budget.costs, budget.limits, many)
        except UserError:
            return
        for picks in answers:
            made = Architecture(tuple(specs[k] for k in picks))
            if kept(made) and kept(made) not in found and np.isfinite(_sum(losses, picks)):
                found[kept(made)] = made
            if len(found) >= most:
                return

    for layers in _spread(list(dict.fromkeys(hand)), (count + 1) // 2):
        masked = losses.copy()
        for index in range(len(losses)):
            other = [k for k in range(len(specs)) if (k in skipped) == (index in layers)]
            masked[index, other] = np.inf
        add(masked, 1, len(found) + 1)
    add(losses, MANY, count)
    return list(found.values())


def _sum(losses: np.ndarray, picks: Sequence[int]) -> float:
    return float(losses[np.arange(len(picks)), list(picks)].sum())


def _spread(items: list, count: int) -> list:
    """`count` of the items, evenly spread over them; all where there are fewer."""
    if len(items) <= count:
        return items
    return [items[round(k * (len(items) - 1) / max(1, count - 1))] for k in range(count)]
