"""A teacher of twelve layers, BERT-base's shape, on every path: searches, total budget, resolution, ladder, export.

Random weights are enough for the mechanics. By default the teacher is narrow (96 wide); at BERT-base's own width the
same test takes minutes and is marked slow.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
from fault_runs import Nursery, make_inputs
from test_inherit import small

from search.cli import main

NARROW = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 384}
FULL = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}

ALONE = """
import sys
sys.modules["engine"] = sys.modules["search"] = sys.modules["kernels"] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, out = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
tokens = AutoTokenizer.from_pretrained(folder)(["the film was great", "awful"], padding=True, return_tensors="pt")
with torch.no_grad():
    torch.save({"ids": tokens["input_ids"], "mask": tokens["attention_mask"], "logits": model(**tokens).logits}, out)
"""
"""Loads a model directory without ffnas, as who downloads it does."""


def write_teacher(folder: Path, sizes: dict[str, int]) -> None:
    """Twelve layers of random weights in place of the tiny teacher."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    make_inputs(folder)
    tokenizer = BertTokenizerFast.from_pretrained(folder / "teacher")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=12, max_position_embeddings=32, **sizes)
    BertModel(config).save_pretrained(folder / "teacher")


def loads_alone(model: Path, out: Path) -> None:
    """The directory answers the same without ffnas, by its own code."""
    from transformers import AutoModelForSequenceClassification

    import engine  # noqa: F401  registers the model type

    subprocess.run([sys.executable, "-c", ALONE, str(model), str(out)], check=True, capture_output=True, timeout=240)
    seen = torch.load(out, weights_only=True)
    ours = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():
        logits = ours(seen["ids"], attention_mask=seen["mask"]).logits
    torch.testing.assert_close(logits, seen["logits"], rtol=1e-4, atol=1e-4)


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def teacher_params(run: Path) -> dict[str, int]:
    models = summary(run)["evidence"]["models"]
    return next(m["params"] for m in models if m["name"] == "teacher")


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(NARROW, id="narrow", marks=pytest.mark.timeout(900)),
        pytest.param(FULL, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_twelve_layers_on_every_path(tmp_path, sizes):
    write_teacher(tmp_path, sizes)
    runs, cache = tmp_path / "runs", tmp_path / "cache"
    few = {"inherit__candidates": 2, "inherit__uniform": 1, "inherit__random": 1}
    with Nursery() as nursery:

        def ended(argv: list[str]) -> str:
            found = nursery.run(argv, cache, timeout=1800)
            assert found.code == 0, found.err
            return found.out

        ended(small(tmp_path, runs, "encoder", budget__encoder=0.25, **few))
        found = summary(runs / "encoder")
        assert 1 <= len(found["inherit"]["layers"]) <= 12
        encoder = next(m for m in found["evidence"]["models"] if m["name"] == "found")["params"]["encoder"]
        assert encoder <= 0.25 * 1.005 * teacher_params(runs / "encoder")["encoder"]

        said = ended(["--resolve", str(runs / "encoder"), "--budget.encoder", "0.1"])
        resolved = runs / "encoder" / "resolved" / "encoder-0.1"
        assert (
            json.loads((resolved / "summary.json").read_text())["encoder"]
            <= 0.1 * 1.005 * (teacher_params(runs / "encoder")["encoder"])
        )
        assert "not distilled" in said

        ended(small(tmp_path, runs, "total", budget__encoder="null", budget__total=0.2, **few))
        weights = next(m for m in summary(runs / "total")["evidence"]["models"] if m["name"] == "found")["params"]
        assert weights["total"] <= 0.2 * teacher_params(runs / "total")["total"]

        ended(small(tmp_path, runs, "keep", budget__encoder="null", budget__keep=0.5))
        ladder = summary(runs / "keep")["inherit"]["keep"]["ladder"]
        assert [rung["encoder"] for rung in ladder] == sorted(rung["encoder"] for rung in ladder)
        assert 5 <= len(ladder) <= 7  # sizes that the solver fills with the same student count once

    for k, model in enumerate(
        (runs / "encoder" / "best" / "model", resolved / "model", runs / "keep" / "best" / "model")
    ):
        loads_alone(model, tmp_path / f"{k}.pt")
    assert main(["export", str(runs / "encoder"), "--program"]) == 0
    assert (runs / "encoder" / "best" / "model" / "exports.json").is_file()
