"""Candidates that memory does not hold at once are trained one group after the other, each once, in their order."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.architecture.shape import ModelShape
from engine.distill import Member, Outcome
from engine.distill.room import SHARE, state_bytes, step_bytes
from engine.training.settings import PhaseSettings
from search.config.schema import StageConfig
from search.scoring import proxy as proxy_module
from search.scoring.proxy import ProxyTrainer
from search.space import SearchSpace

SHAPE = ModelShape(48, 3, 48, vocab_size=500, embedding_size=16)
LENGTH, BATCH = 32, 8


def trainer(monkeypatch, free, rungs=0):
    """A proxy trainer whose candidates score their number of FFNs, and the sizes of the groups it trains."""
    score_data = SimpleNamespace(tokens=[], choices=1)
    score_data.last = lambda _share: score_data
    context = SimpleNamespace(
        space=SearchSpace(SHAPE),
        shape=SHAPE,
        device=torch.device("cpu"),
        sentinel=None,
        proxy_targets={},
        config=SimpleNamespace(data=SimpleNamespace(max_length=LENGTH)),
        data=SimpleNamespace(text=[], train=[], score=score_data),
        distiller=lambda *_, **__: None,
        seed=lambda *_: 0,
    )
    task = PhaseSettings(steps=8, batch_size=BATCH)
    settings = StageConfig(rungs=rungs, population=4, text=PhaseSettings(steps=0), task=task)
    monkeypatch.setattr(proxy_module, "phase_data", lambda *_: SimpleNamespace(num_batches=lambda _: 1))
    monkeypatch.setattr(proxy_module, "TeacherTargets", lambda *_, **__: SimpleNamespace(get=None))
    monkeypatch.setattr(proxy_module, "free_bytes", lambda _: free)
    made, groups = ProxyTrainer(context, "stage1", settings, None), []

    def phase(members, part, *_):
        if part == "task":
            groups.append(len(members))
        return [Outcome("done", None) for _ in members]

    monkeypatch.setattr(made, "_member", Member)
    monkeypatch.setattr(made, "_phase", phase)
    monkeypatch.setattr(made, "_score", lambda members: iter([ffns(m.model) for m in members]))
    return made, groups


def ffns(architecture):
    return float(sum(layer.stack for layer in architecture.layers))


def candidates(count):
    space, rng = SearchSpace(SHAPE), np.random.default_rng(0)
    return [space.sample(rng) for _ in range(count)]


def test_one_at_a_time_where_little_is_free(monkeypatch):
    made, groups = trainer(monkeypatch, free=1)
    chosen = candidates(4)
    results = made(chosen)
    assert groups == [1, 1, 1, 1]
    assert [r.score for r in results] == [ffns(a) for a in chosen]


def test_pairs_where_two_fit(monkeypatch):
    chosen = candidates(5)
    states = [state_bytes(a, SHAPE) for a in chosen]
    step = max(step_bytes(a, SHAPE, BATCH * LENGTH) for a in chosen)
    monkeypatch.setattr(proxy_module, "side_by_side", lambda *_: (1, 1))
    free = int((2 * max(states) + step) / SHARE) + 1
    assert 3 * min(states) > 2 * max(states)  # the test's premise: no three of them fit
    made, groups = trainer(monkeypatch, free)
    assert [r.score for r in made(chosen)] == [ffns(a) for a in chosen]
    assert groups == [2, 2, 1]


@pytest.mark.parametrize("free", [1 << 40, None])
def test_all_where_there_is_room_or_nobody_knows(monkeypatch, free):
    made, groups = trainer(monkeypatch, free)
    made(candidates(4))
    assert groups == [4]


def test_compared_candidates_stay_together(monkeypatch):
    made, groups = trainer(monkeypatch, free=1, rungs=1)
    made(candidates(4))
    assert groups == [4]
