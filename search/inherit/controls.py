"""Students the search has to beat: uniform ones, as one would make them by hand, and random ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.architecture.architecture import SKIP, Architecture
from search.inherit.variants import Variants, kept

Fits = Callable[[Architecture], bool]
"""Whether an architecture keeps the budget."""

DRAWS = 20_000
NEAR = 0.93
"""Random students use at least this share of what the largest drawn uses, so that they are not merely smaller."""


def uniform(variants: Variants, fits: Fits) -> list[Architecture]:
    """Every hand-made student in the budget: some layers at one width with all heads, the others left out.

    Which layers: the first k, k evenly spaced ones from the first, and k evenly spaced ones up to the last. The width
    is the largest that fits.
    """
    count = variants.shape.num_layers
    plain = sorted(
        (s for s in variants.specs if s.heads is None and s.stack == 1 and s.expression == variants.expression),
        key=lambda s: -s.ratio,
    )
    found: dict[Architecture, None] = {}
    for number in range(1, count + 1):
        for layers in _patterns(count, number):
            for spec in plain:
                made = Architecture(tuple(spec if i in layers else SKIP for i in range(count)))
                if fits(made):
                    found[made] = None
                    break
    return list(found)


def _patterns(count: int, number: int) -> list[tuple[int, ...]]:
    """Sets of `number` of `count` layers that people choose by hand."""
    spaced = [round(k * count / number) for k in range(number)]
    ending = [round((k + 1) * count / number) - 1 for k in range(number)]
    return list(dict.fromkeys([tuple(range(number)), tuple(spaced), tuple(ending)]))


def random_students(variants: Variants, fits: Fits, count: int, seed: int) -> list[Architecture]:
    """`count` different students drawn at random that fit the budget and nearly use it up."""
    rng = np.random.default_rng(seed)
    layers, choices = variants.shape.num_layers, variants.specs
    drawn: dict[Architecture, int] = {}
    for _ in range(DRAWS):
        depth = int(rng.integers(1, layers + 1))
        held = set(rng.permutation(layers)[:depth].tolist())
        made = Architecture(
            tuple(choices[int(rng.integers(len(choices) - 1))] if i in held else SKIP for i in range(layers))
        )
        if made not in drawn and kept(made) and fits(made):
            drawn[made] = variants.encoder(made)
        if len(drawn) >= 40 * count:
            break
    if not drawn:
        return []
    enough = NEAR * max(drawn.values())
    near = [a for a, size in drawn.items() if size >= enough]
    return near[:count]
