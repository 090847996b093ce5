"""`ffnas predict`: submission files as GLUE expects them, SQuAD's prediction files, own tables, wrong input."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from published_toys import write_glue, write_race, write_squad, write_teacher

from engine.data.catalog import GLUE_TASKS, TASKS
from engine.data.published_files import find_split, read_split
from engine.data.rows import Rows
from engine.teacher import Teacher
from search.cli import main
from search.commands.predict_files import submission_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Published files, and models with random weights for every task."""
    folder = tmp_path_factory.mktemp("predict")
    write_glue(folder / "glue")
    write_squad(folder / "dev-v2.0.json", 6)
    write_race(folder / "RACE")
    write_teacher(folder / "teacher")
    for name in (*GLUE_TASKS, "squad_v2", "race"):
        Teacher.load(folder / "teacher", TASKS[name].spec, seed=3).save(folder / "models" / name)
    return folder


def run(*arguments):
    assert main(["predict", *map(str, arguments), "--device", "cpu"]) == 0


def logits_of(folder, name, rows):
    """One row at a time, through the tokenizer's and the model's own calls."""
    teacher = Teacher.load(folder / "models" / name, TASKS[name].spec)
    out = []
    for texts in zip(*rows.texts, strict=True):
        with torch.no_grad():
            out.append(teacher.model(**teacher.tokenizer(*texts, return_tensors="pt")).logits[0])
    return torch.stack(out)


def test_submission_folder_is_whole_and_right(folder, tmp_path, capsys):
    out = tmp_path / "submission"
    for name in GLUE_TASKS:
        run(folder / "models" / name, "--task", name, "--data", folder / "glue", "--glue-submission", out)
    assert sorted(p.name for p in out.iterdir()) == sorted(submission_files())
    names = ["CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI", "AX"]
    assert sorted(submission_files()) == sorted(f"{name}.tsv" for name in names)
    out_, printed = capsys.readouterr()
    assert out_ == ""
    assert "still missing" in printed
    assert "still missing" not in printed.splitlines()[-1]
    for path in out.iterdir():
        lines = path.read_text().splitlines()
        assert lines[0] == "index\tprediction"
        assert [line.split("\t")[0] for line in lines[1:]] == [
            str(i) for i in range(10 if path.name == "AX.tsv" else 15)
        ]
    allowed = {
        "CoLA.tsv": {"0", "1"},
        "WNLI.tsv": {"0", "1"},
        "RTE.tsv": {"entailment", "not_entailment"},
        "MNLI-mm.tsv": {"entailment", "neutral", "contradiction"},
        "AX.tsv": {"entailment", "neutral", "contradiction"},
    }
    for name, values in allowed.items():
        assert {line.split("\t")[1] for line in (out / name).read_text().splitlines()[1:]} <= values
    for name, split, file in (
        ("glue/mrpc", "test", "MRPC.tsv"),
        ("glue/mnli", "test_mismatched", "MNLI-mm.tsv"),
        ("glue/stsb", "test", "STS-B.tsv"),
    ):
        task = TASKS[name]
        rows = read_split(task, find_split(task, str(folder / "glue"), split), labelled=False)
        logits = logits_of(folder, name, rows)
        written = [line.split("\t")[1] for line in (out / file).read_text().splitlines()[1:]]
        if task.kind == "regression":
            expected = logits[:, 0].clamp(0, 5).tolist()
            assert [float(w) for w in written] == pytest.approx(expected, abs=6e-4)  # three decimals
        else:
            assert written == [(task.values or task.classes)[i] for i in logits.argmax(1).tolist()]


def test_labelled_split_is_scored(folder, tmp_path, capsys):
    run(
        *(folder / "models" / "glue/sst2", "--task", "glue/sst2", "--data", folder / "glue"),
        *("--split", "dev", "--out", tmp_path / "o.tsv"),
    )
    rows = read_split(TASKS["glue/sst2"], find_split(TASKS["glue/sst2"], str(folder / "glue"), "dev"))
    predicted = logits_of(folder, "glue/sst2", rows).argmax(1).numpy()
    told = capsys.readouterr().err
    right = predicted == rows.labels
    assert f"accuracy {right.mean():.4f} (95% interval " in told
    low, high = (float(part) for part in told.partition("interval ")[2].partition(")")[0].split(" to "))
    drawn = np.random.default_rng(5).choice(right, (20000, len(right))).mean(1)  # the same interval, by another hand
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1.5 / len(right))
    names = [line.split("\t")[1] for line in (tmp_path / "o.tsv").read_text().splitlines()[1:]]
    assert names == [["negative", "positive"][i] for i in predicted]


