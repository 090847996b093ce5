"""What was understood is shown: every number against a count made here."""

import json
from collections import Counter

import numpy as np
import pytest
from newcomer import labelled, started, texts, write_jsonl, write_table
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from engine.data import DataConfig, load_task
from engine.data.describe import MOST_MEASURED, describe, word_counts


def test_columns_that_are_not_used_are_named(tmp_path, shown):
    rows = [(f"title {i}", text, "ann", i % 2) for i, text in enumerate(texts(24))]
    out = shown(write_table(tmp_path / "a.csv", ("title", "body", "author", "stars"), rows))
    assert "text: body; label: stars; not used: title, author" in out


def test_both_files_are_shown(tmp_path, shown):
    train = write_table(tmp_path / "a.csv", ("text", "label"), labelled(40, ("no", "yes")))
    dev = write_jsonl(tmp_path / "b.jsonl", [{"text": f"dev {i}", "label": "no", "id": i} for i in range(7)])
    out = shown(train, dev)
    assert f"train {train}: 40 rows (CSV); text: text; label: label\n" in out
    assert f"dev   {dev}: 7 rows (JSON); not used: id\n" in out
    assert "7 dev" in out


def test_counts_of_classes_and_splits_are_those_of_the_file(tmp_path, shown):
    rows = labelled(60, ("c", "a", "b", "a"))
    out = shown(write_table(tmp_path / "a.csv", ("text", "label"), rows))
    counts = Counter(label for _, label in rows)
    assert ", ".join(f"{name}: {counts[name]} ({100 * counts[name] / 60:.0f} %)" for name in "abc") in out
    assert "rows  15 train, 15 score, 15 select, 15 dev" in out


def test_many_classes_are_cut_short(tmp_path, shown):
    path = write_table(tmp_path / "a.csv", ("text", "label"), labelled(400, [f"c{i:02}" for i in range(20)]))
    assert "and 9 more classes" in shown(path)


def test_the_range_of_a_score_is_shown(tmp_path, shown):
    path = write_table(tmp_path / "a.csv", ("text", "score"), labelled(40, ("0.5", "4.5")))
    out = shown(path)
    assert "regression, since labels are numbers with decimals, or many: numbers from 0.5 to 4.5, mean 2.5" in out
    assert "pearson, the usual one for numbers" in out


def test_a_folder_named_cola_does_not_choose_the_metric_silently(tmp_path, shown):
    (tmp_path / "cola").mkdir()
    path = write_table(tmp_path / "cola" / "train.csv", ("text", "label"), labelled(40, ("no", "yes")))
    out = shown(path)
    assert "metric  mcc, GLUE's for cola, which the path names (--data.metric for another)" in out
    assert "metric  accuracy, data.metric says so" in shown(path, "--data.metric", "accuracy")


def test_a_task_has_one_name_from_whatever_folder_its_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "cola").mkdir()
    path = write_table(tmp_path / "cola" / "train.csv", ("text", "label"), labelled(40, ("no", "yes")))
    monkeypatch.chdir(tmp_path / "cola")
    assert load_task(DataConfig(train="train.csv")).spec == load_task(DataConfig(train=path)).spec


def test_duplicates_are_told(tmp_path, shown):
    rows = labelled(40, ("no", "yes"))
    path = write_table(tmp_path / "a.csv", ("text", "label"), [*rows, *rows[:3]])
    assert "note    3 duplicate training texts dropped" in shown(path)


@pytest.fixture
def word_teacher(tmp_path):
    """A folder a teacher could be: every word is a token, one special token before the text and one behind it."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    core.enable_truncation(4)  # as files of published tokenizers have it; lengths must not be those of cut texts
    core.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_lengths_and_cut_texts_are_counted_in_the_teachers_tokens(tmp_path, shown, word_teacher):
    sizes = [3 + (7 * i) % 50 for i in range(101)]
    rows = [(" ".join([f"w{i}", *["word"] * (n - 1)]), i % 2) for i, n in enumerate(sizes)]
    path = write_table(tmp_path / "a.csv", ("text", "label"), rows)
    out = shown(path, "--teacher", word_teacher, "--data.max_length", 30)
    tokens = np.array(sizes) + 2
    median, most = (int(np.percentile(tokens, q, method="higher")) for q in (50, 95))
    cut = int((tokens > 30).sum())
    assert f"median {median} tokens, 95 % up to {most}, longest {tokens.max()}; {cut} of 101 are cut at 30" in out
    words = np.array(sizes)
    median, most = (int(np.percentile(words, q, method="higher")) for q in (50, 95))
    assert f"median {median} words, 95 % up to {most}, longest {words.max()};" in shown(path)


def test_pairs_are_as_long_as_both_texts(tmp_path, shown):
    rows = [(f"one two {i}", "three four", i % 2) for i in range(40)]
    assert "longest 5;" in shown(write_table(tmp_path / "a.csv", ("sentence1", "sentence2", "label"), rows))


def test_of_a_large_task_a_sample_is_measured(tmp_path):
    count = MOST_MEASURED + 5000
    path = write_table(tmp_path / "a.csv", ("text", "label"), labelled(count, ("no", "yes")))
    lines = describe(load_task(DataConfig(train=path)), 128)
    assert any(f"longest 4 (of {MOST_MEASURED:,} rows)" in line for line in lines)


def test_words_are_counted_per_row():
    assert word_counts([["a b", "c"], ["d", "e f g"]]).tolist() == [3, 4]


def test_ffnas_data_loads_no_framework(tmp_path, word_teacher):
    path = write_table(tmp_path / "a.csv", ("text", "label"), labelled(40, ("no", "yes")))
    code = (
        "import sys; from search.cli import main; code = main(['data', *sys.argv[1:]]);"
        "print(code, sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    done = started(path, "--teacher", str(word_teacher), code=code)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_two_files_are_the_most(refused):
    assert "3 files given: give training data, and dev data" in refused("a.csv", "b.csv", "c.csv")
