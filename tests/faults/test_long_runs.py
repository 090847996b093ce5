"""Nothing grows with the number of trials or expressions beyond its stated bound."""

import functools
import gc
import importlib
import pkgutil
import random
import tracemalloc

import pytest
import torch
from long_run import run

import engine
import kernels
import search
from engine.architecture.shape import ModelShape
from kernels.bounded import Bounded
from kernels.language.lowering import lower
from search.ledger.ledger import Ledger
from search.ledger.records import Trial
from search.samplers import make_sampler
from search.scoring.trials import TrialLog
from search.space import SearchSpace


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_five_thousand_trials_need_no_more_memory_than_five_hundred():
    before, after = run(5000, 500)
    assert after["bytes"] <= 1.05 * before["bytes"]
    for what in ("handles", "threads", "children"):
        assert after[what] <= before[what]
    assert after["ledger"] < 5000 * 8192
    # the loop's own time is the same; Optuna counts a study's entries when it adds one, 28 ms became 39
    assert after["milliseconds"] <= 1.6 * before["milliseconds"]


def test_handles_and_threads_stay_flat_over_a_few_trials():
    before, after = run(60, 20)
    for what in ("handles", "threads", "children"):
        assert after[what] <= before[what]


def test_a_remembered_trial_is_small(tmp_path):
    """Every list and set that has all trials at once: the loop's, the ledger's, the sampler's. 1 KB a trial is ours;
    what SQLAlchemy keeps once, spread over so few trials, makes 2.6 KB of it. Optuna's copies of the entries or the
    trees of the architectures would add 3 KB each."""
    shape = ModelShape(24, 3, 24, vocab_size=50, embedding_size=8, teacher_hidden_size=16)
    space = SearchSpace.from_config(shape)
    sampler = make_sampler("random", space, 0, initial=[])
    drawn = [sampler.propose(1)[0] for _ in range(160)]
    known = list(modules())  # imported before anything is counted
    with Ledger(tmp_path / "study.db") as ledger:
        log, began = TrialLog(), 0
        for number, architecture in enumerate(drawn):
            if number == 60:  # libraries' own caches are warm
                gc.collect()
                tracemalloc.start()
                began = tracemalloc.get_traced_memory()[0]
            trial = Trial("s", number, architecture, space.key(architecture), 0.5 + number, 100, 0.1)
            ledger.record(trial)
            log.add([trial])
            sampler.observe([trial])
        del drawn[60:], architecture, trial
        for module in known:
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
        gc.collect()
        each = (tracemalloc.get_traced_memory()[0] - began) / 100
        tracemalloc.stop()
        assert len(ledger.trials("s")) == len(log.trials) == len(sampler.observed) == 160
    assert each < 4000


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

    from kernels.language import execute, lowering
    from kernels.language.canonical import canonicalize
    from kernels.reference.ffn import evaluate

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
    for module in (execute, lowering, importlib.import_module("kernels.language.canonical")):
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
