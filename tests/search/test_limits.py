"""Limits on FLOPs, memory and latency: what is drawn lies inside them, uniformly, against enumeration."""

from collections import Counter
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from latency_toys import toy_table

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.flops import count_flops
from engine.architecture.memory import MIB, peak_activation_bytes
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from kernels.language.expression import GELU_FFN, parse_expression
from search.space import SearchSpace
from search.space.budget import BudgetTable
from search.space.costs import Costs, text
from search.space.limits import LimitedTable, Limits

SHAPE = ModelShape(48, 3, 48, vocab_size=99, embedding_size=8)
COSTS = Costs(SHAPE, sequence_length=16, table=toy_table(SHAPE))
RELU = parse_expression("linear(relu(linear(x,wb1)),wb2)")


def space_with(costs=COSTS, **values):
    window = values.pop("budget", (0, 1e9))
    limits = {name: values.pop(name) for name in ("flops", "memory_mb", "latency_ms") if name in values}
    return SearchSpace(SHAPE, budget=window, limits=Limits(costs, **limits), **values)


def everything(space, expressions):
    for shapes in product(space.shapes, repeat=SHAPE.num_layers):
        yield Architecture(tuple(LayerSpec(e, *s) for e, s in zip(expressions, shapes, strict=True)))


def inside(space):
    return {str(a) for a in everything(space, space.fixed_expressions) if space.contains(a)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.5, 0.02, 0.0008], ids=["half", "few", "nearly_none"])
def test_draws_are_uniform_over_what_fits(share, seed):
    """All ways to draw (quick and from the grid) against an enumeration of 3 layers x 6 choices."""
    rng = np.random.default_rng(seed)
    params = rng.integers(50, 400, size=6)
    costs = [rng.random((3, 6)), rng.random((3, 6)) + 0.2]
    every = list(product(range(6), repeat=3))
    totals = np.array([[c[np.arange(3), list(a)].sum() for c in costs] for a in every])
    sums = np.array([params[list(a)].sum() for a in every])
    low, high = (int(q) for q in np.quantile(sums, [0.2, 0.8]))
    within = (sums >= low) & (sums <= high)
    bounds = np.quantile(totals[within], share**0.5, axis=0)
    table = LimitedTable(BudgetTable(params.tolist(), 3, low, high), np.ones((3, 6), bool), costs, bounds.tolist())
    fitting = {a for a, t, ok in zip(every, totals, within, strict=True) if ok and (t <= bounds).all()}
    assert {a for a in every if table.fits(a)} == fitting
    if not fitting:
        assert table.sample(rng) is None
        return
    draws = Counter(tuple(table.sample(rng)) for _ in range(40 * len(fitting) if len(fitting) < 40 else 400))
    assert set(draws) <= fitting
    if len(fitting) < 40:  # 40 draws each: missing one has a probability below 1e-15
        assert set(draws) == fitting
        # chi-squared with up to 39 degrees of freedom: 100 is passed with a probability below 1e-6
        assert sum((n - 40) ** 2 / 40 for n in draws.values()) < 100


def test_the_grid_alone_is_uniform(monkeypatch):
    monkeypatch.setattr("search.space.limits.QUICK_DRAWS", 0)
    test_draws_are_uniform_over_what_fits(0.02, 5)


def test_lowest_is_the_smallest_inside_the_window():
    rng = np.random.default_rng(3)
    params, cost = rng.integers(50, 400, size=5), rng.random((4, 5))
    table = BudgetTable(params.tolist(), 4, 700, 800)
    every = [a for a in product(range(5), repeat=4) if 700 <= params[list(a)].sum() <= 800]
    least = min(cost[np.arange(4), list(a)].sum() for a in every)
    assert LimitedTable(table, np.ones((4, 5), bool), [cost], [9.0]).lowest(0) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("name", ["flops", "memory_mb", "latency_ms"])
def test_samples_mutants_and_seeds_keep_every_limit(name):
    free = space_with()
    rng = np.random.default_rng(0)
    values = sorted(COSTS.cost(name, free.sample(rng)) for _ in range(200))
    space = space_with(**{name: values[20]})
    for part in (space, space.with_expressions([RELU, GELU_FFN, RELU])):
        for _ in range(25):
            arch = part.sample(rng)
            assert part.contains(arch)
            assert COSTS.cost(name, arch) <= values[20]
            assert COSTS.cost(name, part.mutate(arch, rng)) <= values[20]
    for seed in space.gelu_seeds():
        assert COSTS.cost(name, seed) <= values[20]
    assert not space.contains(max((free.sample(rng) for _ in range(50)), key=lambda a: COSTS.cost(name, a)))


def test_latency_limits_expressions_where_shapes_are_fixed():
    shapes = [(2, Fraction(1, 2))] * 3
    free = space_with().with_shapes(shapes)
    rng = np.random.default_rng(1)
    values = sorted(COSTS.cost("latency_ms", free.sample(rng)) for _ in range(60))
    space = space_with(latency_ms=values[15]).with_shapes(shapes)
    assert all(COSTS.cost("latency_ms", space.sample(rng)) <= values[15] for _ in range(10))


def test_costs_are_those_of_the_formulas():
    arch = space_with().sample(np.random.default_rng(0))
    found = COSTS.of(arch)
    assert found["flops"] == count_flops(arch, SHAPE, 16)
    assert found["memory_mb"] * MIB == peak_activation_bytes(arch, SHAPE, sequence_length=16)
    assert found["latency_ms"] == COSTS.table.predict(arch)
    assert "latency_ms" not in Costs(SHAPE).of(arch)
    assert text("flops", 3.05e9) == "3.05 GFLOPs"
    assert text("params", 15_737_724) == "15 737 724 parameters"


@pytest.mark.parametrize(
    ("limit", "match"),
    [
        ({"latency_ms": 1e-3}, r"budget.latency_ms: .*0.001 ms; the least found is"),
        ({"flops": 1e3}, r"budget.flops: .* the least found is .*FLOPs"),
        ({"memory_mb": 1e-4}, r"budget.memory_mb: no architecture .*keeps 0.0001 MiB"),
    ],
)
def test_impossible_limits_say_what_is_possible(limit, match):
    with pytest.raises(UserError, match=match) as error:
        space_with(**limit)
    assert "\n" not in str(error.value)


def test_the_default_window_gives_way_to_limits():
    assert SearchSpace(SHAPE, limits=Limits(COSTS)).budget == SearchSpace(SHAPE).budget
    space = SearchSpace(SHAPE, limits=Limits(COSTS, flops=1e9))
    assert space.budget == space.reachable()
