"""Finding columns, naming classes, and choosing kind and metric."""

import numpy as np
import pytest

from engine.data import TaskSpec
from engine.data.columns import find_label_column, find_text_columns, glue_task
from engine.data.labels import class_ids, class_names, infer_kind, label_keys, targets
from engine.data.task import head_of
from engine.errors import UserError


@pytest.mark.parametrize(
    ("columns", "texts", "label"),
    [
        (["sentence", "label"], ("sentence",), "label"),
        (["id", "Text", "Sentiment"], ("Text",), "Sentiment"),
        (["sentence1", "sentence2", "score"], ("sentence1", "sentence2"), "score"),
        (["premise", "hypothesis", "label", "idx"], ("premise", "hypothesis"), "label"),
        (["question", "sentence", "label"], ("question", "sentence"), "label"),
        (["question1", "question2", "is_duplicate"], ("question1", "question2"), "is_duplicate"),
        (["text_b", "text_a", "target"], ("text_a", "text_b"), "target"),
        (["review", "class"], ("review",), "class"),
        ([" text ", " label"], (" text ",), " label"),
    ],
    ids=str,
)
def test_columns_are_found_by_name(columns, texts, label):
    assert find_text_columns(columns, None, "f") == texts
    assert find_label_column(columns, None, texts, "f") == label


def test_given_columns_win_and_are_checked():
    columns = ["sentence", "label", "other"]
    assert find_text_columns(columns, ["other"], "f") == ("other",)
    assert find_label_column(columns, "other", ("sentence",), "f") == "other"
    with pytest.raises(
        UserError, match=r"data.text_columns 'sentense': f has no such column.*did you mean 'sentence'\?"
    ):
        find_text_columns(columns, ["sentense"], "f")
    with pytest.raises(UserError, match=r"data.label_column 'zzz'.*'sentence', 'label', 'other': choose one"):
        find_label_column(columns, "zzz", ("sentence",), "f")
    with pytest.raises(UserError, match="is a text column too"):
        find_label_column(columns, "sentence", ("sentence",), "f")


def test_unknown_names_list_the_columns():
    with pytest.raises(UserError, match=r"f: no text column among 'foo', 'label': name it with --data.text_columns"):
        find_text_columns(["foo", "label"], None, "f")
    with pytest.raises(UserError, match=r"no label column among 'text', 'foo'"):
        find_label_column(["text", "foo"], None, ("text",), "f")


@pytest.mark.parametrize(
    ("source", "task"),
    [
        ("../shared/data/cola/train.csv", "cola"),
        ("glue/SST-2/train.tsv", "sst2"),
        ("data/sts-b/train.tsv", "stsb"),
        ("mrpc_train.csv", "mrpc"),
        ("nyu-mll/glue:qqp@train[:10%]", "qqp"),
        ("nyu-mll/glue:mnli@validation_matched", "mnli"),
        ("/home/cola/project/data/train.csv", None),
        ("chocolate/train.csv", None),
        (None, None),
    ],
    ids=str,
)
def test_glue_tasks_are_known_by_path_or_configuration(source, task):
    assert glue_task(source) == task


@pytest.mark.parametrize(
    ("kind", "labels", "pair", "task", "metric"),
    [
        ("classification", 2, False, "cola", "mcc"),
        ("classification", 3, False, "cola", "accuracy"),
        ("classification", 2, True, "mrpc", "f1"),
        ("classification", 2, True, "rte", "accuracy"),
        ("classification", 2, True, None, "f1"),
        ("classification", 3, True, None, "accuracy"),
        ("classification", 2, False, None, "accuracy"),
        ("classification", 2, False, "stsb", "accuracy"),
        ("regression", 1, True, None, "pearson"),
        ("regression", 1, True, "cola", "pearson"),
    ],
)
def test_metric_follows_the_task_then_the_kind(kind, labels, pair, task, metric):
    assert head_of(kind).choose_metric(labels, pair, task)[0] == metric


# -- labels -------------------------------------------------------------------------------------------------------


def names_and_ids(values, given=None):
    keys = label_keys(values, "f", given or ())
    names = class_names(keys, "label", "f", given)
    return names, class_ids(keys, names, "f").tolist()


