"""What a converted MNLI model answers to `ffnas predict --task glue/mnli`: the right names, or a refusal."""

import json
import sys
from pathlib import Path

import pytest
import torch
from paper_student import PaperStudent, Sizes, initialise, released

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from published_toys import VOCABULARY, write_glue, write_teacher

from engine.published.presets import PRESETS
from search.cli import main

ARCHITECTURE = str(PRESETS["efficientbert"].architecture)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """MNLI's files and a tokenizer."""
    folder = tmp_path_factory.mktemp("labels")
    write_glue(folder / "glue", 24)
    write_teacher(folder / "tokenizer")
    return folder


def converted(folder, target, *options, classes=3, sure=None):
    """A published checkpoint that always answers with its output number `sure`, converted."""
    model = initialise(PaperStudent(Sizes(24, 24, len(VOCABULARY)), released(), classes=classes), wide=True)
    if sure is not None:
        model.classifier.bias.data[sure] = 100.0
    torch.save({"state_dict": model.state_dict()}, target.parent / "best.bin")
    common = ["--architecture", ARCHITECTURE, "--tokenizer", str(folder / "tokenizer"), "--overwrite"]
    assert main(["convert", str(target.parent / "best.bin"), str(target), *common, *options]) == 0
    return target


def predict(folder, model, out, task="glue/mnli"):
    data = ["--task", task, "--data", str(folder / "glue"), "--split", "dev", "--out", str(out), "--device", "cpu"]
    return main(["predict", str(model), *data])


@pytest.mark.parametrize(("output", "name"), list(enumerate(["contradiction", "entailment", "neutral"])))
def test_outputs_have_the_published_names(folder, tmp_path, output, name):
    model = converted(folder, tmp_path / "named", "--task", "mnli", sure=output)
    assert predict(folder, model, tmp_path / "o.tsv") == 0
    written = [line.split("\t")[1] for line in (tmp_path / "o.tsv").read_text().splitlines()[1:]]
    assert len(written) == 8
    assert set(written) == {name}


def test_nameless_classes_are_refused(folder, tmp_path, capsys):
    model = converted(folder, tmp_path / "bare")
    capsys.readouterr()
    assert predict(folder, model, tmp_path / "o.tsv") == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert "LABEL_0, LABEL_1, LABEL_2" in said
    assert "entailment, neutral, contradiction" in said
    assert not (tmp_path / "o.tsv").exists()


def test_numbered_classes_are_those_of_the_files(folder, tmp_path):
    """0 and 1 are what SST-2's own files call its classes."""
    for names, code in (("0,1", 0), ("1,0", 2), ("positive,negative", 0), ("good,bad", 2)):
        model = converted(folder, tmp_path / "m", "--labels", names, classes=2)
        assert set(json.loads((model / "config.json").read_text())["id2label"].values()) == set(names.split(","))
        assert predict(folder, model, tmp_path / "o.tsv", "glue/sst2") == code
