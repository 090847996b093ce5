"""The budget table against enumeration of all assignments, and its drawing against the uniform distribution."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from search.space.budget import BudgetTable

COSTS = (5, 7, 7, 12, 30)


def brute_force(costs, layers, low, high):
    return [c for c in product(range(len(costs)), repeat=layers) if low <= sum(costs[i] for i in c) <= high]


@pytest.mark.parametrize(
    "window", [(0, 10**9), (20, 40), (36, 36), (20, 20), (21, 23), (120, 150), (-9, 3), (151, 999)]
)
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_counts(layers, window):
    table = BudgetTable(COSTS, layers, *window)
    assert table.count() == len(brute_force(COSTS, layers, *window))


def test_partial_counts():
    table = BudgetTable(COSTS, 4, 30, 50)
    for spent_on in product(range(5), repeat=2):
        spent = sum(COSTS[i] for i in spent_on)
        assert table.count(2, spent) == len(brute_force(COSTS, 2, 30 - spent, 50 - spent))


def test_draws_are_uniform():
    """Chi-square over all assignments in the window; bound at five standard deviations of its distribution."""
    table, rng = BudgetTable(COSTS, 3, 24, 31), np.random.default_rng(0)
    inside = brute_force(COSTS, 3, 24, 31)
    draws = 200 * len(inside)
    seen = Counter(tuple(table.sample(rng)) for _ in range(draws))
    assert set(seen) == set(inside)
    chi_square = sum((n - 200) ** 2 / 200 for n in seen.values())
    freedom = len(inside) - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_partial_draws_are_in_the_window():
    table, rng = BudgetTable(COSTS, 4, 30, 40), np.random.default_rng(1)
    seen = {tuple(table.sample(rng, 2, spent=12)) for _ in range(2000)}
    assert seen == set(brute_force(COSTS, 2, 18, 28))


def test_an_empty_window():
    table = BudgetTable(COSTS, 3, 1, 14)
    assert table.count() == 0
    with pytest.raises(ValueError, match="no assignment of 3 layers fits the window"):
        table.sample(np.random.default_rng(0))
    assert table.closest_to_uniform(0) is None
    assert table.reachable == (15, 90)
    assert table.nearest_sums() == (None, 15)
    assert BudgetTable(COSTS, 3, 73, 89).nearest_sums() == (72, 90)


@pytest.mark.parametrize("window", [(20, 40), (36, 36), (90, 119)])
def test_closest_to_uniform_changes_as_few_layers_as_possible(window):
    table = BudgetTable(COSTS, 4, *window)
    inside = brute_force(COSTS, 4, *window)
    for index in range(len(COSTS)):
        choice = table.closest_to_uniform(index)
        assert tuple(choice) in inside
        assert choice.count(index) == max(c.count(index) for c in inside)
        assert table.fits(choice)


def test_counts_beyond_64_bits():
    """24 layers of 16 shapes: 16^24 = 7.9e28 assignments; the counts of a window and of its outside add up."""
    costs = [n * (10 + d) for n in (1, 2, 3, 4) for d in (12, 6, 4, 3)]
    parts = [BudgetTable(costs, 24, *w).count() for w in ((0, 700), (701, 900), (901, 10**6))]
    assert sum(parts) == 16**24
    table, rng = BudgetTable(costs, 24, 701, 900), np.random.default_rng(2)
    assert all(701 <= sum(costs[i] for i in table.sample(rng)) <= 900 for _ in range(20))


def test_large_draws_are_unbiased():
    """The first layer's share of each cost equals its exact share of the count, also where counts pass 64 bits."""
    costs, layers = [1, 2], 70
    table, rng = BudgetTable(costs, layers, 0, 10**6), np.random.default_rng(3)
    assert table.count() == 2**70
    ones = sum(table.sample(rng).count(0) for _ in range(300))
    n = 300 * layers  # fair coins; five standard deviations
    assert abs(ones - n / 2) < 5 * np.sqrt(n) / 2
