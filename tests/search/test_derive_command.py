"""`ffnas derive` and `ffnas export`: a preset distilled without a search, resumed, exported, scored."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from test_run import write_task

from engine.architecture.file import load_architecture
from engine.published.presets import PRESETS
from search.cli import main
from search.commands.derive import read


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """train.csv, dev.csv and a teacher of 6 layers and 12 heads, with random weights."""
    from test_run import FILLER, WORDS
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("derive")
    write_task(folder / "train.csv", 300, seed=1)
    write_task(folder / "dev.csv", 60, seed=2)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *WORDS["bad"], *WORDS["good"]]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return folder


def options(folder, name):
    return [
        *("--settings", "smoke", "--runs", str(folder / "runs"), "--name", name, "--teacher", str(folder / "teacher")),
        *("--data.train", str(folder / "train.csv"), "--data.dev", str(folder / "dev.csv"), "--threads", "1"),
        *("--precision", "fp32", "--teacher_precision", "fp32"),
        *("--student.hidden_size", "24", "--student.ffn_size", "24", "--student.embedding_size", "8"),
        *(
            "--data.max_length",
            "24",
            "--data.min_held_out",
            "30",
            "--derive.task.steps",
            "4",
            "--derive.text.steps",
            "2",
        ),
    ]


@pytest.fixture(scope="module")
def derived(workspace):
    """The run directory of a derivation of efficientbert-tiny's layers at H = 24."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FFNAS_CACHE", str(workspace / "cache"))
        assert main(["derive", "--preset", "efficientbert-tiny", *options(workspace, "a")]) == 0
        yield workspace / "runs" / "a"


def test_the_model_has_the_presets_layers(derived):
    summary = json.loads((derived / "summary.json").read_text())
    assert summary["best"]["architecture"] == str(PRESETS["efficientbert-tiny"].architecture)
    config = json.loads((derived / "best" / "model" / "config.json").read_text())
    assert (config["hidden_size"], config["num_attention_heads"]) == (24, 12)
    card = (derived / "best" / "model" / "README.md").read_text()
    assert "architecture from: efficientbert-tiny" in card
    assert "first weights: fresh" in card
    assert (derived / "report.html").is_file()
    assert not list((derived / "stage3").glob("*"))


def test_resuming_repeats_nothing(derived):
    before = load_file(derived / "best" / "model" / "model.safetensors")
    seconds = json.loads((derived / "phases.json").read_text())["derive task"]
    assert main(["derive", "--resume", str(derived)]) == 0
    after = load_file(derived / "best" / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((derived / "phases.json").read_text())["derive task"] == seconds


@pytest.mark.parametrize("start", ["model", "supernet", "warmup"])
def test_first_weights_can_be_given(derived, workspace, start):
    """No training step: the model's encoder is what was given."""
    given = {"model": derived / "best" / "model", "supernet": derived / "checkpoints" / "derive" / "task.safetensors"}
    name = f"from-{start}"
    plan = ["--architecture", str(derived / "best" / "architecture.json"), "--start", str(given.get(start, start))]
    none = ["--derive.task.steps", "0", "--derive.text.steps", "0", "--warmup.steps", "2"]
    assert main(["derive", *plan, *options(workspace, name), "--student.num_heads", "12", *none]) == 0
    run = workspace / "runs" / name
    made = load_file(run / "best" / "model" / "model.safetensors")
    if start == "warmup":
        source, kept = load_file(run / "stage1" / "supernet.safetensors"), load_architecture
        assert kept(run / "best" / "architecture.json") == PRESETS["efficientbert-tiny"].architecture
    else:
        source = load_file(derived / "checkpoints" / "derive" / "task.safetensors")
    for key, value in made.items():
        if key.startswith(("ffnas.embeddings.", "ffnas.encoder.")):
            part = tuple(slice(size) for size in value.shape)
            assert torch.equal(value, source[key][part]), key


def test_the_recipe_follows_the_task_at_full_size():
    config, plan, _ = read(["--preset", "efficientbert", "--data.train", "nyu-mll/glue:cola@train"])
    assert (config.derive.task.epochs, config.derive.task.lr, config.derive.task.batch_size) == (50, 5e-5, 32)
    assert (config.derive.text.epochs, config.student.hidden_size, plan.start) == (10, 540, "warmup")
    config, _, _ = read(["--preset", "tinybert6-transfer", "--derive.task.epochs", "3"])
    assert (config.space.policy, config.student.embedding, config.student.ffn_size) == ("pad", "full", 3072)
    assert config.derive.task.epochs == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of --preset and --architecture"),
        (["--preset", "nix"], "'nix' is not known"),
        (["--preset", "mobilebert-tiny"], "no FFNAS student"),
        (["--preset", "efficientbert-plus"], "multi-task supernet"),
        (["--preset", "efficientbert", "--start", "nowhere"], "'nowhere' is neither"),
        (["--preset", "efficientbert", "--student.num_layers", "3"], "the architecture has 6"),
        (["--architecture", "linear(x,wb1)"], "architecture"),
        (["--resume", "nowhere"], "derive.json"),
        (["--resume", "nowhere", "--preset", "efficientbert"], "no other option"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, capsys):
    assert main(["derive", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_other_formats_agree_and_are_scored(derived, workspace, capsys):
    pytest.importorskip("onnxruntime")
    assert main(["export", str(derived)]) == 0
    result = {e["format"]: e for e in json.loads((derived / "best" / "model" / "exports.json").read_text())}
    assert set(result) == {"pytorch", "program", "onnx", "int8"}
    assert result["program"]["largest_difference"] <= 1e-6
    assert result["onnx"]["largest_difference"] <= 1e-5  # float32 in another order
    assert 0 < result["int8"]["largest_difference"] <= 0.3  # weights and activations of 8 bits, logits of order 1
    accuracy = json.loads((derived / "summary.json").read_text())["best"]["metrics"]["dev"]["accuracy"]
    assert all(result[name]["metrics"]["accuracy"] == pytest.approx(accuracy) for name in ("pytorch", "onnx"))
    capsys.readouterr()
    model = str(derived / "best" / "model")
    assert main(["export", model, "--program", "--eval", str(workspace / "dev.csv")]) == 0
    assert f"{accuracy:.4f}" in capsys.readouterr().out
    assert main(["export", str(workspace)]) == 2
