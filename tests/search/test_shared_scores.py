"""Stage 3's scoring: equal to evaluating candidates alone; races keep the winner and resume after any kill."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.shape import ModelShape
from engine.data import EncodedDataset, TaskSpec
from engine.errors import UserError
from engine.evaluation.evaluation import evaluate, predict
from engine.student.supernet import build_student
from kernels.language.expression import GELU_FFN
from search.config.schema import SharedStageConfig
from search.console.progress import Reporter
from search.ledger.ledger import Ledger
from search.samplers import make_sampler
from search.scoring.shared_scores import SharedScorer
from search.scoring.trials import run_trials
from search.space import SearchSpace

SHAPE = ModelShape(24, 3, 24, vocab_size=101, embedding_size=8, max_positions=32)
TASK = TaskSpec("toy", "classification", ("text",), "label", ("bad", "so-so", "good"))


def context(rows=400, spec=TASK, **settings):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(1, 101, offsets[-1]).astype(np.int32)
    model = build_student(SHAPE, Architecture((LayerSpec(GELU_FFN, 4, Fraction(1)),) * 3), 3, TASK, seed=0).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():  # large enough that subnets disagree
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    data = EncodedDataset(tokens, offsets, lengths.astype(np.int32), np.zeros(rows, dtype=np.int64))
    answers = SharedScorer(ctx_of(data, spec, {}), model).evaluator
    largest = Architecture((LayerSpec(GELU_FFN, 4, Fraction(1)),) * 3)
    labels = answers.logits([largest])[0].argmax(-1)  # the largest subnet is right about everything
    order = np.argsort(lengths, kind="stable")
    gold = np.empty(rows, dtype=np.int64)
    gold[order] = labels
    data = EncodedDataset(tokens, offsets, lengths.astype(np.int32), gold)
    return ctx_of(data, spec, settings), model


def ctx_of(data, spec, settings):
    return SimpleNamespace(
        config=SimpleNamespace(stage3=SharedStageConfig(**settings)),
        data=SimpleNamespace(score=data),
        spec=spec,
        score_spec=spec,
        precision="fp32",
        sentinel=None,
        seed=lambda *_: 7,
    )


def search(ctx, model, path, before=(), count=40, together=20):
    space = SearchSpace(SHAPE, budget=(0, 1e9)).with_expressions((GELU_FFN,) * 3)
    largest = Architecture((LayerSpec(GELU_FFN, 4, Fraction(1)),) * 3)
    with Ledger(path) as ledger:
        for trial in before:
            ledger.record(trial)
        sampler = make_sampler("random", space, 0, initial=[largest])
        scorer = SharedScorer(ctx, model)
        race = ctx.config.stage3.race > 1
        return run_trials(
            "stage3", count, sampler, space, scorer, ledger, Reporter(), together=together, as_group=race
        ).trials


def test_scores_are_those_of_evaluating_alone(tmp_path):
    ctx, model = context()
    trials = search(ctx, model, tmp_path / "a.db", count=12, together=5)
    for trial in trials:
        alone = evaluate(model, ctx.data.score, TASK, architecture=trial.architecture)
        assert trial.score == alone["accuracy"]
        assert trial.state == "complete"


def test_scores_by_likelihood_are_the_mean_over_the_split(tmp_path):
    ctx, model = context(rows=90)
    ctx.score_spec = replace(TASK, metric="neg_log_loss")
    for trial in search(ctx, model, tmp_path / "a.db", count=6, together=3):
        logits, gold = predict(model, ctx.data.score, architecture=trial.architecture)
        own = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(gold))
        assert trial.score == pytest.approx(-own.item(), rel=1e-12)


def test_a_race_prunes_losers_and_keeps_exact_scores_of_the_rest(tmp_path):
    ctx, model = context(race=8)
    trials = search(ctx, model, tmp_path / "a.db")
    states = [t.state for t in trials]
    assert states[0] == "complete"
    assert trials[0].score == 1.0
    assert states.count("pruned") > 10
    assert all(t.reason.startswith("behind after") for t in trials if t.state == "pruned")
    for trial in trials:
        if trial.state == "complete":
            alone = evaluate(model, ctx.data.score, TASK, architecture=trial.architecture)
            assert trial.score == alone["accuracy"]


def test_a_race_cut_short_is_run_again_as_it_was(tmp_path):
    ctx, model = context(race=8)
    whole = search(ctx, model, tmp_path / "a.db")
    resumed = search(ctx, model, tmp_path / "b.db", before=whole[:27])
    assert [(t.architecture, t.score, t.state) for t in resumed] == [(t.architecture, t.score, t.state) for t in whole]


def test_a_metric_that_is_no_mean_cannot_be_raced(tmp_path):
    spec = TaskSpec("toy", "classification", ("text",), "label", ("bad", "so-so", "good"), "f1")
    ctx, model = context(spec=spec, race=4)
    with pytest.raises(UserError, match="racing: the metric 'f1'"):
        search(ctx, model, tmp_path / "a.db")


def test_without_memory_for_sharing_candidates_are_scored_alone(tmp_path, monkeypatch):
    ctx, model = context(rows=60)
    expected = [t.score for t in search(ctx, model, tmp_path / "a.db", count=6, together=3)]

    def full(self, *_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("engine.evaluation.shared.SharedEvaluator.logits", full)
    assert [t.score for t in search(ctx, model, tmp_path / "b.db", count=6, together=3)] == expected
