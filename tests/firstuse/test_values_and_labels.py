"""Values that are no text, labels as they are written, rows without a label: never turned into something else."""

import datetime
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from newcomer import labelled, texts, write_jsonl, write_table

from engine.data import DataConfig, load_task
from engine.data.catalog import published
from engine.data.published_files import read_split
from engine.errors import UserError

HEADER = ("text", "label")


def names_of(path, **options):
    return load_task(DataConfig(train=str(path), **options)).spec.label_names


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# -- what is no text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["a", "b"], "text column 'text' holds a list, not text: join its parts"),
        ({"en": "a"}, "text column 'text' holds an object with 'en', not text: write one of its fields as a column"),
    ],
    ids=["list", "object"],
)
def test_a_text_that_is_none(tmp_path, refused, value, words):
    rows = [{"text": text, "label": label} for text, label in labelled(24, ("no", "yes"))]
    rows[6]["text"] = value
    assert f"data row 7: {words}" in refused(write_jsonl(tmp_path / "a.jsonl", rows))


def test_bytes_of_a_parquet_file(tmp_path, refused):
    path = parquet(tmp_path / "a.parquet", text=[t.encode() for t in texts(24)], label=["no", "yes"] * 12)
    assert "data row 1: text column 'text' holds bytes, not text: write it as text first" in refused(path)
    path = parquet(tmp_path / "b.parquet", text=texts(24), label=[b"no", b"yes"] * 12)
    assert "data row 1: label column 'label' holds bytes, not text" in refused(path)


def test_dates_of_a_parquet_file(tmp_path, refused):
    days = [datetime.datetime(2021, 1, 1 + i % 2) for i in range(24)]
    path = parquet(tmp_path / "a.parquet", text=texts(24), label=days)
    assert "label column 'label' holds a datetime, not text: write it as text" in refused(path)


@pytest.mark.parametrize("label", [[0, 1], ["joy"], []], ids=["numbers", "words", "none"])
def test_several_labels_per_text_are_refused_clearly(tmp_path, refused, label):
    rows = [{"text": text, "labels": label} for text in texts(24)]
    message = refused(write_jsonl(tmp_path / "a.jsonl", rows))
    assert "data row 1: label column 'labels' holds a list: a multi-label task, which is not served" in message
    assert "--data.label_column" in message


def test_several_labels_written_as_text_are_refused_too(tmp_path, refused):
    path = write_table(tmp_path / "a.csv", HEADER, labelled(24, ("['joy']", "['joy', 'fear']")))
    assert "holds \"['joy']\", a list: a multi-label task" in refused(path)


def test_booleans_are_the_words_of_the_file(tmp_path):
    rows = [{"text": text, "label": label} for text, label in labelled(24, (True, False))]
    assert names_of(write_jsonl(tmp_path / "a.jsonl", rows)) == ("false", "true")


def test_names_of_class_ids_in_a_parquet_file_are_kept(tmp_path):
    features = {"label": {"names": ["ham", "spam"], "_type": "ClassLabel"}, "text": {"_type": "Value"}}
    table = pyarrow.table({"text": texts(24), "label": [1, 0] * 12})
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pyarrow.parquet.write_table(table.replace_schema_metadata(about), tmp_path / "a.parquet")
    assert names_of(tmp_path / "a.parquet") == ("ham", "spam")


# -- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("007", "7", "010"), ("007", "7", "010")),
        (("0111", "1"), ("1", "0111")),
        (("1.0", "0.0"), ("0", "1")),
        (("+", "-"), ("+", "-")),
        (("-2", "-1", "0", "1"), ("-2", "-1", "0", "1")),
        (("1e3", "2"), ("2", "1e3")),
        (("NA", "EU"), ("EU", "NA")),
        (("1_000", "1000"), ("1000", "1_000")),
    ],
    ids=str,
)
def test_labels_are_as_written(tmp_path, labels, names):
    assert names_of(write_table(tmp_path / "a.csv", HEADER, labelled(36, labels)), kind="classification") == names


def test_whole_numbers_of_train_and_dev_agree_in_any_type(tmp_path):
    train = write_table(tmp_path / "a.csv", HEADER, labelled(36, ("0", "1")))
    dev = write_jsonl(tmp_path / "dev.jsonl", [{"text": f"dev {i}", "label": float(i % 2)} for i in range(6)])
    assert load_task(DataConfig(train=train, dev=dev)).dev.labels.tolist() == [0, 1] * 3


