"""Which students the solver is asked for: sets of layers as people choose them, and the best of a given set."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from engine.architecture.architecture import Architecture
from engine.architecture.shape import ModelShape
from kernels.language.expression import parse_expression
from search.inherit.candidates import Budget, best_of_layers, first_layers
from search.inherit.variants import kept, variants

GELU = parse_expression("linear(gelu_erf(linear(x,wb1)),wb2)")


def toy_library(layers: int) -> SimpleNamespace:
    """Variants of a small teacher with random losses: the teacher's own layer loses nothing, a skipped one most."""
    shape = ModelShape(24, layers, 96, vocab_size=100, embedding_size=None, num_heads=4)
    made = variants(shape, GELU, tuple(Fraction(1, k) for k in (1, 2, 4, 16)), (Fraction(1), Fraction(1, 2)))
    losses = np.random.default_rng(0).exponential(size=(layers, len(made.specs)))
    losses[:, 0], losses[:, -1] = 0.0, 9.0
    return SimpleNamespace(variants=made, losses=losses)


def share_of(library: SimpleNamespace, share: float) -> Budget:
    made = library.variants
    sizes = np.array([[made.layer(spec) for spec in made.specs]] * made.shape.num_layers, dtype=np.float64)
    return Budget(("encoder",), sizes[None], (share * made.encoder(made.whole),))


@pytest.mark.parametrize("layers", [(0,), (1, 2), (0, 2)])
def test_the_best_of_a_set_is_the_best_by_brute_force(layers):
    library = toy_library(3)
    budget, specs = share_of(library, 0.3), library.variants.specs
    options = [[k for k, spec in enumerate(specs) if spec.skipped != (index in layers)] for index in range(3)]
    fitting = [
        (sum(library.losses[i, k] for i, k in enumerate(picks)), picks)
        for picks in product(*options)
        if sum(budget.costs[0, i, k] for i, k in enumerate(picks)) <= budget.limits[0]
    ]
    made = best_of_layers(library, budget, layers)
    if not fitting:
        assert made is None
        return
    assert made == Architecture(tuple(specs[k] for k in min(fitting)[1]))
    assert kept(made) == layers


@pytest.mark.parametrize(("share", "count"), [(1.0, 6), (0.5, 6), (0.25, 3), (0.125, 2), (1 / 16, 1)])
def test_by_hand_each_first_layer_keeps_about_half(share, count):
    library = toy_library(6)
    made = first_layers(library, share_of(library, share))
    assert kept(made) == tuple(range(count))
    assert library.variants.encoder(made) <= share * library.variants.encoder(library.variants.whole)


def test_where_nothing_fits_there_is_none():
    library = toy_library(6)
    assert first_layers(library, share_of(library, 0.001)) is None
    assert best_of_layers(library, share_of(library, 0.1), range(6)) is None
