"""`ffnas latency MODEL`: every side runs, the table and files say what was measured."""

from __future__ import annotations

import json

import pytest
import torch
from encoder_reference import small_config
from transformers import BertConfig, BertForSequenceClassification

from engine.export.export import export_model
from engine.latency.models import Case, Timing, interleaved, subjects_of
from engine.latency.others import missing
from engine.student import FFNASForSequenceClassification
from search.cli import guarded
from search.commands.model_latency import command, table


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    export_model(FFNASForSequenceClassification(small_config(vocab_size=1200)).eval(), None, folder / "ours", None, {})
    small = BertConfig(
        vocab_size=1200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForSequenceClassification(small).save_pretrained(folder / "bert")
    return folder


def test_sides_of_one_model_agree(models):
    case = Case("fp32", 1, 2, 7)
    with subjects_of([str(models / "ours"), str(models / "bert")], torch.device("cpu")) as (ours, bert):
        eager, fused = (ours.runner(side, case)().logits for side in ("eager", "ffnas"))
        torch.testing.assert_close(eager, fused, rtol=1e-5, atol=1e-5)
        others = ("runtime", "runtime_int8", "onnx", "int8", "openvino")
        assert ours.sides == ("eager", "compile", "ffnas", *others)
        assert bert.sides == ("eager", "compile", *others)
        for subject in (ours, bert):
            plain = subject.runner("eager", case)().logits
            torch.testing.assert_close(torch.from_numpy(subject.runner("runtime", case)()), plain, rtol=1e-5, atol=1e-5)
        assert ours.runner("int8", Case("bf16", 1, 2, 7)) is None
        assert ours.runner("runtime_int8", Case("bf16", 1, 2, 7)) is None
        assert ours.runner("onnx", Case("bf16", 1, 2, 7)) is None
        assert ours.runner("eager", Case("fp32", 1, 1, 500)) is None
        assert ours.runner("ffnas", Case("bf16", 1, 2, 7))().logits.dtype == torch.bfloat16


def test_the_command_writes_table_plot_and_json(models, tmp_path, capsys):
    before = torch.get_num_threads()
    arguments = [
        *(str(models / "ours"), "--baseline", str(models / "bert"), "--batches", "1", "3", "--lengths", "7", "500"),
        *("--threads", "1", "--sides", "eager", "ffnas", "--rounds", "2", "--out", str(tmp_path / "out")),
    ]
    assert guarded(command, arguments) == 0
    assert torch.get_num_threads() == before
    result = json.loads((tmp_path / "out" / "latency.json").read_text())
    timed = [t for t in result["timings"] if t["median"]]
    ours = [t for t in timed if t["model"] == str(models / "ours")]
    assert {(t["side"], t["batch"], t["length"]) for t in ours} == {
        (s, b, 7) for s in ("eager", "ffnas") for b in (1, 3)
    }
    assert all(t["fastest"] <= t["median"] <= t["slowest"] for t in timed)
    assert any("length" in t["note"] for t in result["timings"] if not t["median"])
    assert (tmp_path / "out" / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "latency.md").read_text().splitlines()[2] in capsys.readouterr().out


def test_ratios_are_to_the_eager_baseline_and_the_models_own_eager():
    case = Case("fp32", 2, 32, 128)
    rows = [("big", "eager", 4.4), ("small", "eager", 1.3), ("small", "ffnas", 1.0)]
    text = table([Timing(model, side, case, seconds, seconds, seconds) for model, side, seconds in rows], "big")
    assert text.splitlines()[-1].endswith("| 1000.0 | 32.0 | 4.40 | 1.30 |")


def test_sides_run_in_turns_and_the_order_reverses():
    calls = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    import engine.latency.models as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLICE", 0.0)
        times = interleaved(sides, 3)
    assert calls == ["a", "b", *"abbaab"]
    assert {len(values) for values in times.values()} == {3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nix"], "neither a preset"),
        (["tinybert4", "--threads", "no"], "--threads"),
        (["tinybert4", "--sides", "x"], "--sides"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, capsys):
    assert guarded(command, [*arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_onnxruntime_the_others_are_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("engine.latency.others.missing_onnx", lambda: ["onnx"])
    small = ["--batches", "1", "--lengths", "4", "--threads", "1", "--rounds", "1", "--out", str(tmp_path / "out")]
    assert guarded(command, ["tinybert4", "--baseline", "none", "--sides", "onnx", *small]) == 2
    assert "ffnas[onnx]" in capsys.readouterr().err
    monkeypatch.setattr("search.commands.model_latency.SIDE_NAMES", {"eager": "eager", "onnx": "onnxruntime"})
    assert guarded(command, ["tinybert4", "--baseline", "none", *small]) == 0
    out = capsys.readouterr()
    assert "without onnxruntime" in out.out + out.err
    assert "| eager |" in out.out
    assert "| onnxruntime |" not in out.out


@pytest.mark.slow
def test_compiled_and_onnx_sides_run(models):
    pytest.importorskip("onnxruntime")
    case = Case("fp32", 1, 2, 7)
    with subjects_of([str(models / "ours"), str(models / "bert")], torch.device("cpu")) as subjects:
        for subject in subjects:
            expected = subject.runner("eager", case)().logits
            torch.testing.assert_close(subject.runner("compile", case)().logits, expected, rtol=1e-4, atol=1e-5)
            onnx = torch.as_tensor(subject.runner("onnx", case)()["logits"])
            torch.testing.assert_close(onnx, expected, rtol=1e-4, atol=1e-5)
            rough = torch.as_tensor(subject.runner("int8", case)()["logits"])
            assert (rough - expected).abs().max() < 0.05 * max(1.0, expected.abs().max())
            if not missing("openvino"):
                found = next(iter(subject.runner("openvino", case)().values()))
                torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-3, atol=1e-4)
