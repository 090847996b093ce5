"""Fine-tuning of a tiny teacher on a task it can learn: the result, the cache, determinism, resumption."""

from __future__ import annotations

import json
import logging

import finetune_toys
import pytest
import torch
import torch.nn.functional as F
from finetune_toys import CLASSES, FRESH, NUMBERS, QUICK, assert_same_weights, make_task, weights_of
from transformers import AutoModelForSequenceClassification

from engine.data.task import head_of
from engine.errors import UserError
from engine.evaluation.evaluation import evaluate
from engine.teacher import FinetuneSettings, Teacher
from engine.teacher.finetune import finetune
from engine.training.optim import build_optimizer, linear_schedule

source, task = finetune_toys.source, finetune_toys.task
"""Fixtures."""


def test_learns_reports_and_is_loadable_by_transformers_alone(source, task, tmp_path):
    seen = []
    teacher = finetune(source, task, QUICK, tmp_path, progress=lambda d, t, **m: seen.append((d, t, m)))
    assert teacher.metrics["accuracy"] > 0.8  # chance: a third
    assert teacher.metrics == pytest.approx(evaluate(teacher.model, task.select, CLASSES))
    assert not teacher.model.training
    assert {t for _, t, _ in seen} == {80}
    assert [d for d, _, m in seen if "loss" in m] == list(range(10, 90, 10))
    evaluations = {d: m["accuracy"] for d, _, m in seen if "accuracy" in m}
    assert list(evaluations) == [50, 80]
    assert teacher.metrics["accuracy"] == max(evaluations.values())  # the best, not the last
    plain = AutoModelForSequenceClassification.from_pretrained(teacher.folder).eval()
    assert plain.config.id2label == {0: "low", 1: "middle", 2: "high"}
    metrics = evaluate(plain, task.select, CLASSES)
    assert metrics == pytest.approx(teacher.metrics)


def test_second_call_reads_the_cache_and_trains_nothing(source, task, tmp_path):
    first = finetune(source, task, QUICK, tmp_path)
    calls = []
    again = finetune(source, task, QUICK, tmp_path, progress=lambda *a, **m: calls.append(a))
    assert calls == [(1, 1)]
    assert again.folder == first.folder
    assert again.metrics == first.metrics
    assert again.has_head
    assert_same_weights(weights_of(first), weights_of(again))
    assert sorted(p.name for p in tmp_path.iterdir()) == [first.folder.name]


def test_same_seed_same_weights_other_seed_others(source, task, tmp_path):
    short = FinetuneSettings(max_steps=6, batch_size=16)
    torch.manual_seed(1)
    first = weights_of(finetune(source, task, short, tmp_path / "1"))
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    assert_same_weights(first, weights_of(finetune(source, task, short, tmp_path / "2")))
    assert torch.equal(torch.rand(1), expected)  # the caller's generator is as it was
    other = weights_of(finetune(source, task, FinetuneSettings(max_steps=6, batch_size=16, seed=1), tmp_path / "3"))
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize("freeze", [False, True])
def test_steps_equal_plain_pytorch(source, task, tmp_path, freeze):
    """Against a loop written out: no dropout, so nothing random but the order of rows."""
    settings = FinetuneSettings(max_steps=3, lr=1e-2, batch_size=16, weight_decay=0.1, warmup_ratio=0.34, dropout=0.0)
    settings.freeze_embeddings = freeze
    tuned = finetune(source, task, settings, tmp_path)
    dropouts = [m for m in tuned.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert {m.p for m in dropouts} == {0.1}  # as the model had them
    model = Teacher.load(source, CLASSES).model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for table in (model.bert.embeddings.word_embeddings, model.bert.embeddings.position_embeddings):
        table.weight.requires_grad_(not freeze)
    optimizer = build_optimizer(model, 1e-2, 0.1)
    schedule = linear_schedule(optimizer, 1, 3)
    batches = task.train.batches(16, seed=0, epoch=0)
    for _ in range(3):
        batch = next(batches)
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids).logits
        F.cross_entropy(logits, batch.labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tuned.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)
    assert all(p.requires_grad for p in tuned.model.parameters())


