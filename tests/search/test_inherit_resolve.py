"""`--resolve` of a finished run of strategy inherit: another student of its block library, without training."""

from __future__ import annotations

import csv
import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_inherit import small
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import engine  # noqa: F401  registers the model type
from engine.architecture.architecture import Architecture
from engine.architecture.file import load_architecture
from search.config.options import parse, parse_resolve
from search.evidence import read_predictions
from search.inherit.candidates import Budget
from search.inherit.limits import slower
from search.inherit.variants import kept


@pytest.fixture(scope="module")
def run(nursery, folder) -> Path:
    learned = {"finetune__max_steps": 40, "finetune__lr": 5e-3}  # answers that differ from row to row
    ended = nursery.run(small(folder, folder / "runs", "base", **learned), folder / "cache")
    assert ended.code == 0, ended.err
    return folder / "runs" / "base"


def contents(run: Path) -> dict[str, bytes]:
    """What a resolution must leave alone."""
    held = [p for p in run.rglob("*") if p.is_file() and "resolved" not in p.parts and not p.name.startswith(".")]
    return {str(p.relative_to(run)): p.read_bytes() for p in held}


def divergence_on_dev(folder: Path, run: Path, model: Path) -> float:
    """Mean KL divergence from the run's teacher, from texts and formula."""
    with (folder / "dev.csv").open(newline="") as file:
        texts = [row["sentence"] for row in csv.DictReader(file)]
    tokens = AutoTokenizer.from_pretrained(model)(texts, padding=True, return_tensors="pt")
    student = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():
        q = student(**tokens).logits.double().softmax(-1)
    p = torch.from_numpy(read_predictions(run, "teacher")[0]).double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


def test_another_budget_is_answered_without_training_and_says_so(nursery, folder, run):
    before = contents(run)
    ended = nursery.run(["--resolve", str(run), "--budget.encoder", "0.3"], folder / "cache")
    assert ended.code == 0, ended.err
    assert contents(run) == before
    place = run / "resolved" / "encoder-0.3"
    told = json.loads((place / "summary.json").read_text())
    assert told["distilled"] is False
    assert told["score"] == -told["divergence"]["value"]
    assert (told["divergence"]["split"], told["divergence"]["rows"]) == ("dev", 40)
    assert told["divergence"]["value"] == pytest.approx(
        divergence_on_dev(folder, run, place / "model"),
        rel=0.05,  # float32 answers that hardly differ
    )
    assert told["divergence"]["value"] > 1e-7
    assert "not distilled" in ended.out
    card = (place / "model" / "README.md").read_text()
    assert "not distilled" in card
    assert told["distil"] in card
    assert told["distil"] in ended.out
    model = AutoModelForSequenceClassification.from_pretrained(place / "model")
    whole = json.loads((run / "summary.json").read_text())["evidence"]["models"]
    teacher = next(m for m in whole if m["name"] == "teacher")["params"]["encoder"]
    own = sum(p.numel() for p in model.base_model.encoder.parameters())
    assert own == told["encoder"] <= 0.3 * 1.005 * teacher
    assert model.config.source_layers == told["inherit"]["layers"]
    assert load_architecture(place / "architecture.json") == model.config.full_architecture


def test_the_students_weights_are_those_of_the_teacher(nursery, folder, run):
    ended = nursery.run(["--resolve", str(run), "--budget.encoder", "1"], folder / "cache")
    assert ended.code == 0, ended.err
    place = run / "resolved" / "encoder-1"
    told = json.loads((place / "summary.json").read_text())
    student = AutoModelForSequenceClassification.from_pretrained(place / "model").eval()
    teachers = [p for p in (folder / "cache" / "teachers").iterdir() if p.is_dir()]
    (teacher,) = (AutoModelForSequenceClassification.from_pretrained(p).eval() for p in teachers)
    for layer, source in zip(student.base_model.encoder, told["inherit"]["layers"], strict=True):
        original = teacher.base_model.encoder[source].all_ffn[0].dense1.weight
        rows = {tuple(row) for row in original.tolist()}
        assert {tuple(row) for row in layer.all_ffn[0].dense1.weight.tolist()} <= rows
    if len(told["inherit"]["layers"]) == 2 and "1_" not in told["architecture"]:
        ids = torch.randint(5, 20, (4, 7))
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-5)
        assert told["divergence"]["value"] < 1e-5


