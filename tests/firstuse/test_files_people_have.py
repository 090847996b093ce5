"""Files as other programs write them: read as they are meant, or refused with the line and the remedy."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from newcomer import labelled, texts, write_jsonl, write_table

from engine.data import DataConfig, load_task
from engine.data.sources import read_documents, read_table
from engine.data.stream import stream_documents

HEADER = ("text", "label")
ROWS = labelled(24, ("no", "yes"))


@pytest.mark.parametrize("delimiter", [";", "\t", "|"], ids=["semicolon", "tab", "pipe"])
def test_a_csv_file_separated_by_something_else(tmp_path, shown, delimiter):
    rows = [(f"{text}, yes, it is", label) for text, label in ROWS]
    out = shown(write_table(tmp_path / "a.csv", HEADER, rows, delimiter))
    assert f"24 rows (CSV separated by {'tabs' if delimiter == chr(9) else repr(delimiter)})" in out
    assert "no: 12 (50 %), yes: 12 (50 %)" in out


def test_commas_in_a_tsv_file(tmp_path, shown):
    assert "24 rows (TSV separated by ',')" in shown(write_table(tmp_path / "a.tsv", HEADER, ROWS, ","))


def test_semicolons_in_the_texts_of_a_comma_file_separate_nothing(tmp_path):
    path = write_table(tmp_path / "a.csv", HEADER, [("a;b;c", "no"), ("d;e", "yes")])
    assert read_table(path).texts("text") == ["a;b;c", "d;e"]


def test_one_column_stays_one_column(tmp_path):
    path = write_table(tmp_path / "a.csv", ["text"], [("x; y | z",), ("w",)])
    assert read_table(path).texts("text") == ["x; y | z", "w"]


@pytest.mark.parametrize("given", ["^", "tab"])
def test_the_separator_can_be_given(tmp_path, shown, given):
    path = write_table(tmp_path / "a.csv", HEADER, ROWS, "\t" if given == "tab" else given)
    assert "no: 12 (50 %)" in shown(path, "--data.delimiter", given)


def test_a_separator_of_two_characters_is_refused(tmp_path, refused):
    path = write_table(tmp_path / "a.csv", HEADER, ROWS)
    assert "data.delimiter is '||': give one character, tab, or auto" in refused(path, "--data.delimiter", "||")


def test_a_short_row_of_a_semicolon_file_is_named(tmp_path, refused):
    (tmp_path / "a.csv").write_text("text;label\n" + "x;no\n" * 5 + "y\n" + "z;yes\n" * 5)
    message = refused(tmp_path / "a.csv")
    assert "a.csv, line 7: 1 fields, the header has 2: quote fields that hold ';'" in message


def test_an_unclosed_quotation_mark_is_named_where_it_opens(tmp_path, refused):
    (tmp_path / "a.csv").write_text('text,label\nx,no\n"y,yes\n' + "z,no\n" * 30)
    assert "(in the row that begins in line 3): close the quotation mark" in refused(tmp_path / "a.csv")


def test_a_text_longer_than_131072_characters(tmp_path, shown):
    long = "word " * 60_000
    out = shown(write_table(tmp_path / "a.csv", HEADER, [(long, "no"), *ROWS]))
    assert "longest 60000;" in out
    assert "25 rows" in out


def test_excels_csv_with_a_byte_order_mark(tmp_path, shown):
    path = tmp_path / "a.csv"
    write_table(path, HEADER, ROWS, ";")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert "text: text; label: label" in shown(path)


def test_half_a_surrogate_pair_in_json_is_mended_and_told(tmp_path, shown):
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    lines[3] = '{"text": "broken \\ud83d smile", "label": "no"}'
    lines[4] = '{"text": "whole \\ud83d\\ude00 smile", "label": "no"}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert "1 rows had half a surrogate pair, now U+FFFD" in shown(tmp_path / "a.jsonl")
    assert read_table(str(tmp_path / "a.jsonl")).texts("text")[3:5] == ["broken \ufffd smile", "whole \U0001f600 smile"]


def test_a_text_that_looks_like_a_date_stays_as_written(tmp_path, shown):
    days = ("2021-01-01", "2021-01-02T00:00:00Z")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t, "label": d} for t, d in labelled(24, days)])
    assert "2021-01-01: 12 (50 %), 2021-01-02T00:00:00Z: 12 (50 %)" in shown(path)


def test_a_list_of_objects_and_an_object_of_columns_are_json_tables(tmp_path):
    rows = [{"text": text, "label": label} for text, label in ROWS]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    columns = {
        "text": {str(i): t for i, (t, _) in enumerate(ROWS)},
        "label": {str(i): y for i, (_, y) in enumerate(ROWS)},
    }
    (tmp_path / "columns.json").write_text(json.dumps(columns))
    for name in ("list.json", "columns.json"):
        table = read_table(str(tmp_path / name))
        assert list(zip(table.texts("text"), table.values("label"), strict=True)) == ROWS


def test_squads_file_without_its_task_says_which_task(tmp_path, refused):
    (tmp_path / "train.json").write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": []}]}))
    assert "SQuAD's files go with --data.task squad" in refused(tmp_path / "train.json")


def test_a_folder_with_two_colons(tmp_path, shown):
    folder = tmp_path / "a::b"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts(24), "label": [0, 1] * 12}), folder / "a.parquet")
    for path in (
        write_table(folder / "a.csv", HEADER, ROWS),
        write_jsonl(folder / "a.jsonl", [{"text": t, "label": y} for t, y in ROWS]),
        folder / "a.parquet",
    ):
        assert "24 rows" in shown(path)


@pytest.mark.parametrize("mark", ["\f", "\v", "\x1c", "\x85", "\u2028", "\u2029"], ids=ascii)
def test_only_newlines_end_lines_of_text_for_search_and_prepare_alike(tmp_path, mark):
    path = tmp_path / "a.txt"
    path.write_bytes(f"one{mark}two\nthree\r\nfour\n".encode())
    assert read_documents(str(path)) == [f"one{mark}two", "three", "four"]
    assert list(stream_documents(str(path))) == read_documents(str(path))


def test_prepare_reads_tables_as_a_search_does(tmp_path):
    path = write_table(tmp_path / "a.csv", ("id", "words"), enumerate(texts(5)), "^")
    options = {"delimiter": "^", "text_columns": ["words"]}
    assert list(stream_documents(path, **options)) == read_documents(path, **options) == texts(5)
    assert list(stream_documents(path, **options, skip=3)) == texts(5)[3:]


def test_warm_up_text_may_be_a_table_with_the_tasks_columns(tmp_path):
    train = write_table(tmp_path / "a.csv", ("words", "label"), ROWS)
    more = write_table(tmp_path / "more.csv", ("words",), [("something else",)])
    assert load_task(DataConfig(train=train, text=[more], text_columns=["words"])).text == ["something else"]