def test_killed_run_continues_from_its_checkpoint_to_the_same_weights(source, task, tmp_path):
    settings = FinetuneSettings(epochs=3, lr=3e-3, batch_size=16, **FRESH)
    whole = finetune(source, task, settings, tmp_path / "whole", checkpoint_every=7)

    class Killed(Exception):
        pass

    def kill(done, total, **metrics):
        if done == 20 and "loss" in metrics:
            raise Killed

    with pytest.raises(Killed):
        finetune(source, task, settings, tmp_path / "cut", progress=kill, checkpoint_every=7)
    assert sorted(p.suffix for p in (tmp_path / "cut").iterdir()) == [".checkpoint", ".previous"]
    steps = []
    resumed = finetune(
        source, task, settings, tmp_path / "cut", progress=lambda d, *_, **m: steps.append(d), checkpoint_every=7
    )
    assert min(steps) == 20  # from step 14, the next report at 20
    assert_same_weights(weights_of(whole), weights_of(resumed))
    assert resumed.metrics == whole.metrics
    assert not list((tmp_path / "cut").glob("*.checkpoint*"))


@pytest.mark.parametrize("harm", ["weights", "config", "record", "missing", "key"])
def test_damaged_entry_is_noticed_and_made_again_with_one_line(source, task, tmp_path, caplog, harm):
    short = FinetuneSettings(max_steps=4, batch_size=16)
    first = finetune(source, task, short, tmp_path)
    folder, expected = first.folder, weights_of(first)
    if harm == "weights":
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-5] ^= 1
        (folder / "model.safetensors").write_bytes(data)
    elif harm == "config":
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    elif harm == "record":
        (folder / "teacher.json").write_text("{")
    elif harm == "missing":
        (folder / "tokenizer.json").unlink()
    else:
        record = json.loads((folder / "teacher.json").read_text())
        (folder / "teacher.json").write_text(json.dumps({**record, "key": "0"}))
    with caplog.at_level(logging.WARNING, logger="ffnas"):
        again = finetune(source, task, short, tmp_path)
    assert len(caplog.records) == 1
    assert f"{folder} is damaged (" in caplog.text
    assert_same_weights(expected, weights_of(again))
    caplog.clear()
    finetune(source, task, short, tmp_path)
    assert not caplog.records


def test_anything_that_changes_the_result_changes_the_key(source, task, tmp_path):
    short = FinetuneSettings(max_steps=2, batch_size=16)
    folders = {
        finetune(source, task, short, tmp_path).folder,
        finetune(source, task, FinetuneSettings(max_steps=2, batch_size=16, lr=1e-5), tmp_path).folder,
        finetune(source, task, short, tmp_path, precision="bf16").folder,
        finetune(source, make_task(source, CLASSES, seed=1), short, tmp_path).folder,
    }
    assert len(folders) == 4
    copied = tmp_path / "elsewhere"
    copied.mkdir()
    for file in source.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    assert finetune(copied, task, short, tmp_path).folder in folders  # content, not place


def test_regression_learns(source, tmp_path):
    task = make_task(source, NUMBERS)
    teacher = finetune(source, task, QUICK, tmp_path)
    assert teacher.metrics["pearson"] > 0.8
    assert teacher.model.config.problem_type == "regression"


def test_bf16_learns_and_keeps_float32_weights(source, task, tmp_path):
    teacher = finetune(source, task, QUICK, tmp_path, precision="bf16")
    assert teacher.metrics["accuracy"] > 0.8
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}


def test_no_steps_takes_the_head_as_it_is(source, task, tmp_path):
    nothing = FinetuneSettings(max_steps=0)
    with pytest.raises(UserError, match="max_steps is 0, but teacher"):
        finetune(source, task, nothing, tmp_path)
    tuned = finetune(source, task, QUICK, tmp_path)
    taken = finetune(tuned.folder, task, nothing, tmp_path)
    assert_same_weights(weights_of(tuned), weights_of(taken))
    assert taken.metrics == tuned.metrics


def test_what_goes_wrong_ends_in_one_line(source, task, tmp_path):
    with pytest.raises(UserError, match=r"choose a smaller finetune\.lr"):
        finetune(source, task, FinetuneSettings(lr=1e38, max_steps=20, batch_size=16), tmp_path / "d")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        finetune(source, task, QUICK, tmp_path / "file" / "cache")
    for change, words in [
        ({"lr": 0.0}, "finetune.lr is 0.0"),
        ({"batch_size": 0}, "finetune.batch_size"),
        ({"warmup_ratio": 2.0}, "between 0 and 1"),
        ({"max_steps": -1}, "finetune.max_steps"),
        ({"dropout": 1.0}, "finetune.dropout"),
        ({"epochs": 0.0}, "finetune.epochs"),
        ({"patience": 0}, "finetune.patience"),
    ]:
        with pytest.raises(UserError, match=words):
            FinetuneSettings(**change)


def test_task_loss_regression_does_not_broadcast():
    logits, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 3.0, 4.0])
    assert head_of("regression").gold_loss(logits, labels).item() == pytest.approx(1 / 3)
