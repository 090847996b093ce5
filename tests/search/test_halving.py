"""Successive halving: who goes on at a rung, and that a resumed stage decides as an undisturbed one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from engine.architecture.architecture import Architecture
from engine.distill import Member, Outcome
from engine.training.settings import PhaseSettings
from search.config.schema import StageConfig
from search.console.progress import Reporter
from search.ledger.ledger import Ledger, Trial
from search.samplers import make_sampler
from search.scoring import proxy as proxy_module
from search.scoring.halving import SuccessiveHalving, attributes
from search.scoring.proxy import ProxyTrainer
from search.scoring.trials import run_trials
from search.space import SearchSpace

ARCHITECTURE = Architecture.parse("linear1_1(gelu(linear1_1(x,wb1)),wb2)")


def trial(number, rungs):
    return Trial("stage1", number, ARCHITECTURE, f"{number}", 0.5, 1, 0.0, attrs=attributes(rungs))


@pytest.mark.parametrize(
    ("rungs", "reduction", "total", "steps"),
    [(2, 3, 90, (10, 30)), (0, 3, 90, ()), (3, 2, 4, (1, 2)), (5, 10, 7, ()), (2, 2, 0, ())],
)
def test_rungs_lie_at_shares_of_the_steps(rungs, reduction, total, steps):
    assert SuccessiveHalving(rungs, reduction, total).steps == steps


def test_one_of_three_goes_on_ties_included():
    halving = SuccessiveHalving(1, 3, 9)
    assert halving.go_on(3, [0.1, 0.5, 0.3, 0.5, 0.2, 0.4]) == [False, True, False, True, False, False]
    assert halving.go_on(3, [0.45]) == [False]
    assert halving.go_on(3, [0.5, 0.6]) == [True, True]


def test_the_first_one_goes_on():
    assert SuccessiveHalving(1, 4, 8).go_on(2, [0.1]) == [True]


def test_what_trials_recorded_counts():
    halving = SuccessiveHalving(1, 3, 9, [trial(0, {3: 0.9}), trial(1, {3: 0.8}), trial(2, {})])
    assert halving.go_on(3, [0.85]) == [False]
    assert halving.go_on(3, [0.95]) == [True]


@pytest.mark.parametrize(("rungs", "reduction"), [(-1, 3), (1, 1)])
def test_senseless_settings_are_refused(rungs, reduction):
    with pytest.raises(ValueError, match="rungs"):
        SuccessiveHalving(rungs, reduction, 10)


class Rows:
    """Rows to score on, of which any share is all."""

    tokens = ()

    def last(self, _share):
        return self


class Toy:
    """Proxy training without models: a candidate's score rises with its steps towards a value of its own."""

    def __init__(self, ledger, space, monkeypatch):
        self.trained, self.steps = [], 0
        self.space = space
        context = SimpleNamespace(
            ledger=ledger,
            space=space,
            device="cpu",
            sentinel=None,
            proxy_targets={},
            data=SimpleNamespace(text=list(range(9)), train=list(range(9)), score=Rows()),
            distiller=lambda *_, **__: None,
            seed=lambda *_: 0,
        )
        settings = StageConfig(
            rungs=2, reduction=2, population=4, text=PhaseSettings(steps=0), task=PhaseSettings(steps=8)
        )
        monkeypatch.setattr(proxy_module, "phase_data", lambda *_: SimpleNamespace(num_batches=lambda _: 1))
        monkeypatch.setattr(proxy_module, "TeacherTargets", lambda *_, **__: SimpleNamespace(get=None))
        self.proxy = ProxyTrainer(context, "stage1", settings, None)
        monkeypatch.setattr(self.proxy, "_member", lambda a: self.trained.append(a) or Member(a))
        monkeypatch.setattr(self.proxy, "_phase", self.phase)
        monkeypatch.setattr(self.proxy, "_score", lambda members: iter([self.score(m.model) for m in members]))

    def score(self, architecture):
        quality = sum(s.stack for s in architecture.layers) + 0.1 * sum(
            s.ratio.denominator for s in architecture.layers
        )
        return float(quality * self.steps / 8)

    def phase(self, members, part, *_):
        after_step = _[-1] if callable(_[-1]) else None
        for done in range(1, 9) if part == "task" else ():
            self.steps = done
            if after_step is not None:
                after_step(done)
        return [Outcome("done" if m.reason is None else "failed", m.reason) for m in members]


@pytest.mark.parametrize(
    "kept", [(), (0, 1, 2), (0, 1, 2, 3), (1, 3), tuple(range(6)), (0, 1, 2, 3, 5, 8, 10), tuple(range(11))]
)
def test_a_resumed_stage_finds_what_the_undisturbed_one_found(tmp_path, monkeypatch, kept):
    """`kept` are the trials recorded before the kill: in order by one process, in any order by several."""
    from engine.architecture.shape import ModelShape

    space = SearchSpace(ModelShape(48, 3, 48, vocab_size=500, embedding_size=16)).with_expressions(
        [ARCHITECTURE.layers[0].expression] * 3
    )

    def search(name, before=()):
        with Ledger(tmp_path / name) as ledger:
            for one in before:
                ledger.record(one)
            toy = Toy(ledger, space, monkeypatch)
            sampler = make_sampler("evolution", space, 0, population=4)
            log = run_trials("stage1", 12, sampler, space, toy.proxy, ledger, Reporter(), together=4, compared=True)
            return log, toy

    whole, first = search("whole.db")
    resumed, again = search("cut.db", [whole.trials[n] for n in kept])
    assert len(first.trained) == 12
    assert len(again.trained) == 12 - len(kept)
    for a, b in zip(whole.trials, resumed.trials, strict=True):
        assert (a.architecture, a.score, a.state, a.attrs) == (b.architecture, b.score, b.state, b.attrs)
    states = [t.state for t in whole.trials]
    assert 2 <= states.count("complete") < 8
    assert states.count("pruned") == 12 - states.count("complete")
    assert whole.best().state == "complete"
    assert all(t.reason.startswith("stopped after") for t in whole.trials if t.state == "pruned")
    assert np.isfinite([t.score for t in whole.trials]).all()