def test_the_command_that_distils_is_the_same_search_with_the_new_budget(run):
    given = ["--resolve", str(run), "--budget.flops", "1e5", "--objectives.sequence_length", "9"]
    folder, wanted = parse_resolve(given)
    from search.commands.resolve_inherited import command

    words = shlex.split(command(folder, wanted, "flops-100000"))
    assert words[:2] == ["ffnas", "search"]
    config, resume = parse(words[2:])
    assert resume is None
    assert (config.name, config.runs) == ("base-flops-100000", str(run.parent))
    same = {"name": wanted.name, "runs": wanted.runs}
    found, expected = (dataclasses.asdict(c) for c in (dataclasses.replace(config, **same), wanted))
    del found["sampler"], expected["sampler"]
    assert found == expected
    assert config.budget.encoder is None
    assert config.budget.flops == 1e5


@pytest.mark.parametrize("budget", [("latency_ms", "50"), ("total", "0.5"), ("params", "[0,4000]"), ("speedup", "1.2")])
def test_every_kind_of_budget_is_kept(nursery, folder, run, budget):
    name, value = budget
    ended = nursery.run(["--resolve", str(run), f"--budget.{name}", value], folder / "cache")
    assert ended.code == 0, ended.err
    (place,) = (run / "resolved").glob(f"{name}-*")
    told = json.loads((place / "summary.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(place / "model")
    total = sum(p.numel() for p in model.parameters())
    whole = json.loads((run / "summary.json").read_text())["evidence"]["models"]
    teacher = next(m for m in whole if m["name"] == "teacher")["params"]["total"]
    if name in ("latency_ms", "speedup"):
        assert told["latency"]["predicted_ms"] <= told["latency"]["limit_ms"] * 1.001
        assert told["latency"]["measured_ms"] <= told["latency"]["limit_ms"] * 1.1
    if name == "total":
        assert total <= 0.5 * teacher
    if name == "params":
        assert told["costs"]["params"] <= 4000


WRONG = {
    "keep": (["--budget.keep", "0.9"], "needs students that are trained"),
    "memory": (["--budget.memory_mb", "9"], "strategy inherit has no such limit"),
    "too small": (["--budget.encoder", "0.001"], "no student of this teacher keeps it"),
    "no budget": ([], "at least one constraint"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line(nursery, folder, run, case):
    given, message = WRONG[case]
    ended = nursery.run(["--resolve", str(run), *given], folder / "cache")
    assert ended.code == 2
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1, ended.err


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("summary.json", "has not finished"),
        ("study.db", "no longer has study.db"),
        ("trials", "no longer has the block library"),
        ("cache", "no longer has its fine-tuned teacher"),
    ],
)
def test_a_pruned_run_is_refused_in_one_line(nursery, folder, run, tmp_path, gone, message):
    copy, cache = tmp_path / "copy", folder / "cache"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("resolved"))
    if gone == "cache":
        cache = tmp_path / "empty"
    elif gone == "trials":
        config = copy / "config.yaml"
        text = config.read_text()
        assert "  heads:\n  - 1\n  - 1/2\n" in text
        config.write_text(text.replace("  heads:\n  - 1\n  - 1/2\n", "  heads:\n  - 1\n"))
    else:
        (copy / gone).unlink()
    ended = nursery.run(["--resolve", str(copy), "--budget.encoder", "0.3"], cache)
    assert ended.code == 2
    assert message in ended.err
    assert not (copy / "resolved").exists()
    assert not list(cache.glob("teachers/*")) or gone != "cache"


def test_ranked_sets_come_first_and_small_ones_are_passed_over():
    from test_inherit_candidates import toy_library

    from search.commands.resolve_inherited import pick

    library = toy_library(layers=4)
    variants = library.variants
    sizes = np.array([[variants.layer(spec) for spec in variants.specs]] * 4, dtype=np.float64)

    def under(layers: float) -> Budget:
        return Budget(("encoder",), sizes[None], (layers * variants.layer(variants.own),))

    made, reason = pick(library, under(2.0), [(1, 3), (0, 1)])
    assert (kept(made), reason) == ((1, 3), "the layers of the found model")
    made, reason = pick(library, under(2.0), [(2,), (0, 3)])  # one layer cannot use a budget of two
    assert (kept(made), reason) == ((0, 3), "layers that the last round ranked")
    made, reason = pick(library, under(0.5), [(0, 1, 2, 3)])  # four do not fit into half a layer
    assert kept(made) == (0,)
    assert "first layers" in reason
    made, _ = pick(library, under(9.0), [(0, 1, 2, 3)])
    assert made == variants.whole == Architecture((variants.own,) * 4)


def test_a_slower_machine_scales_latency_alone():
    budget = Budget(("latency_ms", "encoder"), np.ones((2, 2, 3)), (6.0, 5.0))
    found = slower(budget, 1.5, rest=2.0)
    assert np.all(found.costs[0] == 1.5)
    assert np.all(found.costs[1] == 1.0)
    assert found.limits == (8.0 - 3.0, 5.0)
