"""The published recipe in preset `paper` and in the models' presets, and what `paper_exact` changes in a whole run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from published_toys import WORDS, write_glue, write_teacher

from engine.data import DataConfig, load_task
from engine.data.dataset import join
from engine.data.rows import Rows
from engine.data.splits import hold_out, hold_out_groups
from engine.errors import UserError
from engine.objective import layer_map, published_stage_map
from engine.student.configuration import FFNASConfig
from engine.student.init import draw_padding_row
from engine.student.modeling import FFNASModel
from engine.teacher import Teacher
from engine.training.settings import PhaseSettings
from search.cli import main
from search.commands.derive import read
from search.config.options import parse
from search.console.progress import Reporter
from search.context import Context, prepare
from search.phases import phase_data


def test_preset_paper_has_the_published_settings():
    config, _ = parse(["--preset", "paper"])
    assert config.data.task == "glue/mnli"
    assert (config.data.held_out, config.data.score_fraction, config.kd.text_teacher) == ("last", 0.1, "pretrained")
    assert (config.student.layer_norm_eps, config.student.init) == (1e-5, "random")
    assert (config.warmup.sources, config.warmup.epochs, config.warmup.batch_size) == (1, 10, 256)
    for stage in (config.stage1, config.stage2):
        text, task = stage.text, stage.task
        assert (text.sources, text.first, text.fraction, text.epochs, text.lr) == (1, True, 0.02, 1, 1e-4)
        assert (task.first, task.epochs, task.lr, task.batch_size) == (True, 3, 4e-4, 128)
        # a hundredth of the file scores, a tenth of it trains
        assert stage.score_share * config.data.score_fraction == pytest.approx(0.01)
        left = 1 - config.data.score_fraction - config.data.select_fraction
        assert task.fraction * left == pytest.approx(0.1, rel=1e-3)
    assert config.stage3.text.sources is None
    assert config.stage3.task.fraction == 1.0
    assert config.derive.score_rows
    # an own file takes the place of the task, and the other way round
    own, _ = parse(["--preset", "paper", "--data.train", "a.csv"])
    assert (own.data.task, own.data.train) == (None, "a.csv")
    assert parse(["--preset", "paper", "--data.task", "glue/cola"])[0].data.train is None


@pytest.mark.parametrize(
    ("preset", "start", "epochs", "sources"),
    [
        ("efficientbert", "warmup", 10, None),
        ("efficientbert-tiny", "warmup", 10, None),
        ("tinybert6-transfer", "fresh", 3, 1),
        ("tinybert4", "fresh", 10, None),
    ],
)
def test_presets_have_their_recipes(preset, start, epochs, sources):
    config, plan, _ = read(["--preset", preset, "--settings", "paper", "--data.task", "glue/cola"])
    assert plan.start == start
    assert (config.derive.text.epochs, config.derive.text.sources) == (epochs, sources)
    assert (config.derive.task.epochs, config.derive.task.batch_size, config.derive.task.lr) == (50, 32, 5e-5)
    assert config.student.layer_norm_eps == (1e-12 if preset == "tinybert4" else 1e-5)
    assert read(["--preset", preset, "--settings", "demo"])[1].start == "fresh"
    assert read(["--preset", preset, "--settings", "paper", "--start", "fresh"])[1].start == "fresh"


def test_layers_of_the_stages_are_matched_as_published():
    assert published_stage_map(4, 12) == [1, 4, 7, 10]
    assert layer_map(4, 12) == [2, 5, 8, 11]
    assert published_stage_map(6, 12) == layer_map(6, 12) == [1, 3, 5, 7, 9, 11]
    assert published_stage_map(12, 12) == list(range(12))
    with pytest.raises(UserError):
        published_stage_map(13, 12)


@pytest.mark.parametrize("exact", [False, True])
def test_who_teaches_what(exact):
    """Text before fine-tuning, the task after it; only the stages have the published code's map of their own."""
    config, _ = parse(["--preset", "paper", f"--kd.paper_exact={str(exact).lower()}"])
    before, after = (SimpleNamespace(num_layers=12, name=name) for name in ("before", "after"))
    ctx = SimpleNamespace(
        config=config, inherits=False, teacher=after, text_teacher=before, spec=None, device=torch.device("cpu"),
        precision="fp32", shape=SimpleNamespace(num_layers=4),
    )  # fmt: skip
    for part, teacher in (("text", before), ("task", after)):
        for stage in (False, True):
            made = Context.distiller(ctx, part, stage=stage)
            assert made.teacher is teacher
            assert made.layers == ([1, 4, 7, 10] if exact and stage else [2, 5, 8, 11])
            assert made.weights.paper_exact == exact


def rows(count, classes=2):
    return Rows(([f"text {i}" for i in range(count)],), np.arange(count) % classes)


