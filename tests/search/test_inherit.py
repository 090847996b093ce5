"""Strategy inherit, end to end with a tiny random BERT: results, budgets, controls, kills, wrong input."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
from fault_runs import options, outcome, unfinished_files

import engine  # noqa: F401  registers the model type
from engine.architecture.architecture import SKIP, Architecture, LayerSpec
from engine.architecture.shape import ModelShape
from engine.data import Batch
from engine.data.task import head_of
from kernels.language.expression import parse_expression
from search.evidence import read_predictions
from search.inherit.controls import random_students, uniform
from search.inherit.last_round import rungs_of
from search.inherit.variants import kept, variants, with_layer
from search.ledger.ledger import Ledger

HEAD = head_of("classification")

GELU = parse_expression("linear(gelu_erf(linear(x,wb1)),wb2)")
SHAPE = ModelShape(24, 4, 96, vocab_size=100, embedding_size=None, num_heads=4)
SMALL = {
    "strategy": "inherit",
    "inherit.steps": 6,
    "inherit.round_steps": 6,
    "inherit.rungs": 1,
    "inherit.candidates": 3,
    "inherit.uniform": 2,
    "inherit.random": 2,
    "inherit.calibration_tokens": 300,
    "inherit.score_tokens": 200,
    "inherit.evaluations": 2,
    "inherit.ratios": "[1,1/2,1/4]",
    "inherit.heads": "[1,1/2]",
    "budget.encoder": 0.4,
}


def small(folder: Path, runs: Path, name: str, **more: object) -> list[str]:
    """Options of a search of seconds."""
    values = {**SMALL, **{key.replace("__", "."): value for key, value in more.items()}}
    return [*options(folder, runs, name), *(word for k, v in values.items() for word in (f"--{k}", str(v)))]


@pytest.fixture(scope="module")
def calm(nursery, folder) -> dict:
    ended = nursery.run(small(folder, folder / "runs", "calm"), folder / "cache", plots=True)
    assert ended.code == 0, ended.err
    path = folder / "runs" / "calm"
    return {"path": path, "outcome": outcome(path), "seconds": ended.seconds, "out": ended.out}


def test_what_is_found_keeps_the_budget_and_is_told_with_its_rivals(calm):
    summary = json.loads((calm["path"] / "summary.json").read_text())
    models = {m["name"]: m for m in summary["evidence"]["models"]}
    teacher, found = models["teacher"]["params"]["encoder"], models["found"]["params"]["encoder"]
    assert found <= 0.4 * 1.005 * teacher
    assert {"found", "teacher", "bag_of_words", "majority"} <= set(models)
    assert summary["inherit"]["chosen"] in ("search", "uniform", "random")
    assert set(summary["baselines"]) | {"search"} >= {summary["inherit"]["chosen"]}
    assert summary["evidence"]["verdict"] in calm["out"]
    rows = {name: read_predictions(calm["path"], name)[0] for name in ("found", "teacher")}
    p, q = (torch.from_numpy(rows[name]).double().softmax(-1) for name in ("teacher", "found"))
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert summary["inherit"]["divergence"][summary["inherit"]["chosen"]] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert (calm["path"] / "report.html").stat().st_size > 10_000


def test_the_found_model_answers_and_says_where_its_layers_come_from(calm):
    model = calm["path"] / "best" / "model"
    answer = pipeline("text-classification", model=str(model))("the film was great")
    assert answer[0]["label"] in ("bad", "good")
    config = json.loads((model / "config.json").read_text())
    summary = json.loads((calm["path"] / "summary.json").read_text())
    assert config["source_layers"] == summary["inherit"]["layers"]
    assert config["num_hidden_layers"] == len(summary["inherit"]["layers"])


def test_library_and_round_are_trials_of_the_ledger(calm):
    with Ledger(calm["path"] / "study.db") as ledger:
        library, last = ledger.trials("library"), ledger.trials("round")
    made = variants(ModelShape(16, 2, 32, 100, None, num_heads=2), GELU, *_shares())
    assert len(library) == 2 * len(made.alone)
    assert all(t.score <= 1e-6 for t in library)  # minus a divergence
    untouched = [t for t in library if t.number % len(made.specs) == 0]
    assert all(t.score == 0 for t in untouched)
    assert {t.attrs["group"] for t in last} == {"solved", "uniform", "random"}
    assert any(t.state == "complete" for t in last)


def _shares():
    return (Fraction(1), Fraction(1, 2), Fraction(1, 4)), (Fraction(1), Fraction(1, 2))


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_a_killed_run_resumes_to_the_same_end(nursery, folder, calm, share):
    name = f"kill{share}"
    argv = small(folder, folder / "runs", name)
    killed = nursery.run(argv, folder / f"cache-{name}", kill_after=share * calm["seconds"] * 0.6)
    run = folder / "runs" / name
    assert killed.code in (-9, 0), killed.err
    if run.exists():
        assert unfinished_files(run) == []
    again = ["--resume", str(run)] if (run / "config.yaml").exists() else argv
    resumed = nursery.run(again, folder / f"cache-{name}")
    assert resumed.code == 0, resumed.err
    assert outcome(run) == calm["outcome"]


def test_a_solved_latency_budget_is_part_of_the_run(nursery, folder, tmp_path):
    ended = nursery.run(small(folder, tmp_path, "fast", budget__speedup=1.05, inherit__random=0), tmp_path / "cache")
    assert ended.code == 0, ended.err
    times = json.loads((tmp_path / "fast" / "library" / "latency.json").read_text())
    took = json.loads((tmp_path / "fast" / "summary.json").read_text())["latency"]
    assert 0 < times["rest"] < times["whole"]
    assert 0 < took["predicted_ms"] <= times["whole"] / 1.05 * 1.001
    assert took["measured_ms"] > 0
    assert times["variants"][-1] == 0
    assert min(times["variants"][:-1]) > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"budget__encoder": 0.01}, "budget"),
        ({"inherit__ratios": "[2]"}, "inherit.ratios"),
        ({"inherit__heads": "[]"}, "inherit.heads"),
        ({"inherit__round_steps": 0}, "inherit.round_steps"),
        ({"strategy": "other"}, "strategy: 'other' is not known"),
    ],
)
def test_wrong_input_ends_in_one_line(nursery, folder, tmp_path, more, message):
    ended = nursery.run(small(folder, tmp_path, "wrong", **more), folder / "cache")
    assert ended.code == 2
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_variants_cost_what_models_of_them_have():
    made = variants(SHAPE, GELU, (Fraction(1), Fraction(3, 8)), (Fraction(1), Fraction(1, 2)))
    assert made.specs[0] == LayerSpec(GELU, 1, Fraction(1))
    assert made.specs[-1] == SKIP
    head, hidden = 24 // 4, 24
    attention = 4 * (hidden * hidden + hidden) + 2 * hidden
    assert made.layer(made.specs[0]) == attention + 2 * hidden * 96 + 96 + hidden + 2 * hidden
    fewer = 3 * (hidden * 2 * head + 2 * head) + 2 * head * hidden + 3 * hidden
    assert made.layer(LayerSpec(GELU, 1, Fraction(3, 8), 2)) == fewer + 2 * hidden * 36 + 36 + 3 * hidden
    assert made.layer(SKIP) == 0
    assert made.encoder(made.whole) == 4 * made.layer(made.own)


def test_joint_variants_are_the_sum_of_two_alone():
    made = variants(SHAPE, GELU, (Fraction(1), Fraction(1, 2)), (Fraction(1), Fraction(1, 2)))
    ((joint, (heads, width)),) = made.joint.items()
    assert (made.specs[joint].heads, made.specs[joint].ratio) == (2, Fraction(1, 2))
    assert (made.specs[heads].heads, made.specs[heads].ratio) == (2, Fraction(1))
    assert (made.specs[width].heads, made.specs[width].ratio) == (None, Fraction(1, 2))


def test_controls_keep_the_budget_and_are_what_they_say():
    made = variants(SHAPE, GELU, tuple(Fraction(1, k) for k in (1, 2, 4)), (Fraction(1), Fraction(1, 2)))
    most = made.encoder(made.whole) * 0.5

    def fits(architecture: Architecture) -> bool:
        return bool(kept(architecture)) and made.encoder(architecture) <= most

    hand = uniform(made, fits)
    assert hand
    for architecture in hand:
        own = {layer for layer in architecture.layers if not layer.skipped}
        (spec,) = own
        assert spec.heads is None
        assert fits(architecture)
        wider = [s for s in made.specs if s.heads is None and s.stack and s.ratio > spec.ratio]
        for other in wider:  # the widest that fits
            grown = architecture
            for index in kept(architecture):
                grown = with_layer(grown, index, other)
            assert not fits(grown)
    drawn = random_students(made, fits, 5, seed=3)
    assert len(set(drawn)) == len(drawn) == 5
    assert all(fits(a) for a in drawn)
    assert drawn == random_students(made, fits, 5, seed=3)
    assert random_students(made, lambda _: False, 5, seed=3) == []


@pytest.mark.parametrize(
    ("steps", "count", "expected"), [(96, 2, [32, 64, 96]), (6, 1, [3, 6]), (5, 0, [5]), (1, 3, [1])]
)
def test_rungs_are_spread_evenly(steps, count, expected):
    assert rungs_of(steps, count) == expected


def test_a_divergence_is_zero_for_equal_answers_and_matches_the_formula():
    from engine.distill.inherited import hidden_difference

    divergence = HEAD.divergence

    own, wanted = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    p, q = wanted.softmax(-1), own.softmax(-1)
    torch.testing.assert_close(divergence(own, wanted).double(), (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)
    assert divergence(own, own).abs().max() < 1e-6
    h = torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    torch.testing.assert_close(
        hidden_difference(h + 2.0, h, mask), torch.tensor(4.0) / h[mask].var(correction=0), rtol=1e-4, atol=1e-5
    )


def test_a_block_gives_the_same_every_time_and_the_whole_block_what_the_teacher_gives():
    from transformers import BertConfig, BertForSequenceClassification

    from engine.student.calibration import calibrate, reorder
    from engine.student.from_encoder import standard_model
    from search.inherit.library import Library

    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = BertConfig(**sizes, intermediate_size=96, max_position_embeddings=16, hidden_dropout_prob=0.5)
    model = standard_model(BertForSequenceClassification(config)).eval().requires_grad_(False)
    ids = torch.randint(1, 24, (6, 9))
    batch = Batch(ids, torch.ones_like(ids).bool(), torch.zeros_like(ids))
    made = variants(SHAPE, GELU, (Fraction(1), Fraction(1, 4)), (Fraction(1), Fraction(1, 2)))
    library = Library(model, reorder(model, calibrate(model, [batch])), made, HEAD, np.zeros((4, len(made.specs))))
    x = torch.randn(2, 5, 24)
    for index, spec in ((0, made.specs[1]), (3, made.specs[2])):
        first = library.block(index, spec)(x, None)
        assert torch.equal(first, library.block(index, spec)(x, None))
        assert not torch.equal(first, x)
    layer = model.base_model.encoder[2]
    whole = layer(x, None, model.base_model.planner.full[2])[0]
    torch.testing.assert_close(library.block(2, made.own)(x, None), whole)
    assert torch.equal(library.block(2, SKIP)(x, None), x)
    student = library.assemble(Architecture((made.own, SKIP, SKIP, made.specs[1])))
    assert student.config.source_layers == [0, 3]
    assert not any(m.p for m in student.modules() if isinstance(m, torch.nn.Dropout))
