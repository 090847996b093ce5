"""The solver against brute force over every assignment."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from engine.errors import UserError
from search.inherit.solve import solve


def brute(losses, costs, limits, count):
    layers, variants = losses.shape
    rows = np.arange(layers)
    found = []
    for picks in product(range(variants), repeat=layers):
        if all(c[rows, list(picks)].sum() <= m for c, m in zip(costs, limits, strict=True)):
            found.append((losses[rows, list(picks)].sum(), picks))
    return sorted(found)[:count]


@pytest.mark.parametrize("seed", range(6))
def test_one_limit_gives_the_optimum(seed):
    rng = np.random.default_rng(seed)
    losses, costs = rng.exponential(size=(5, 6)), rng.integers(0, 40, size=(1, 5, 6)).astype(float)
    limits = [float(rng.integers(30, 120))]
    expected = brute(losses, costs, limits, 1)
    if not expected:
        with pytest.raises(UserError, match="smallest student"):
            solve(losses, costs, limits, 1)
        return
    picks = solve(losses, costs, limits, 5)
    assert picks[0] == expected[0][1]
    sums = [losses[np.arange(5), list(p)].sum() for p in picks]
    assert sums == sorted(sums)
    assert len(set(picks)) == len(picks)


@pytest.mark.parametrize("seed", range(4))
def test_two_limits_are_kept_and_the_loss_is_close_to_the_optimum(seed):
    rng = np.random.default_rng(100 + seed)
    losses, costs = rng.exponential(size=(4, 6)), rng.random(size=(2, 4, 6))
    limits = [1.6, 1.6]
    expected = brute(losses, costs, limits, 1)
    assert expected, "the seeds are chosen so that something fits"
    (picks,) = solve(losses, costs, limits, 1)
    assert all(c[np.arange(4), list(picks)].sum() <= m * (1 + 1e-9) for c, m in zip(costs, limits, strict=True))
    assert losses[np.arange(4), list(picks)].sum() <= 1.1 * expected[0][0]  # a beam, not the optimum


def test_a_limit_of_nothing_takes_the_free_variant():
    losses, costs = np.array([[0.0, 3.0], [0.0, 5.0]]), np.array([[[1.0, 0.0], [1.0, 0.0]]])
    assert solve(losses, costs, [0.0], 3) == [(1, 1)]


def test_masked_variants_are_never_first():
    losses = np.array([[np.inf, 1.0], [2.0, np.inf]])
    assert solve(losses, np.zeros((1, 2, 2)), [1.0], 1) == [(1, 0)]