def test_squad_writes_official_files(folder, tmp_path, capsys):
    model = folder / "models" / "squad_v2"
    common = (model, "--task", "squad_v2", "--data", folder, "--split", "dev", "--max-length", 40)
    run(*common, "--out", tmp_path / "p.json", "--null-threshold", "-1000")
    answers = json.loads((tmp_path / "p.json").read_text())
    raw = json.loads((folder / "dev-v2.0.json").read_text())
    identities = [q["id"] for a in raw["data"] for p in a["paragraphs"] for q in p["qas"]]
    assert list(answers) == identities
    assert set(answers.values()) == {""}  # everything is "no answer" at that threshold
    impossible = sum(q["is_impossible"] for a in raw["data"] for p in a["paragraphs"] for q in p["qas"])
    assert f"exact_match {impossible / len(identities):.4f}" in capsys.readouterr().err
    run(*common, "--out", tmp_path / "q.json", "--null-threshold", "1000")
    assert "" not in json.loads((tmp_path / "q.json").read_text()).values()
    assert set(json.loads((tmp_path / "q_null_odds.json").read_text())) == set(identities)
    best = json.loads((tmp_path / "q_nbest.json").read_text())
    assert all(b[0]["text"] == json.loads((tmp_path / "q.json").read_text())[i] for i, b in best.items())


TEXTS = ["the cat was great", "a sad story , really very sad it is", "dog"]


def write_rows(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def piped(folder):
    """What transformers.pipeline answers: per text a mapping of label to probability."""
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(folder / "models" / "glue/sst2"), device="cpu", top_k=None)
    return [{answer["label"]: answer["score"] for answer in row} for row in classify(TEXTS)]


