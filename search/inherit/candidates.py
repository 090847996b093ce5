"""Who enters the last round: solved students of many sets of layers, uniform ones, random ones.

Which layers a student keeps decides most, and no score of undistilled students ranks such sets: measured on SST-2, the
first three layers of MiniLM-L6 end best and start worst (replace-one sums and whole undistilled students agree in the
wrong order). Widths and heads inside one set are ranked well. So the solver chooses widths and heads set by set, for
the sets people choose by hand and for its own best, and training decides between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        raise nothing_fits(budget)
    groups = (
        ("solved", chosen),
        ("uniform", _spread(by_hand, controls)),
        ("random", random_students(variants, fits, drawn, seed)),
    )
    return [Entrant(group, architecture) for group, members in groups for architecture in members]


def nothing_fits(budget: Budget) -> UserError:
    """What to say where no student keeps the budget."""
    return UserError(
        f"budget: no student of this teacher keeps it ({', '.join(budget.names)}): raise the budget,"
        " or allow narrower layers (--inherit.ratios)"
    )


def _solved(library: Library, budget: Budget, hand: Sequence[tuple[int, ...]], count: int) -> list[Architecture]:
    """The best assignment for each of `count` sets of layers: half of them people's, half the solver's own."""
    found: dict[tuple[int, ...], Architecture] = {}
    for layers in _spread(list(dict.fromkeys(hand)), (count + 1) // 2):
        made = best_of_layers(library, budget, layers)
        if made is not None:
            found[layers] = made
    for made in _answers(library.variants, library.losses, budget, MANY):
        if len(found) >= count:
            break
        found.setdefault(kept(made), made)
    return list(found.values())


def best_of_layers(library: Library, budget: Budget, layers: Sequence[int]) -> Architecture | None:
    """The best student of exactly these layers; None where none keeps the budget."""
    masked = library.losses.copy()
    for index in range(len(masked)):
        other = [k for k, spec in enumerate(library.variants.specs) if spec.skipped == (index in layers)]
        masked[index, other] = np.inf
    return next(iter(_answers(library.variants, masked, budget, 1)), None)


def first_layers(library: Library, budget: Budget) -> Architecture | None:
    """The best student of the teacher's first layers, so many that each keeps about half of what it costs; with fewer
    where they do not fit, None where even one does not.

    The set one would take by hand: measured, students of the first layers end best, and at a quarter of the encoder
    those of three layers out of six.
    """
    whole = budget.costs[:, :, 0].sum(axis=1)
    share = float(np.min(np.asarray(budget.limits) / np.maximum(whole, 1e-12)))
    layers = library.variants.shape.num_layers
    wanted = min(layers, max(1, round(2 * share * layers)))
    made = (best_of_layers(library, budget, range(count)) for count in range(wanted, 0, -1))
    return next((student for student in made if student is not None), None)


def _answers(variants: Variants, losses: np.ndarray, budget: Budget, many: int) -> Iterator[Architecture]:
    """The `many` best students that keep a layer and have a finite loss, best first."""
    try:
        answers = solve(losses, budget.costs, budget.limits, many)
    except UserError:
        return
    for picks in answers:
        made = Architecture(tuple(variants.specs[k] for k in picks))
        if kept(made) and np.isfinite(_sum(losses, picks)):
            yield made


def _sum(losses: np.ndarray, picks: Sequence[int]) -> float:
    return float(losses[np.arange(len(picks)), list(picks)].sum())


def _spread(items: list, count: int) -> list:
    """`count` of the items, evenly spread over them; all where there are fewer."""
    if len(items) <= count:
        return items
    return [items[round(k * (len(items) - 1) / max(1, count - 1))] for k in range(count)]
