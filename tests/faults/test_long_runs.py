"""Nothing grows with the number of trials or expressions beyond its stated bound."""

import functools
import importlib
import pkgutil
import random

import pytest
import torch
from long_run import run

import engine
import kernels
import search
from kernels.bounded import Bounded
from kernels.lowering import lower


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_five_thousand_trials_need_no_more_memory_than_five_hundred():
    before, after = run(5000, 500)
    assert after["bytes"] <= 1.05 * before["bytes"]
    for what in ("handles", "threads", "children"):
        assert after[what] <= before[what]
    assert after["ledger"] < 5000 * 8192


def test_handles_and_threads_stay_flat_over_a_few_trials():
    before, after = run(60, 20)
    for what in ("handles", "threads", "children"):
        assert after[what] <= before[what]


def modules():
    for package in (kernels, engine, search):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if (
                "_ffnas" not in info.name
                and "cuda" not in info.name
                and "triton" not in info.name
                and not info.name.endswith("__main__")
            ):
                yield importlib.import_module(info.name)


def test_every_cache_has_a_bound():
    unbounded = [
        f"{module.__name__}.{name}"
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, functools._lru_cache_wrapper) and value.cache_info().maxsize is None
    ]
    assert unbounded == []


@pytest.mark.slow
def test_ten_thousand_expressions_stay_within_the_bounds_of_every_cache():
    from corrupt_programs import random_case

    from kernels import execute, lowering
    from kernels.canonical import canonicalize
    from kernels.reference import evaluate

    rng = random.Random(0)
    w, b = torch.randn(3, 3), torch.zeros(3)
    for number in range(10_000):
        case = random_case(rng, (3,), (1,))
        program = lower(case.expression, case.policy)
        canonicalize(case.expression)
        if number % 10 == 0:
            evaluate(case.expression, torch.randn(1, 3), w, b, w, b, case.policy)
        execute.segments_of(program.words)
    assert len(lowering._cache) <= lowering.CACHE_SIZE
    for module in (execute, lowering, importlib.import_module("kernels.canonical")):
        for value in vars(module).values():
            if isinstance(value, functools._lru_cache_wrapper):
                info = value.cache_info()
                assert info.currsize <= info.maxsize <= 1 << 14


def test_a_bounded_cache_forgets_what_was_used_longest_ago():
    cache = Bounded(2)
    cache["a"], cache["b"] = 1, 2
    assert cache.get("a") == 1
    cache["c"] = 3
    assert list(cache) == ["a", "c"]
    assert cache.get("b") is None
