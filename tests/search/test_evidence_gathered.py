"""Evidence as a whole: gathered from toy models, timed, in the model card and at the top of the report."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from evidence_toys import logits, task
from report_runs import write_run
from test_report import Page, headings, quick  # noqa: F401  quick is a fixture
from transformers import BertConfig, BertForSequenceClassification

from engine.architecture.architecture import uniform
from engine.architecture.shape import ModelShape
from engine.data import EncodedDataset, EncodedTask
from engine.errors import UserError
from engine.evaluation.metrics import compute_metrics
from engine.export.evidence import evidence_section
from engine.student.supernet import build_student
from kernels.dispatch import preferred_backend
from kernels.language.expression import GELU_FFN
from search.evidence import Subject, compare, gather, measure_speed, parameters, read_predictions
from search.evidence.answers import Answers
from search.evidence.speed import bytes_on_disk
from search.report import build_report
from search.report.data import read_run
from search.report.evidence import intervals
from search.report.theme import style

TINY = {"layers": 2, "hidden": 24, "trials": 4, "teacher_layers": 4}


def student(spec):
    shape = ModelShape(24, 2, 48, vocab_size=50, max_positions=32, teacher_hidden_size=32)
    return build_student(shape, uniform(GELU_FFN, 1, 1, 2), 2, spec, seed=0)


def teacher():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes))


def encoded(labels):
    """Splits of one-token rows with these labels of dev."""

    def split(gold):
        count = len(gold)
        offsets = np.arange(count + 1, dtype=np.int64)
        return EncodedDataset(np.ones(count, np.int32), offsets, np.ones(count, np.int32), gold)

    few = split(np.zeros(2, dtype=np.int64))
    return lambda spec: EncodedTask(spec, few, few, few, split(labels), few)


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    """A run directory's evidence of a good model, a bad one and a teacher, with the answers."""
    data = task(counts=(160, 40, 50, 400))
    labels = data.dev.labels
    rows = {
        name: logits(labels, right, 2, seed)
        for seed, (name, right) in enumerate({"found": 0.97, "gelu": 0.3, "teacher": 0.99}.items())
    }
    path = tmp_path_factory.mktemp("evidence") / "run"
    (path / "model").mkdir(parents=True)
    (path / "model" / "model.safetensors").write_bytes(b"x" * 1234)
    model = student(data.spec)
    subjects = [
        Subject("found", "found", "found", rows["found"], model, path / "model"),
        Subject("gelu", "the GELU student", "baseline", rows["gelu"]),
        Subject("teacher", "its teacher", "teacher", rows["teacher"], teacher()),
    ]
    evidence = gather(path, data, encoded(labels)(data.spec), subjects, seed=3, length=16, seconds=0.2)
    return path, data, rows, evidence, subjects


def test_evidence_is_that_of_the_answers(gathered):
    path, data, rows, evidence, _ = gathered
    json.dumps(evidence, allow_nan=False)
    models = {m["name"]: m for m in evidence["models"]}
    assert list(models) == ["found", "gelu", "teacher", "bag_of_words", "majority"]
    for name, model in models.items():
        read, gold = read_predictions(path, name)
        assert np.array_equal(gold, data.dev.labels)
        assert model["metric"]["value"] == compute_metrics(data.spec, read, gold)["accuracy"]
        assert model["metric"]["low"] <= model["metric"]["value"] <= model["metric"]["high"]
        if name == "found":
            assert model["difference"] is None
            continue
        gap = compare(Answers("found", rows["found"]), Answers(name, read), gold, data.spec, seed=3)
        expected = {"value": gap.value, "low": gap.low, "high": gap.high, "words": gap.words}
        assert model["difference"] == expected
    assert models["found"]["bytes"] == 1234
    assert models["found"]["params"] == parameters(student(data.spec))
    assert evidence["verdict"].startswith("found: accuracy 0.9")
    assert "better than bag of words" in evidence["verdict"]
    assert "better than the GELU student" in evidence["verdict"]
    assert evidence["advice"] == []


def test_everything_but_times_is_the_same_again(gathered, tmp_path):
    path, data, _, evidence, subjects = gathered
    again = gather(tmp_path, data, encoded(data.dev.labels)(data.spec), subjects, seed=3, seconds=0)
    assert again["speed"] is None
    assert again["verdict"] == evidence["verdict"]
    for first, second in zip(evidence["models"], again["models"], strict=True):
        assert {**first, "speed": 0, "seconds": 0} == {**second, "speed": 0, "seconds": 0}
        name = f"predictions/{first['name']}.npz"
        assert (path / name).read_bytes() == (tmp_path / name).read_bytes()


def test_without_a_bag_of_words_its_absence_is_said(gathered, tmp_path):
    _, data, _, _, subjects = gathered
    alone = replace(data, train=data.train.take(np.flatnonzero(data.train.labels == 1)))
    evidence = gather(tmp_path, alone, encoded(data.dev.labels)(data.spec), subjects, seconds=0)
    assert evidence["missing"] == [{"name": "bag_of_words", "reason": "the rows of train are all of one class"}]
    assert "bag of words" not in evidence["verdict"]
    assert not (tmp_path / "predictions" / "bag_of_words.npz").exists()