def test_the_last_rows_are_held_out():
    data = rows(100)
    train, (score, select) = hold_out(data, [10, 5], 0, stratify=True, last=True)
    assert train.texts[0] == data.texts[0][:85]
    assert select.texts[0] == data.texts[0][85:90]
    assert score.texts[0] == data.texts[0][90:]
    # texts that stand there twice, but for case, stay in training
    double = Rows(([*data.texts[0][:98], "TEXT 0", "text 99"],), data.labels)
    train, (score,) = hold_out(double, [2], 0, stratify=True, last=True)
    assert score.texts[0] == ["text 97", "text 99"]
    assert train.texts[0][-1] == "TEXT 0"
    groups = [str(i // 4) for i in range(100)]
    train, (score, select) = hold_out_groups(data, [8, 4], 0, groups, last=True)
    assert (score.texts[0], select.texts[0]) == (data.texts[0][92:], data.texts[0][88:92])
    assert train.texts[0] == data.texts[0][:88]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    write_glue(folder / "glue", 120)
    write_teacher(folder / "teacher")
    for name, count in (("wiki", 60), ("books", 30)):
        lines = (" ".join([*WORDS[i % 9 :], *WORDS[: i % 5]][: 3 + i % 9]) for i in range(count))
        (folder / f"{name}.txt").write_text("\n\n".join(f"{line} {name[0]} {i}." for i, line in enumerate(lines)))
    return folder


def test_sources_and_shares_of_text(folder):
    """The first share of the first source, from files and from prepared folders."""
    config = DataConfig(task="glue/sst2", dir=str(folder / "glue"), max_length=24,
                        text=[str(folder / "wiki.txt"), str(folder / "books.txt")])  # fmt: skip
    task = load_task(config)
    assert task.text_sources == (60, 30)
    tokenizer = Teacher.load(folder / "teacher").tokenizer
    text = task.encode(tokenizer, 24).text
    alone = load_task(DataConfig(**{**vars(config), "text": [str(folder / "wiki.txt")]})).encode(tokenizer, 24).text
    ctx = SimpleNamespace(seed=lambda *_: 0)

    def taken(data, **settings):
        return phase_data(ctx, data, PhaseSettings(steps=1, **settings), "x")

    wiki = taken(text, sources=1)
    assert wiki.tokens.tolist() == alone.tokens.tolist()
    assert len(taken(text, sources=2)) == len(taken(text)) == len(text)
    first = taken(text, sources=1, fraction=0.1, first=True)
    assert len(first) == int(0.1 * len(wiki))
    assert all(first.row(i).tolist() == wiki.row(i).tolist() for i in range(len(first)))
    drawn = taken(text, sources=1, fraction=0.1)
    assert len(drawn) == round(0.1 * len(wiki))
    assert drawn.tokens.tolist() != first.tokens.tolist()

    arguments = ["--tokenizer", str(folder / "teacher"), "--max-length", "24", "--workers", "1"]
    both = f"[{folder / 'wiki.txt'},{folder / 'books.txt'}]"
    assert main(["prepare", "--text", both, "--out", str(folder / "both"), *arguments]) == 0
    prepared = load_task(DataConfig(**{**vars(config), "text": [str(folder / "both")]})).encode(tokenizer, 24).text
    assert len(prepared) == len(text)
    chosen = taken(prepared, sources=1, fraction=0.1, first=True)
    batch = chosen.collate(range(len(chosen)))
    for i, length in enumerate(first.lengths):
        assert batch.input_ids[i, :length].tolist() == first.row(i).tolist()


def test_score_rows_join_the_training_rows(folder):
    config = DataConfig(task="glue/mnli", dir=str(folder / "glue"), held_out="last", min_held_out=1)
    tokenizer = Teacher.load(folder / "teacher").tokenizer
    data = load_task(config).encode(tokenizer, 24)
    whole = join((data.train, data.score))
    assert len(whole) == len(data.train) + len(data.score)
    assert whole.labels.tolist() == [*data.train.labels, *data.score.labels]
    for i in range(len(data.score)):
        assert whole.row(len(data.train) + i).tolist() == data.score.row(i).tolist()
    last = data.score.last(0.5)
    assert len(last) == round(len(data.score) / 2)
    assert last.row(len(last) - 1).tolist() == data.score.row(len(data.score) - 1).tolist()


def test_padding_s_row_starts_like_any_other():
    config = FFNASConfig(vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, embedding_size=2000)
    model = FFNASModel(config)
    table = model.embeddings.token_embeddings.weight
    assert not table[0].any()
    torch.manual_seed(0)
    draw_padding_row(model)
    # 2,000 draws: their standard deviation is known to 2 %
    assert table[0].std().item() == pytest.approx(0.02, rel=0.1)
    assert table[1].std().item() == pytest.approx(0.02, rel=0.1)
    model(torch.tensor([[3, 0, 0]])).last_hidden_state.sum().backward()
    assert not table.grad[0].any()


def test_paper_exact_reaches_teacher_tokens_and_student(folder, monkeypatch):
    """What a search begins with, and the student it makes."""
    monkeypatch.setenv("FFNAS_CACHE", str(folder / "cache"))
    options = ["--preset", "smoke", "--strategy", "auto", "--teacher", str(folder / "teacher"), "--threads", "1"]
    options += ["--student.hidden_size", "24", "--student.embedding_size", "16", "--student.init", "random"]
    options += ["--data.task", "glue/mnli", "--data.dir", str(folder / "glue"), "--data.max_length", "12"]
    options += ["--data.min_held_out", "8", "--precision", "fp32", "--teacher_precision", "fp32"]
    made = {}
    for exact in ("false", "true"):
        chosen = ["--strategy", "paper"] if exact == "false" else []
        config, _ = parse([*options, *chosen, "--kd.paper_exact", exact, "--kd.text_teacher", "pretrained"])
        prepared = prepare(config, Reporter())
        assert prepared.config.strategy == "paper"
        ctx = Context(**vars(prepared), rundir=SimpleNamespace(path=folder), ledger=None, reporter=Reporter())
        student = ctx.new_student(ctx.space.sample(np.random.default_rng(0)), "x")
        made[exact] = prepared, ctx, student
    plain, exact = made["false"], made["true"]
    for (prepared, ctx, student), act, eps in ((plain, "gelu", 1e-12), (exact, "gelu_pytorch_tanh", 1e-5)):
        for teacher in (prepared.teacher, ctx.text_teacher):
            assert (teacher.model.config.hidden_act, teacher.model.config.layer_norm_eps) == (act, eps)
        assert student.config.layer_norm_eps == eps
        table = student.base_model.embeddings.token_embeddings.weight
        assert table[0].any() == (eps == 1e-5)
        assert ctx.text_teacher is not ctx.teacher
    # pairs that do not fit are cut in another way
    assert plain[0].data.train.fingerprint() != exact[0].data.train.fingerprint()
    assert plain[0].data.train.lengths.tolist() == exact[0].data.train.lengths.tolist()


@pytest.mark.slow
def test_a_whole_search_under_paper_exact(folder, monkeypatch):
    """Two layers, a step or two a phase: the model handed over has the published arithmetic and its tokenizer."""
    for name, value in (
        ("FFNAS_CACHE", str(folder / "cache")),
        ("HF_HUB_OFFLINE", "1"),
        ("FFNAS_BACKEND", "reference"),
    ):
        monkeypatch.setenv(name, value)
    text = f"[{folder / 'wiki.txt'},{folder / 'books.txt'}]"
    options = [
        *("search", "--preset", "smoke", "--strategy", "auto", "--runs", str(folder / "runs"), "--name", "exact"),
        *("--teacher", str(folder / "teacher"), "--student.hidden_size", "24", "--student.embedding_size", "16"),
        *("--student.init", "random", "--data.task", "glue/mnli", "--data.dir", str(folder / "glue")),
        *("--data.max_length", "24", "--data.min_held_out", "8", "--data.held_out", "last", "--data.text", text),
        *("--kd.paper_exact", "true", "--kd.text_teacher", "pretrained", "--derive.score_rows", "true"),
        *("--warmup.sources", "1", "--stage1.text.sources", "1", "--stage1.text.first", "true"),
        *("--stage1.text.fraction", "0.5", "--stage1.score_share", "0.5", "--stage1.population", "1"),
        *("--stage1.trials", "2", "--stage2.trials", "2", "--stage3.trials", "2", "--finetune.batch_size", "4"),
        *("--baselines.gelu", "false", "--baselines.random", "false", "--finetune.max_steps", "2", "--threads", "1"),
        *("--precision", "fp32", "--teacher_precision", "fp32"),
    ]
    assert main(options) == 0
    best = folder / "runs" / "exact" / "best" / "model"
    config = json.loads((best / "config.json").read_text())
    assert config["layer_norm_eps"] == 1e-5
    assert json.loads((best / "tokenizer_config.json").read_text())["tokenize_chinese_chars"] is False
    from safetensors.torch import load_file

    table = load_file(best / "model.safetensors")["ffnas.embeddings.token_embeddings.weight"]
    assert table[0].any()
    (entry,) = [p for p in (folder / "cache" / "teachers").iterdir() if p.is_dir()]
    teacher = json.loads(next(entry.rglob("config.json")).read_text())
    assert (teacher["hidden_act"], teacher["layer_norm_eps"]) == ("gelu_pytorch_tanh", 1e-5)


def test_strategy_inherit_and_paper_exact_exclude_one_another(folder, capsys, monkeypatch):
    monkeypatch.setenv("FFNAS_CACHE", str(folder / "cache"))
    options = ["--teacher", str(folder / "teacher"), "--data.task", "glue/sst2", "--data.dir", str(folder / "glue")]
    options += ["--data.max_length", "24", "--runs", str(folder / "runs"), "--name", "never"]
    assert main(["search", "--strategy", "inherit", "--kd.paper_exact", "true", *options]) == 2
    assert "kd.paper_exact is for the paper's strategy" in capsys.readouterr().err
    assert not (folder / "runs" / "never").exists()
