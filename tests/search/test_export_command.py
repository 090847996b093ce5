"""`ffnas export` where libraries are missing, and to the hub (formats and scores: test_derive_command.py)."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from engine.architecture.architecture import Architecture
from engine.export.export import export_model
from engine.student import (
    FFNASConfig,
    FFNASForMaskedLM,
    FFNASForMultipleChoice,
    FFNASForQuestionAnswering,
    FFNASForSequenceClassification,
    FFNASModel,
)
from kernels.runtime import Session
from search.cli import main


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = FFNASConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        embedding_size=4,
        max_position_embeddings=24,
        id2label={0: "no", 1: "yes"},
        layers=Architecture.parse(", ".join(["linear1_2(gelu(linear1_2(x,wb1)),wb2)"] * 2)),
    )
    export_model(FFNASForSequenceClassification(config), None, tmp_path / "model", None, {})
    return tmp_path / "model"


@pytest.fixture
def without_onnx(monkeypatch):
    """The libraries of the extra `onnx` but onnxscript are not installed."""
    monkeypatch.setattr("engine.export.onnx.missing_onnx", lambda: ["onnx", "onnxruntime"])


def test_what_needs_no_missing_library_is_written(model, without_onnx, capsys):
    assert main(["export", str(model), "--onnx", "--int8", "--program"]) == 2
    out, err = capsys.readouterr()
    assert err == (
        "ffnas: error: --onnx, --int8: not written, onnx, onnxruntime not installed: run pip install 'ffnas[onnx]' and"
        " the command again\n"
    )
    assert "model.pt2" in out
    assert [e["format"] for e in json.loads((model / "exports.json").read_text())] == ["pytorch", "program"]
    loaded = torch.export.load(model / "model.pt2").module()
    ids = torch.arange(12).view(2, 6)
    expected = FFNASForSequenceClassification.from_pretrained(model)(ids).logits
    logits = loaded(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # fused kernels sum in another order


def test_nothing_is_written_where_nothing_can_be(model, without_onnx, capsys):
    before = sorted(model.iterdir())
    assert main(["export", str(model), "--int8"]) == 2
    assert capsys.readouterr().err.startswith("ffnas: error: --int8: not written, onnx, onnxruntime not installed")
    assert sorted(model.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--private"], "--private goes with --push-to-hub USER/NAME"),
        (["--push-to-hub", "small"], "'small' is no name on the hub: give USER/NAME"),
        (["--push-to-hub", "ann/small", "--program"], "no token for the hub"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_any_work(model, options, message, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["export", str(model), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (model / "model.pt2").exists()


def test_to_the_hub_goes_the_model_alone_unless_formats_are_asked_for(model, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_made_up")
    monkeypatch.setattr(
        "engine.export.hub.push_to_hub",
        lambda folder, name, *, private: seen.append((folder, name, private)) or "there",
    )
    assert main(["export", str(model), "--push-to-hub", "ann/small", "--private"]) == 0
    assert seen == [(model, "ann/small", True)]
    assert capsys.readouterr().out == "on the hub: there\n"
    assert not (model / "model.pt2").exists()


def test_a_native_folder_answers_as_the_model_does(model, tmp_path, capsys):
    assert main(["export", str(model), "--native", str(tmp_path / "native")]) == 0
    out = capsys.readouterr().out
    assert float(out.rsplit(" ", 1)[1]) < 1e-5
    assert not (model / "exports.json").exists()  # no other format was asked for
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = FFNASForSequenceClassification.from_pretrained(model)(ids).logits
    found = Session(tmp_path / "native", threads=1).run(ids.numpy())
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [FFNASForMaskedLM, FFNASForMultipleChoice, FFNASForQuestionAnswering, FFNASModel])
def test_native_folders_of_other_heads(kind, tmp_path, capsys):
    config = FFNASConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, embedding_size=4)
    export_model(kind(config), None, tmp_path / "model", None, {})
    assert main(["export", str(tmp_path / "model"), "--native", str(tmp_path / "native")]) == 0
    assert float(capsys.readouterr().out.rsplit(" ", 1)[1]) < 1e-5


def test_a_native_folder_with_a_precision_tells_what_it_costs(model, tmp_path, capsys):
    """Scores are of the labelled file, in fp32 and in eight bits; sessions take the folder's precision."""
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "some": 4}, "[UNK]")),
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", model_max_length=20,
    )  # fmt: skip
    words.save_pretrained(model)
    table = tmp_path / "dev.csv"
    table.write_text("text,label\n" + "some words,no\nsome more,yes\n" * 3)
    target = tmp_path / "native"
    assert main(["export", str(model), "--native", str(target), "--precision", "int8", "--eval", str(table)]) == 0
    assert "int8: accuracy" in capsys.readouterr().out
    written = json.loads((target / "ffnas.json").read_text())
    measured = written["extra"]["measured"]
    assert (written["precision"], measured["rows"], measured["metric"]) == ("int8", 6, "accuracy")
    assert {"fp32", "int8"} < set(measured)
    ids = np.array([[2, 7, 9, 3]])
    found = Session(target, threads=1).run(ids)
    np.testing.assert_array_equal(found, Session(target, threads=1, precision="int8").run(ids))
    assert np.abs(found - Session(target, threads=1, precision="fp32").run(ids)).max() > 0
    assert main(["export", str(model), "--precision", "int8"]) == 2
    assert "--precision goes with --native" in capsys.readouterr().err
