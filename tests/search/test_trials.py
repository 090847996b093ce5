"""The trial loop: replay instead of repetition, duplicates, failures, ties; and the hand-designed baseline."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from engine.architecture.architecture import Architecture
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from engine.training.loop import Diverged
from kernels.language.expression import GELU_FFN
from search.baselines import COUNT_TOLERANCE, hand_designed
from search.console.progress import Reporter
from search.ledger.ledger import Ledger, Trial
from search.samplers import make_sampler
from search.scoring.trials import Result, TrialLog, one_by_one, run_trials
from search.space import SearchSpace
from search.stages import gelu_twin

SHAPE = ModelShape(hidden_size=24, num_layers=3, ffn_size=24, vocab_size=100, embedding_size=8, teacher_hidden_size=16)


@pytest.fixture
def space() -> SearchSpace:
    return SearchSpace(SHAPE, heights=(3, 4))


@pytest.fixture
def reporter() -> Reporter:
    return Reporter(Console(quiet=True))


def score_of(architecture) -> float:
    """Any deterministic function of the candidate."""
    return sum(layer.stack * layer.expression.size for layer in architecture.layers) % 17 / 17


def run(space, ledger, reporter, evaluate, total=12, seed=5, **options):
    return run_trials(
        "stage1", total, make_sampler("random", space, seed), space, one_by_one(evaluate), ledger, reporter, **options
    )


def test_interrupted_loop_replays_and_ends_the_same(space, reporter, tmp_path):
    with Ledger(tmp_path / "a.db") as ledger:
        whole = run(space, ledger, reporter, score_of)

    evaluated = []

    def dies_at_7(architecture) -> float:
        if len(evaluated) == 7:
            raise KeyboardInterrupt
        evaluated.append(architecture)
        return score_of(architecture)

    with Ledger(tmp_path / "b.db") as ledger, pytest.raises(KeyboardInterrupt):
        run(space, ledger, reporter, dies_at_7)
    again = []
    with Ledger(tmp_path / "b.db") as ledger:
        resumed = run(space, ledger, reporter, lambda a: again.append(a) or score_of(a))
    assert [t.architecture for t in resumed.trials] == [t.architecture for t in whole.trials]
    assert [t.score for t in resumed.trials] == [t.score for t in whole.trials]
    assert len(again) == 5
    assert not set(again) & set(evaluated)


def test_ledger_of_another_seed_is_refused(space, reporter, tmp_path):
    with Ledger(tmp_path / "a.db") as ledger:
        run(space, ledger, reporter, score_of, total=3, seed=1)
        with pytest.raises(UserError, match="trial 0 of stage1 is another candidate"):
            run(space, ledger, reporter, score_of, total=3, seed=2)


def test_no_function_is_evaluated_twice(reporter, tmp_path):
    """A space of few functions is exhausted: each is evaluated once and the loop ends by itself."""
    shape = replace(SHAPE, num_layers=1)
    space = SearchSpace(
        shape, (1, 10**6), heights=(3, 3), activations=("relu", "tanh"), binaries=("max",), stacks=(1,), ratios=(1,)
    )
    with Ledger(tmp_path / "a.db") as ledger:
        log = run(space, ledger, reporter, score_of, total=10_000)
    functions = [space.function_key(t.architecture) for t in log.trials]
    assert len(functions) == len(set(functions))
    rng = np.random.default_rng(0)
    assert set(functions) == {space.function_key(space.sample(rng)) for _ in range(2000)}
    assert log.duplicates > 0


def test_populations_are_proposed_together_and_resume_in_the_middle(space, reporter, tmp_path):
    sizes = []

    def together(architectures, _):
        sizes.append(len(architectures))
        return [Result(score_of(a), None, 1.0) for a in architectures]

    def search(ledger, sampler=None):
        sampler = sampler or make_sampler("random", space, 5)
        return run_trials("stage1", 10, sampler, space, together, ledger, reporter, together=4)

    with Ledger(tmp_path / "a.db") as ledger:
        whole = search(ledger)
    assert sizes == [4, 4, 2]
    with Ledger(tmp_path / "b.db") as ledger:
        for t in whole.trials[:5]:  # as if killed after the first record of the second population
            ledger.record(t)
        sizes.clear()
        resumed = search(ledger)
    assert sizes == [3, 2]
    assert [t.architecture for t in resumed.trials] == [t.architecture for t in whole.trials]
    assert len({space.function_key(t.architecture) for t in whole.trials}) == 10


def test_failures_are_recorded_with_their_reason_and_are_no_score(space, reporter, tmp_path):
    calls = itertools.count()

    def flaky(architecture) -> float:
        number = next(calls)
        if number == 1:
            raise Diverged("stage1 task: the loss is not finite at step 10")
        if number == 3:
            raise torch.OutOfMemoryError("no memory")
        return score_of(architecture)

    with Ledger(tmp_path / "a.db") as ledger:
        log = run(space, ledger, reporter, flaky, total=6)
        states = [(t.state, t.score is None, t.reason) for t in ledger.trials("stage1")]
    assert [s[0] for s in states] == ["complete", "failed", "complete", "failed", "complete", "complete"]
    assert states[1][1:] == (True, "stage1 task: the loss is not finite at step 10")
    assert states[3][1:] == (True, "out of memory")
    assert log.best().score == max(t.score for t in log.trials if t.score is not None)


def test_other_errors_end_the_run_and_leave_no_trial(space, reporter, tmp_path):
    def broken(architecture) -> float:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with Ledger(tmp_path / "a.db") as ledger:
        with pytest.raises(RuntimeError, match="shapes"):
            run(space, ledger, reporter, broken)
        assert ledger.trials("stage1") == []


def trial(number: int, score: float | None, params: int) -> Trial:
    space = SearchSpace(SHAPE)
    architecture = space.gelu_seeds()[0]
    state = "complete" if score is not None else "failed"
    return Trial("stage1", number, architecture, str(number), score, params, 0.0, state, None if score else "why")


def test_ties_go_to_fewer_parameters_then_to_the_earlier_trial():
    log = TrialLog([trial(0, 0.5, 10), trial(1, 0.7, 12), trial(2, 0.7, 11), trial(3, 0.7, 11), trial(4, None, 1)])
    assert log.best().number == 2


def test_best_of_nothing_says_why():
    with pytest.raises(UserError, match="no candidate finished training"):
        TrialLog([trial(0, None, 1)]).best()


def test_hand_designed_baseline_has_the_size_and_is_as_uniform_as_possible():
    space = SearchSpace(SHAPE)
    for shapes in itertools.product([(1, 1), (2, 2), (4, 3)], repeat=3):
        text = ", ".join(f"linear{n}_{r}(gelu(linear{n}_{r}(x,wb1)),wb2)" for n, r in shapes)
        found = Architecture.parse(text)
        params = space.parameters(found)
        designed = hand_designed(space, params)
        assert all(layer.expression == GELU_FFN for layer in designed.layers)
        if len(set(shapes)) == 1:
            assert designed == found
        assert len({(layer.stack, layer.ratio) for layer in designed.layers}) <= 2
        assert abs(space.parameters(designed) - params) <= 2 * COUNT_TOLERANCE * params
        assert gelu_twin(found) == found