@pytest.mark.parametrize("values", [[0, 1, 1], ["0", "1", "1"], [0.0, 1.0, 1.0], ["0.000", "1.0", " 1 "]], ids=str)
def test_one_label_set_whatever_its_type(values):
    assert names_and_ids(values) == (("0", "1"), [0, 1, 1])


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["pos", "neg", "neutral"], ("neg", "neutral", "pos")),
        ([10, 9, 1], ("1", "9", "10")),
        (["equivalent", "not_equivalent"], ("not_equivalent", "equivalent")),
        (["Duplicate", "not duplicate"], ("not duplicate", "Duplicate")),
        (["entailment", "not_entailment"], ("not_entailment", "entailment")),
        (["no", "yes"], ("no", "yes")),
        (["none", "favor", "against"], ("against", "favor", "none")),
        ([True, False], ("false", "true")),
        (["007", "7", "010"], ("007", "7", "010")),
        (["0111", "1"], ("1", "0111")),
        (["7.0", "7", "1"], ("1", "7")),
        (["-", "+"], ("+", "-")),
        (["+1", "-2"], ("-2", "+1")),
        ([-1, -2, 1], ("-2", "-1", "1")),
        ([-2, 0, 2], ("-2", "0", "2")),
    ],
    ids=str,
)
def test_class_order(values, names):
    assert names_and_ids(values)[0] == names


def test_given_names_decide_the_order_and_may_name_minus_one():
    assert names_and_ids([1, -1, 0], ["-1", "0", "1"]) == (("-1", "0", "1"), [2, 0, 1])
    assert names_and_ids(["b", "b"], ["b", "a"]) == (("b", "a"), [0, 0])
    with pytest.raises(UserError, match=r"label 'c' is not in data.label_names \['a', 'b'\]"):
        names_and_ids(["a", "c"], ["a", "b"])
    with pytest.raises(UserError, match="two or more different names"):
        names_and_ids(["a"], ["a", "a"])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"),
        (float("nan"), "nan"),
        ("", "''"),
        (" ", "' '"),
        ("NaN", "'NaN'"),
        (-1, "-1"),
        ("-1.0", "'-1.0'"),
    ],
    ids=str,
)
def test_missing_labels_name_file_row_value_and_remedy(value, shown):
    with pytest.raises(
        UserError, match=rf"f.csv, data row 3: the label is {shown}, that is missing \(1 of 4 rows\): fill"
    ):
        label_keys([0, 1, value, 0], "f.csv")
    with pytest.raises(UserError, match="data row 2"):
        label_keys(["a", value], "f.csv")


def test_absent_words_are_classes_among_words_and_missing_among_numbers():
    assert names_and_ids(["none", "some"])[0] == ("none", "some")
    with pytest.raises(UserError, match="the label is 'None'"):
        label_keys(["1", "None"], "f")


def test_wrong_label_columns_are_noticed():
    with pytest.raises(UserError, match="every label in column 'label' is 'a': classification needs two classes"):
        names_and_ids(["a", "a"])
    with pytest.raises(UserError, match=r"50 different labels in 50 rows: choose another with --data.label_column"):
        names_and_ids([f"text {i}" for i in range(50)])
    with pytest.raises(UserError, match=r"f, data row 2: label 'c' does not occur in the training data.*'a', 'b'"):
        class_ids(["a", "c"], ("a", "b"), "f")
    with pytest.raises(UserError, match=r"f, data row 2: 'score' is 'high', not a finite number"):
        targets(["1.5", "high"], "score", "f")
    with pytest.raises(UserError, match="'inf', not a finite number"):
        targets(["inf"], "score", "f")
    assert targets(["1.5", "-2"], "score", "f").tolist() == [1.5, -2.0]
    assert targets(["1"], "s", "f").dtype == np.float32


@pytest.mark.parametrize(
    ("values", "column", "given", "kind"),
    [
        ([0.5, 1.0], "label", "auto", "regression"),
        (["5.000", "3.800"], "score", "auto", "regression"),
        ([1.0, 2.0], "score", "auto", "classification"),
        (list(range(30)), "score", "auto", "regression"),
        (list(range(30)), "label", "auto", "classification"),
        (["a", "1.5"], "score", "auto", "classification"),
        ([0.5, 1.0], "label", "classification", "classification"),
        ([1, 2], "label", "regression", "regression"),
    ],
    ids=str,
)
def test_kind(values, column, given, kind):
    assert infer_kind(label_keys(values, "f"), column, given) == kind


def test_task_spec_checks_itself_and_survives_a_round_trip():
    spec = TaskSpec("t", "classification", ("a", "b"), "label", ("no", "yes"), "f1")
    assert TaskSpec.from_dict(spec.to_dict()) == spec
    assert (spec.num_labels, spec.is_pair, spec.head.kind) == (2, True, "classification")
    assert TaskSpec("t", "regression", ("a",), "y", metric="spearman").num_labels == 1
    with pytest.raises(UserError, match=r"metric 'pearson' does not fit a classification task: choose one of accuracy"):
        TaskSpec("t", "classification", ("a",), "label", ("no", "yes"), "pearson")
    with pytest.raises(UserError, match="needs two"):
        TaskSpec("t", "classification", ("a",), "label", ("no",))
    with pytest.raises(UserError, match="leave them out"):
        TaskSpec("t", "regression", ("a",), "label", ("no",), "pearson")
    with pytest.raises(UserError, match="3 text columns"):
        TaskSpec("t", "regression", ("a", "b", "c"), "label", metric="pearson")