def test_a_table_is_answered_as_a_pipeline_does(folder, tmp_path, capsys, piped):
    table = write_rows(tmp_path / "rows.csv", ["Guid", "sentence"], [[f"r{i}", t] for i, t in enumerate(TEXTS)])
    model = folder / "models" / "glue/sst2"
    run(model, "--data", table, "--out", tmp_path / "o.csv", "--probabilities")
    with open(tmp_path / "o.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["Guid", "prediction", "probability", "probability_negative", "probability_positive"]
    assert [row["Guid"] for row in rows] == ["r0", "r1", "r2"]
    for row, wanted in zip(rows, piped, strict=True):
        assert row["prediction"] == max(wanted, key=wanted.get)
        assert float(row["probability"]) == pytest.approx(max(wanted.values()), abs=1e-5)  # five decimals of fp32
        assert {k: float(row[f"probability_{k}"]) for k in wanted} == pytest.approx(wanted, abs=1e-5)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"3 predictions: {tmp_path / 'o.csv'}\n"
    run(model, "--data", table, "--out", tmp_path / "o.jsonl", "--probabilities")
    for line, wanted in zip((tmp_path / "o.jsonl").read_text().splitlines(), piped, strict=True):
        record = json.loads(line)
        assert record["probabilities"] == pytest.approx(wanted, abs=1e-5)
        assert record["probability"] == max(record["probabilities"].values())


def test_texts_and_lines_go_to_standard_output(folder, tmp_path, capsys, monkeypatch, piped):
    monkeypatch.chdir(tmp_path)
    expected = [(max(wanted, key=wanted.get), max(wanted.values())) for wanted in piped]

    def answered():
        out, err = capsys.readouterr()
        assert err == ""
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [row["prediction"] for row in rows] == [label for label, _ in expected]
        assert [float(row["probability"]) for row in rows] == pytest.approx([p for _, p in expected], abs=1e-5)
        return [row["row"] for row in rows]

    run(folder / "models" / "glue/sst2", *TEXTS)
    assert answered() == ["1", "2", "3"]
    lines = f"{TEXTS[0]}\n\n{TEXTS[1]}\r\n{TEXTS[2]}\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    run(folder / "models" / "glue/sst2")
    assert answered() == ["1", "3", "4"]  # lines of the input
    assert list(tmp_path.iterdir()) == []  # nothing written unasked


@pytest.mark.parametrize("labels", [["positive", "Negative", ""], ["1", "0", "-1"]], ids=["names", "numbers"])
def test_labels_are_compared_and_may_be_missing(folder, tmp_path, capsys, piped, labels):
    table = write_rows(tmp_path / "a.csv", ["sentence", "label"], list(zip(TEXTS, labels, strict=True)))
    run(folder / "models" / "glue/sst2", "--data", table)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    right = [max(piped[0], key=piped[0].get) == "positive", max(piped[1], key=piped[1].get) == "negative"]
    assert f"accuracy {sum(right) / 2:.4f} (95% interval" in err
    assert err.endswith("; 2 rows with a label\n")
    assert ("labels 0 to 1 are taken for negative, positive" in err) == (labels[0] == "1")


def test_a_column_that_only_looks_like_labels_is_left_alone(folder, tmp_path, capsys):
    table = write_rows(tmp_path / "a.csv", ["sentence", "rating"], [(text, "five stars") for text in TEXTS])
    run(folder / "models" / "glue/sst2", "--data", table)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert "not scored, column 'rating'" in err
    assert "data row 1: label 'five stars' is none of the model's" in err
    arguments = [str(folder / "models" / "glue/sst2"), "--data", str(table), "--label-column", "rating"]
    assert main(["predict", *arguments]) == 2  # the user says it is one
    assert "'five stars' is none of the model's" in capsys.readouterr().err


def test_a_regression_answers_numbers(folder, tmp_path, capsys):
    pairs = [(TEXTS[0], TEXTS[1], "1.5"), (TEXTS[1], TEXTS[2], "4.0"), (TEXTS[2], TEXTS[2], "5.0")]
    table = write_rows(tmp_path / "a.csv", ["sentence1", "sentence2", "score"], pairs)
    run(folder / "models" / "glue/stsb", "--data", table)
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["row", "prediction"]
    found = [float(row["prediction"]) for row in rows]
    expected = logits_of(folder, "glue/stsb", Rows(tuple(map(list, list(zip(*pairs, strict=True))[:2]))))[:, 0]
    assert found == pytest.approx(expected.tolist(), abs=2e-6)  # six decimals
    wanted = np.corrcoef(found, [1.5, 4.0, 5.0])[0, 1]
    assert f"pearson {wanted:.4f}" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "missing.csv"], "missing.csv: no such file"),
        (["--data", "a.md"], "cannot read a .md"),
        (["--data", "a.csv", "--text-columns", "texts"], "did you mean 'text'?"),
        (["--data", "a.csv", "--id-column", "key"], "--id-column 'key'"),
        (["--data", "a.csv", "--out", "b.xlsx"], ".csv or .tsv or .jsonl"),
        (["--data", "a.csv", "--data.encoding", "ascii"], "--data.encoding"),
        (["--data", "a.csv", "--label-column", "label"], "label 'maybe' is none of the model's ('no', 'yes')"),
        (["a text", "--data", "a.csv"], "beside --data"),
        (["a text"], "architectures"),
    ],
)
def test_mistakes_are_told_before_frameworks_load(tmp_path, arguments, words):
    (tmp_path / "a.md").write_text("text\n")
    (tmp_path / "a.csv").write_text("text,label\ncaf\u00e9,maybe\n", encoding="utf-8")
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"")
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}}
    if words == "architectures":
        config, words = {}, "holds a model without a head"
    (model / "config.json").write_text(json.dumps(config))
    code = (
        "import sys; from search.cli import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", "model", *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    message, loaded = done.stderr.splitlines()
    assert words in message
    assert loaded == "2 []"
    assert done.stdout == ""


def test_choices_are_answered_by_letter(folder, tmp_path):
    run(folder / "models" / "race", "--task", "race", "--data", folder, "--out", tmp_path / "o.tsv")
    lines = (tmp_path / "o.tsv").read_text().splitlines()[1:]
    assert len(lines) == 24
    assert {line.split("\t")[1] for line in lines} <= set("ABCD")


WRONG = {
    "other head": (["models/glue/rte", "--task", "glue/mnli", "--data", "glue"], "no head"),
    "no data": (["models/glue/rte"], "--data"),
    "id column of a published task": (["models/glue/rte", "--task", "glue/rte", "--id-column", "a"], "--id-column"),
    "submission of own rows": (["models/glue/rte", "--data", "x.csv", "--glue-submission", "s"], "--task"),
    "split": (["models/glue/rte", "--task", "glue/rte", "--data", "glue", "--split", "fold"], "fold"),
    "no file": (["models/glue/rte", "--task", "glue/rte", "--data", "RACE"], "test.tsv"),
    "option": (["models/glue/rte", "--colour"], "--colour"),
    "span without task": (["models/squad_v2", "--data", "glue/RTE/dev.tsv"], "--task"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line(folder, capsys, monkeypatch, case):
    arguments, words = WRONG[case]
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(["predict", *arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert words in message
    assert len(message.splitlines()) == 1
