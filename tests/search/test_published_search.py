"""Searches on published tasks, a few steps each: every kind of task, prepared text, several tasks in stage 3."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from published_toys import WORDS, write_glue, write_race, write_squad, write_swag, write_teacher

from engine.architecture.shape import ModelShape
from engine.data import DataConfig, encode_task, load_task
from engine.data.mixture import TaskMixture, other_tasks
from engine.student.multitask import MultiTaskStudent
from engine.student.supernet import build_student
from engine.teacher import Teacher
from engine.training.loop import cycle
from search.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published-search")
    write_glue(folder)
    for version in ("v1.1", "v2.0"):
        write_squad(folder / f"train-{version}.json", version=version)
        write_squad(folder / f"dev-{version}.json", 6, seed=1, version=version)
    write_swag(folder / "SWAG")
    write_race(folder / "RACE")
    write_teacher(folder / "teacher")
    (folder / "text.txt").write_text("\n\n".join(" ".join(WORDS[i % 7 :]) + "." for i in range(80)))
    return folder


def search(folder, name, monkeypatch, *arguments):
    monkeypatch.setenv("FFNAS_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FFNAS_BACKEND", "reference")  # kernels are not built for the cache of a test
    options = [
        *("search", "--preset", "smoke", "--runs", str(folder / "runs"), "--name", name),
        *("--teacher", str(folder / "teacher"), "--student.hidden_size", "24", "--student.embedding_size", "16"),
        *("--data.dir", str(folder), "--data.max_length", "40", "--data.min_held_out", "8", "--threads", "1"),
        *("--baselines.gelu", "false", "--baselines.random", "false", "--finetune.max_steps", "3"),
        *("--precision", "fp32", "--teacher_precision", "fp32"),
    ]
    assert main([*options, *arguments]) == 0
    return folder / "runs" / name


def test_several_tasks_and_prepared_text(folder, monkeypatch):
    """MNLI, scored, beside a class and a number task; two dev splits are reported; the text is prepared."""
    options = ["--tokenizer", str(folder / "teacher"), "--max-length", "24", "--workers", "1"]
    assert main(["prepare", "--text", str(folder / "text.txt"), "--out", str(folder / "prepared"), *options]) == 0
    path = search(
        *(folder, "several", monkeypatch, "--data.task", "glue/mnli", "--data.tasks", "[glue/sst2,glue/stsb]"),
        *("--data.text", str(folder / "prepared")),
    )
    summary = json.loads((path / "summary.json").read_text())
    assert {"accuracy", "accuracy_mismatched"} <= set(summary["best"]["metrics"]["dev"])
    assert summary["task"]["rows"]["text"] == 80
    from safetensors import safe_open

    with safe_open(path / "stage3" / "supernet.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"heads.glue/sst2.classifier.weight", "heads.glue/stsb.classifier.weight"} <= names
    assert "main.classifier.weight" in names


def test_question_answering_runs_through_all_stages(folder, monkeypatch):
    path = search(folder, "squad", monkeypatch, "--data.task", "squad_v2")
    metrics = json.loads((path / "summary.json").read_text())["best"]["metrics"]["dev"]
    assert {"f1", "exact_match", "answered_f1", "unanswered_accuracy"} == set(metrics)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["squad", "swag", "race", "glue/cola", "glue/stsb", "glue/qnli", "glue/wnli"])
def test_every_kind_of_task_runs_through_all_stages(folder, monkeypatch, task):
    path = search(folder, task.replace("/", "-"), monkeypatch, "--data.task", task)
    summary = json.loads((path / "summary.json").read_text())
    assert np.isfinite(summary["best"]["metric"]["value"])


def mixture(folder):
    tokenizer = Teacher.load(folder / "teacher").tokenizer
    config = DataConfig(task="glue/mnli", dir=str(folder), tasks=["glue/rte", "glue/stsb"], max_length=24)
    data = load_task(config)
    main_task = encode_task(data.train, data.spec, tokenizer, 24)
    others = other_tasks(config, tokenizer, None, 0)
    assert list(others) == ["glue/rte", "glue/stsb"]
    return TaskMixture({"glue/mnli": main_task, **{name: task.train for name, task in others.items()}})


def test_an_epoch_is_one_pass_over_every_task_and_any_step_can_be_reached(folder):
    data = mixture(folder)
    count = data.num_batches(7)
    assert count == sum(part.num_batches(7) for part in data.parts.values())
    stream = cycle(data, 7, seed=5)
    whole = [next(stream) for _ in range(2 * count + 2)]
    for epoch in range(2):
        of_epoch = whole[epoch * count : (epoch + 1) * count]
        for name, part in data.parts.items():
            own = [b for b in of_epoch if b.task == name]
            expected = list(part.batches(7, seed=5, epoch=epoch))
            assert len(own) == len(expected)
            assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(own, expected, strict=True))
    tasks = [b.task for b in whole[:count]]
    assert tasks != sorted(tasks)
    assert tasks != [b.task for b in whole[count : 2 * count]]
    for start in (1, count - 1, count, count + 3):
        again = next(cycle(data, 7, seed=5, start_step=start))
        assert again.task == whole[start].task
        assert torch.equal(again.input_ids, whole[start].input_ids)
        assert torch.equal(again.labels, whole[start].labels)
    half = data.subset(len(data) // 2, seed=1)
    assert {name: len(part) for name, part in half.parts.items()} == {
        name: pytest.approx(len(part) / 2, abs=1) for name, part in data.parts.items()
    }


def test_tasks_share_the_encoder_and_leave_each_other_s_heads_alone(folder):
    from engine.data.catalog import TASKS

    shape = ModelShape(hidden_size=12, num_layers=2, ffn_size=12, vocab_size=60, embedding_size=8, max_positions=32,
                       teacher_hidden_size=16)  # fmt: skip
    models = {
        name: build_student(shape, None, 2, TASKS[name].spec, seed=i, hidden_dropout_prob=0.0)
        for i, name in enumerate(["glue/mnli", "glue/rte", "glue/stsb"])
    }
    several = MultiTaskStudent(models["glue/mnli"], "glue/mnli", {n: m for n, m in models.items() if n != "glue/mnli"})
    names = [name for name, _ in several.named_parameters()]
    encoder = [n for n in names if n.startswith("main.ffnas.")]
    assert len(names) == len(encoder) + 3 * 2  # a weight and a bias for each head
    optimizer = torch.optim.AdamW(several.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in several.named_parameters()}
    several.train()
    assert several.of("glue/rte").ffnas.training
    output = several.of("glue/rte")(torch.randint(5, 60, (4, 6)), labels=torch.tensor([0, 1, 1, 0]))
    output.loss.backward()
    optimizer.step()
    changed = {name for name, p in several.named_parameters() if not torch.equal(p, before[name])}
    heads = {name for name in changed if "ffnas" not in name}
    assert heads == {"heads.glue/rte.classifier.weight", "heads.glue/rte.classifier.bias"}
    assert any(name.startswith("main.ffnas.encoder.0") for name in changed)
