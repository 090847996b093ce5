"""`ffnas predict`: submission files as GLUE expects them, SQuAD's prediction files, own tables, wrong input."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from published_toys import write_glue, write_race, write_squad, write_teacher

from engine.data.catalog import GLUE_TASKS, TASKS
from engine.data.published_files import find_split, read_split
from engine.teacher import Teacher
from search.cli import main
from search.commands.predict import submission_files


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
    printed = capsys.readouterr().out
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
    assert f"accuracy {(predicted == rows.labels).mean():.4f}" in capsys.readouterr().out
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
    assert f"exact_match {impossible / len(identities):.4f}" in capsys.readouterr().out
    run(*common, "--out", tmp_path / "q.json", "--null-threshold", "1000")
    assert "" not in json.loads((tmp_path / "q.json").read_text()).values()
    assert set(json.loads((tmp_path / "q_null_odds.json").read_text())) == set(identities)
    best = json.loads((tmp_path / "q_nbest.json").read_text())
    assert all(b[0]["text"] == json.loads((tmp_path / "q.json").read_text())[i] for i, b in best.items())


def test_own_table_keeps_its_order_and_needs_no_label(folder, tmp_path):
    texts = ["the cat was great", "a sad story , really very sad it is", "dog"]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "sentence"], *([i, t] for i, t in enumerate(texts))])
    run(folder / "models" / "glue/sst2", "--data", tmp_path / "rows.csv", "--out", tmp_path / "o.tsv")
    lines = (tmp_path / "o.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["index", "0", "1", "2"]


def test_choices_are_answered_by_letter(folder, tmp_path):
    run(folder / "models" / "race", "--task", "race", "--data", folder, "--out", tmp_path / "o.tsv")
    lines = (tmp_path / "o.tsv").read_text().splitlines()[1:]
    assert len(lines) == 24
    assert {line.split("\t")[1] for line in lines} <= set("ABCD")


WRONG = {
    "other head": (["models/glue/rte", "--task", "glue/mnli", "--data", "glue"], "no head"),
    "no data": (["models/glue/rte"], "--data"),
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
    assert main(["predict", *arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert words in message
    assert len(message.splitlines()) == 1