def test_one_label_missing_among_thousands(tmp_path, refused, shown):
    rows = labelled(5000, ("no", "yes"))
    rows[17] = (rows[17][0], "")
    path = write_table(tmp_path / "a.csv", HEADER, rows)
    message = refused(path)
    assert "data row 18: the label is '', that is missing (1 of 5,000 rows)" in message
    assert "--data.drop_unlabelled true" in message
    assert "1 rows without a label left out of" in shown(path, "--data.drop_unlabelled", "true")


@pytest.mark.parametrize("mark", ["-", "-1"])
def test_withheld_labels_are_asked_about_and_left_out(tmp_path, refused, mark):
    classes = ("entailment", "neutral", "contradiction") if mark == "-" else ("0", "1", "2")
    path = write_table(tmp_path / "a.csv", HEADER, [*labelled(36, classes), ("no gold", mark), ("none either", mark)])
    assert f"data row 37: the label is '{mark}', that is missing (2 of 38 rows)" in refused(path)
    data = load_task(DataConfig(train=path, drop_unlabelled=True))
    assert data.spec.label_names == tuple(sorted(classes))
    assert sum(len(getattr(data, name)) for name in ("train", "score", "select", "dev")) == 36


def test_minus_one_is_a_class_where_the_user_names_it(tmp_path, shown):
    path = write_table(tmp_path / "a.csv", HEADER, labelled(36, ("-1", "0", "1")))
    assert "-1: 12 (33 %), 0: 12 (33 %), 1: 12 (33 %)" in shown(path, "--data.label_names", "-1,0,1")


def test_minus_one_is_a_score_among_negative_scores(tmp_path):
    path = write_table(tmp_path / "a.csv", ("text", "score"), labelled(36, ("-1.0", "-0.5", "0.25")))
    data = load_task(DataConfig(train=path))
    assert data.spec.kind == "regression"
    assert {-1.0, -0.5, 0.25} == set(np.concatenate([data.train.labels, data.dev.labels]).tolist())


# -- SQuAD --------------------------------------------------------------------------------------------------------


def squad(path, item=None, paragraph=None):
    question = {"id": "q1", "question": "who?", "answers": [{"text": "Ann", "answer_start": 0}], **(item or {})}
    content = {"context": "Ann sat.", "qas": [question], **(paragraph or {})}
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": [content]}]}))
    return read_split(published("squad_v2"), str(path))


@pytest.mark.parametrize(
    ("flag", "answers"), [("false", 1), ("False", 1), (False, 1), ("true", 0), (True, 0), (None, 1)]
)
def test_a_flag_of_squad_is_what_it_says(tmp_path, flag, answers):
    assert len(squad(tmp_path / "a.json", {"is_impossible": flag}).golds[0].texts) == answers


@pytest.mark.parametrize(
    ("item", "paragraph", "words"),
    [
        ({"is_impossible": "maybe"}, {}, "question q1: 'is_impossible' is \"maybe\", neither true nor false"),
        ({"answers": [{"text": "Ann", "answer_start": "x"}]}, {}, "'answer_start' is \"x\", no position"),
        ({"answers": [{"text": "Ann", "answer_start": 0.5}]}, {}, "'answer_start' is 0.5, no position"),
        ({"answers": [{"text": "Ann", "answer_start": None}]}, {}, "'answer_start' is null, no position"),
        ({"answers": [{"text": "Ann", "answer_start": -3}]}, {}, "'answer_start' is -3, no position"),
        ({"answers": [{"text": "Ann", "answer_start": 2}]}, {}, "does not stand at character 2"),
        ({"question": None}, {}, "question q1: 'question' is null, not text"),
        ({}, {"context": None}, "question q1: 'context' is null, not text"),
        ({}, {"context": ["Ann sat."]}, "'context' is [\"Ann sat.\"], not text"),
        ({}, {"qas": 5}, "not in SQuAD's format"),
    ],
    ids=str,
)
def test_a_wrong_value_in_squad_is_one_line(tmp_path, item, paragraph, words):
    with pytest.raises(UserError) as caught:
        squad(tmp_path / "a.json", item, paragraph)
    assert words in str(caught.value)
    assert str(tmp_path / "a.json") in str(caught.value)


def test_answer_starts_written_as_text_or_with_a_point_are_positions(tmp_path):
    for start in ("0", 0.0, "0.0"):
        assert squad(tmp_path / "a.json", {"answers": [{"text": "Ann", "answer_start": start}]}).golds[0].starts == (0,)


def test_a_context_that_is_missing_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": [{"qas": [{"id": "q", "question": "w"}]}]}]}))
    with pytest.raises(UserError, match="no 'context' after 0 questions"):
        read_split(published("squad_v2"), str(tmp_path / "a.json"))