def test_parameters_leave_out_what_only_distillation_needs(gathered):
    _, data, *_ = gathered
    model = student(data.spec)
    names = dict(model.named_parameters())
    fit = sum(p.numel() for n, p in names.items() if "fit_dense" in n)
    assert fit == 24 * 32 + 32
    counted = parameters(model)
    assert counted["total"] == sum(p.numel() for p in names.values()) - fit
    assert counted["encoder"] == sum(p.numel() for n, p in names.items() if ".encoder." in n)
    bert = teacher()
    assert parameters(bert) == {
        "encoder": sum(p.numel() for p in bert.bert.encoder.parameters()),
        "total": sum(p.numel() for p in bert.parameters()),
    }
    assert bytes_on_disk(None) is None


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_speed_is_of_every_model_and_side(gathered, seconds):
    _, data, *_ = gathered
    models = {"found": student(data.spec), "teacher": teacher()}
    timings = measure_speed(models, length=16, batches=(1, 3), seconds=seconds)
    sides = ["eager"] if preferred_backend("cpu") == "reference" else ["eager", "kernels"]
    expected = {("found", s, b, 16) for s in sides for b in (1, 3)} | {("teacher", "eager", b, 16) for b in (1, 3)}
    assert {(t.model, t.side, t.batch, t.length) for t in timings} == expected
    assert len(timings) == len(expected)
    assert all(0 < t.milliseconds < 10_000 for t in timings)


# report and model card


@pytest.fixture
def run(gathered, tmp_path):
    """A finished run with evidence, not reported yet."""
    path = write_run(tmp_path / "run", **TINY)
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, "evidence": gathered[3]}))
    return path


def change(path, edit):
    summary = json.loads((path / "summary.json").read_text())
    edit(summary["evidence"])
    (path / "summary.json").write_text(json.dumps(summary))


def test_the_report_begins_with_the_evidence(run, gathered, quick):  # noqa: F811
    evidence = gathered[3]
    html = build_report(run).read_text(encoding="utf-8")
    words = Page(html).words
    assert headings(run)[0] == "Is it worth shipping?"
    assert evidence["verdict"] in words
    for model in evidence["models"]:
        score, gap = model["metric"], model["difference"]
        assert f"{score['value']:.4f} ({score['low']:.4f} to {score['high']:.4f})" in words
        if gap is not None:
            assert f"{gap['value']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})" in words
    assert f"{evidence['models'][0]['params']['encoder']:,}" in words
    assert "1.23 kB" in words
    assert "ms, batch 32" in words
    assert (run / "plots" / "evidence.png").is_file()


def test_advice_and_names_are_escaped(run, quick):  # noqa: F811
    def edit(evidence):
        evidence["advice"] = ["<b>try</b> more"]
        evidence["models"][1].update(title="<script>x</script>", note='"><script>', speed=None, params=None)
        evidence["missing"] = [{"name": "x", "reason": "<i>none"}]
        evidence["speed"] = None

    change(run, edit)
    html = build_report(run).read_text(encoding="utf-8")
    assert not re.search(r"<script|<b>|<i>", html)
    assert "<b>try</b> more" in Page(html).words
    assert "Without x: <i>none." in Page(html).words


def test_the_intervals_are_drawn_where_they_are(run):
    data = read_run(run)
    with style():
        made = intervals(data.evidence)
        made.canvas.draw()
    left, right = made.axes
    drawn = [tuple(line.get_xdata()) for line in left.get_lines()]
    assert drawn == [(m.score.low, m.score.high) for m in data.evidence.models]
    drawn = [tuple(line.get_xdata()) for line in right.get_lines()[1:]]
    assert drawn == [(m.gap.low, m.gap.high) for m in data.evidence.models if m.gap is not None]
    assert intervals(None) is None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.pop("verdict"), "evidence.verdict: must be text"),
        (lambda e: e.update(models=3), "evidence.models: must be a list"),
        (lambda e: e.update(models=[3]), "evidence.models.0.title: must be text"),
        (lambda e: e["models"][1]["metric"].update(low=None), "evidence.models.1.metric.low: must be a number"),
        (lambda e: e["models"][1].update(difference=[]), "evidence.models.1.difference.value: must be a number"),
        (lambda e: e["models"][0].update(params={"encoder": "x"}), "evidence.models.0.params.encoder: must be"),
        (lambda e: e["models"][0].update(params=[1]), "evidence.models.0.params.encoder: must be"),
        (lambda e: e["models"][0].update(speed=[{"batch": 1}]), "evidence.models.0.speed.side: must be text"),
        (lambda e: e.update(missing=[3]), "evidence.missing.name: must be text"),
        (lambda e: e.update(speed=3), "evidence.speed: must be an object"),
        (lambda e: e.update(rows="many"), "evidence.rows: must be an integer"),
    ],
)
def test_damaged_evidence_is_named(run, edit, message):
    change(run, edit)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        build_report(run)
    assert str(run / "summary.json") in str(caught.value)


def test_the_model_card_says_how_the_model_compares(gathered):
    evidence = gathered[3]
    text = evidence_section(evidence)
    assert evidence["verdict"].replace("found:", "This model:", 1) in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(evidence["models"])
    assert len({line.count("|") for line in table}) == 1
    for line, model in zip(table[2:], evidence["models"], strict=True):
        assert f"{model['metric']['value']:.4f} ({model['metric']['low']:.4f}" in line
    assert "95% intervals of a bootstrap over the 400 rows of dev" in text
    worse = {**evidence, "advice": ["try\nmore"], "models": [{**evidence["models"][1], "title": "a|b"}]}
    assert "\n\n- try more\n\n" in evidence_section(worse)
    assert "a\\|b" in evidence_section(worse)
