"""Taggers, end to end with a tiny random BERT: search, evaluation, report, card, predictions, hand-over."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
from fault_runs import FILLER, WORDS, options
from test_inherit import SMALL

import engine  # noqa: F401  registers the model type
from engine.data.read_tags import read_sentences
from engine.evaluation.entities import counts_of, metrics_of, types_of
from search.evidence import read_predictions


def write_tags(path, count, seed):
    """Films and verdicts: a verdict of two words is one entity."""
    generator, lines = random.Random(seed), []
    for _ in range(count):
        for _ in range(generator.randint(1, 3)):
            lines += [f"{word}\tO" for word in generator.sample(FILLER, generator.randint(1, 3))]
            kind = generator.choice(sorted(WORDS))
            words = generator.sample(WORDS[kind], generator.randint(1, 2))
            lines += [f"{word}\t{'BI'[k]}-{kind}" for k, word in enumerate(words)]
        lines.append("")
    path.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def files(folder):
    write_tags(folder / "train.conll", 240, 1)
    write_tags(folder / "dev.conll", 40, 2)
    return folder


def argv(files, runs, name, **more):
    """Options of a search of seconds, long enough for the teacher to learn a little."""
    own = {"data.train": files / "train.conll", "data.dev": files / "dev.conll", "data.max_length": 24}
    values = {**SMALL, "finetune.max_steps": 60, "finetune.lr": 1e-2, **own, **more}
    return [
        *options(files, runs, name),
        *(word for k, v in values.items() if v is not None for word in (f"--{k}", str(v))),
    ]


@pytest.fixture(scope="module", params=["tokens", "tokens_crf"])
def run(request, nursery, files):
    kind = request.param
    more = {"data.kind": kind} if kind == "tokens_crf" else {}
    ended = nursery.run(argv(files, files / "runs", kind, **more), files / "cache", plots=True)
    assert ended.code == 0, ended.err
    return files / "runs" / kind, kind, ended.out


def test_a_search_finds_a_tagger_and_tells_its_entities(run, files):
    path, kind, _out = run
    summary = json.loads((path / "summary.json").read_text())
    assert summary["task"]["kind"] == kind
    rows, labels = read_predictions(path, "found")
    assert labels is None
    types = types_of(summary["task"]["label_names"])
    assert types == ("bad", "good")
    assert rows.shape == (40, 2 + 3 * len(types))
    golds = [sentence.tags for sentence in read_sentences(str(files / "dev.conll"))]
    assert rows[:, 1].tolist() == [len(tags) for tags in golds]
    gold = sum(counts_of(tags, tags, types, entities=True) for tags in golds)
    assert rows[:, [4, 7]].sum(0).tolist() == gold[[4, 7]].tolist()
    report = (path / "report.html").read_text()
    assert "good" in report
    assert (path / "best" / "model" / "README.md").exists()


def test_the_found_model_predicts_what_was_measured(run, files, tmp_path, capsys):
    from search.commands.predict import command

    path, _kind, _ = run
    model = str(path / "best" / "model")
    out = tmp_path / "answers.conll"
    command([model, "--data", str(files / "dev.conll"), "--out", str(out)])
    golds = [sentence.tags for sentence in read_sentences(str(files / "dev.conll"))]
    answered = read_sentences(str(out))
    assert [s.words for s in answered] == [s.words for s in read_sentences(str(files / "dev.conll"))]
    types = ("bad", "good")
    counts = sum(counts_of(a.tags, g, types, entities=True) for a, g in zip(answered, golds, strict=True))
    summary = json.loads((path / "summary.json").read_text())
    assert float(metrics_of(counts)["f1"]) == pytest.approx(summary["best"]["metrics"]["dev"]["f1"], abs=1e-9)
    assert f"f1 {summary['best']['metrics']['dev']['f1']:.4f}" in capsys.readouterr().err
    command([model, "the film was great", "sad", "--out", str(tmp_path / "answers.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [["the", "film", "was", "great"], ["sad"]]
    assert all(len(line["tags"]) == len(line["tokens"]) for line in lines)


def test_the_found_model_loads_with_and_without_ffnas(run):
    from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

    from engine.handover import load_plain

    path, kind, _ = run
    model = path / "best" / "model"
    own, tokenizer = AutoModelForTokenClassification.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    plain = load_plain(model)
    inputs = tokenizer(["the film was great", "sad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected, found = own(**inputs), plain(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    crf = kind == "tokens_crf"
    assert (expected.answer is not None) == (found.answer is not None) == crf
    words = inputs["attention_mask"].bool() & (inputs["input_ids"] > 4)
    if crf:
        torch.testing.assert_close(found.answer, expected.answer, rtol=1e-4, atol=1e-5)
        assert own.transitions.abs().sum() > 0
    assert plain.decode(found.logits, words) == own.decode(expected.logits, words)
    answers = pipeline("token-classification", model=str(model), aggregation_strategy="simple")("the film was great")
    assert all(answer["entity_group"] in ("bad", "good") for answer in answers)


def test_exports_answer_as_the_model_does(run, tmp_path, capsys):
    """ONNX of both heads; the runtime has no chains, and says so before a file is written."""
    import numpy as np
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from engine.errors import UserError
    from kernels.runtime import Session
    from search.commands.export import command

    path, kind, _ = run
    model, native = path / "best" / "model", tmp_path / "native"
    if kind == "tokens_crf":
        with pytest.raises(UserError, match="transitions of a CRF"):
            command([str(model), "--native", str(native)])
        assert not native.exists()
    else:
        command([str(model), "--native", str(native)])
        inputs = AutoTokenizer.from_pretrained(model)(["the film was great"], return_tensors="pt")
        with torch.no_grad():
            expected = AutoModelForTokenClassification.from_pretrained(model).eval()(**inputs).logits
        found = Session(native, threads=1).run(inputs["input_ids"].numpy())
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
        assert all(tag["label"] in ("O", "B-bad", "B-good", "I-bad", "I-good") for tag in Session(native).tag("sad")[0])
    pytest.importorskip("onnx", reason="ONNX export needs onnx")
    command([str(model), "--onnx"])
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("onnx "))
    assert float(told.split()[-1]) < 1e-3


def test_the_papers_strategy_serves_taggers(nursery, files):
    more = {"strategy": "paper", "data.kind": "tokens_crf", "budget.encoder": None}
    ended = nursery.run(argv(files, files / "runs", "paper", **more), files / "cache")
    assert ended.code == 0, ended.err
    summary = json.loads((files / "runs" / "paper" / "summary.json").read_text())
    assert 0 <= summary["best"]["metrics"]["dev"]["f1"] <= 1
