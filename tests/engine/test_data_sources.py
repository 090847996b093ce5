"""Reading files and hub names: contents as written, and one clear line for each kind of bad input."""

import json
import socket

import datasets
import pytest

from engine.data.sources import read_documents, read_table, split_documents
from engine.errors import UserError

ROWS = [("a cat, sat", "0"), ('say "hi"\nthere', "1"), ("NA", "1"), ("null", "0"), (" é ", "1"), ("", "0")]
CSV = 'text,label\n"a cat, sat",0\n"say ""hi""\nthere",1\nNA,1\n\nnull,0\n é ,1\n"",0\n'


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test of local files opened a connection")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write(path, content, encoding="utf-8"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return str(path)


def as_rows(table):
    return list(zip(table.texts("text"), map(str, table.values("label")), strict=True))


def test_csv_is_read_as_written(tmp_path):
    table = read_table(write(tmp_path / "a.csv", CSV))
    assert table.columns == ("text", "label")
    assert as_rows(table) == ROWS


def test_tsv_jsonl_and_parquet_give_the_same_rows(tmp_path):
    tsv = 'text\tlabel\na cat, sat\t0\n"say ""hi""\nthere"\t1\nNA\t1\nnull\t0\n é \t1\n\t0\n'
    records = [{"text": text, "label": int(label)} for text, label in ROWS]
    jsonl = "\n".join(json.dumps(r) for r in records)
    parquet = tmp_path / "a.parquet"
    datasets.Dataset.from_list(records).to_parquet(parquet)
    assert as_rows(read_table(write(tmp_path / "a.tsv", tsv))) == ROWS
    assert as_rows(read_table(write(tmp_path / "a.jsonl", jsonl))) == ROWS
    assert as_rows(read_table(str(parquet))) == ROWS


def test_more_rows_than_one_block_of_the_reader_keep_one_type(tmp_path):
    lines = [f"t{i},{i % 2}" for i in range(12_000)] + ["last,x"]
    table = read_table(write(tmp_path / "a.csv", "text,label\n" + "\n".join(lines)))
    assert len(table) == 12_001
    assert table.values("label")[-2:] == ["1", "x"]


def test_unquoted_tsv(tmp_path):
    path = write(tmp_path / "a.tsv", 'sentence\tlabel\n"open quote\t0\nfine "here" and\t1\n')
    with pytest.raises(UserError, match=r"a.tsv, line 3: .*expected after.*--data.quoting none"):
        read_table(path)
    table = read_table(path, quoting="none")
    assert table.texts("sentence") == ['"open quote', 'fine "here" and']


def test_names_of_class_ids_are_kept(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    table = read_table(str(tmp_path / "a.parquet"))
    assert table.class_names == {"label": ("no", "yes")}
    assert table.values("label") == ["yes", "no", -1]


def test_jsonl_of_mixed_and_missing_values(tmp_path):
    table = read_table(
        write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n{"text": null, "label": "x"}\n{"label": null}\n')
    )
    assert table.texts("text") == ["a", "", ""]
    assert table.values("label") == [1, "x", None]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig"])
def test_other_encodings(tmp_path, encoding):
    path = write(tmp_path / "a.csv", "text,label\ncafé,1\n", encoding)
    assert as_rows(read_table(path, encoding="utf-8" if encoding == "utf-8-sig" else encoding)) == [("café", "1")]
    path = write(tmp_path / "a.jsonl", '{"text": "café", "label": 1}\n', encoding)
    assert as_rows(read_table(path, encoding="utf-8" if encoding == "utf-8-sig" else encoding)) == [("café", "1")]


@pytest.mark.parametrize("name", ["a [1].csv", "a*?.csv", "ü ñ.csv", "train-00000-of-00001.csv"])
def test_file_names_are_not_patterns(tmp_path, name):
    write(tmp_path / "a 1.csv", "text,label\nwrong,1\n")
    assert read_table(write(tmp_path / name, "text,label\nright,1\n")).texts("text") == ["right"]


def test_edited_file_is_read_anew(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nold,1\n")
    assert read_table(path).texts("text") == ["old"]
    write(tmp_path / "a.csv", "text,label\nnew,1\n")
    assert read_table(path).texts("text") == ["new"]


BAD = {
    "empty": ("a.csv", "", r"a.csv: the file is empty: give"),
    "blank": ("a.csv", "\n \n", r"a.csv: the file is empty: give"),
    "header only": ("a.csv", "text,label\n", r"a.csv: only a header line and no rows"),
    "short row": ("a.csv", "text,label\nx,1\ny\n", r"a.csv, line 3: 1 fields, the header has 2: quote"),
    "long row": (
        "a.csv",
        "text,label\nx,y,1\n",
        r"line 2: 3 fields, the header has 2: quote fields that hold ','",
    ),
    "open quote": ("a.csv", 'text,label\n"x,1\ny,1\n', r"a.csv, line 3: .*close the quotation mark"),
    "open quote, long": ("a.csv", 'text,label\n"x,1\n' + "y,1\n" * 40_000, r"line \d+: .*close the quotation mark"),
    "joined lines": ("a.csv", 'text,label\n"x,1\ny "z" w,1\n', r"a.csv, line 3: .*close the quotation mark"),
    "double column": ("a.csv", "text,text\nx,1\n", r"column 'text' occurs twice in the header: rename one"),
    "bytes": ("a.csv", b"text,label\ncaf\xe9,1\n", r"a.csv: byte 14 \(0xe9\) is not utf-8: try --data.encoding cp1252"),
    "control": ("a.csv", b"text,label\nc\x81\xff,1\n", r"byte 12 \(0x81\) is not utf-8: try --data.encoding latin-1"),
    "utf-16": (
        "a.csv",
        "text,label\nx,1\n".encode("utf-16"),
        r"byte 0 \(0xff\).*try --data.encoding utf-16",
    ),
    "cut": ("a.csv", "text,label\nx,é".encode()[:-1], r"byte 13 \(0xc3\) is not utf-8"),
    "far": ("a.csv", b"text,label\n" + b"x,1\n" * 300_000 + b"\xe9,1\n", r"byte 1200011 \(0xe9\)"),
    "empty json": ("a.jsonl", "", r"a.jsonl: the file has no rows: give one with data"),
    "json": ("a.jsonl", '{"text": "a"}\n{"text": b}\n', r"a.jsonl: not readable as jsonl \(line 2: Expecting value\)"),
    "json bytes": ("a.jsonl", b'{"text": "\xe9"}\n', r"a.jsonl: byte 10 \(0xe9\) is not utf-8"),
    "parquet": ("a.parquet", "abc", r"a.parquet: not readable as parquet \(.*\): correct the file"),
    "suffix": ("a.xlsx", "abc", r"cannot read a .xlsx: use one of .csv, .tsv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_end_in_one_clear_line(tmp_path, case, caplog, capfd):
    name, content, message = BAD[case]
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        read_table(path)
    assert "\n" not in str(caught.value)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_unknown_encoding(tmp_path):
    with pytest.raises(UserError, match=r"data.encoding 'utf-99' is unknown: try"):
        read_table(write(tmp_path / "a.csv", "text,label\nx,1\n"), encoding="utf-99")


@pytest.mark.parametrize(
    "source", ["nowhere.csv", "./nowhere", "/nowhere/data", "a/b/c", "nowhere.txt", "what is this"]
)
def test_missing_files_are_not_looked_up_on_the_hub(source):
    with pytest.raises(UserError, match="no such file: check"):
        read_table(source)


def test_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder: give a file"):
        read_table(str(tmp_path))


def test_hub_name_offline_is_one_clear_line(monkeypatch, capfd):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = r"ffnas-nobody/nothing:x: neither a file here nor readable from the hub .*OfflineMode.*HF_HUB_OFFLINE"
    with pytest.raises(UserError, match=message):
        read_table("ffnas-nobody/nothing:x")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("imdb", ("imdb", None, "train")),
        ("nyu-mll/glue:mrpc", ("nyu-mll/glue", "mrpc", "train")),
        ("nyu-mll/glue:mnli@validation_matched", ("nyu-mll/glue", "mnli", "validation_matched")),
        ("imdb@train[:10%]", ("imdb", None, "train[:10%]")),
    ],
)
def test_hub_names_reach_the_hub_reader(monkeypatch, source, wanted):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    seen = []

    def load(name, config, split):
        seen.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = read_table(source)
    assert seen == [wanted]
    assert as_rows(table) == [("a", "yes"), ("b", "no")]


# -- documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one.\ntwo.\n", ["one.", "two."]),
        ("one.\ntwo.\n\n \nthree.\n", ["one.\ntwo.", "three."]),
        (
            " \n = Title = \n \n text one . \n\n = = Part = = \n more . \n = Next = \n last .\n",
            ["text one .\nmore .", "last ."],
        ),
        ("2 + 2 = 4\nx = y = z\n", ["2 + 2 = 4", "x = y = z"]),
    ],
    ids=["lines", "blank lines", "wikitext", "equations"],
)
def test_documents_of_plain_text(text, documents):
    assert split_documents(text) == documents


def test_documents_of_files(tmp_path):
    assert read_documents(write(tmp_path / "a.txt", "caf\xe9\n", "latin-1"), encoding="latin-1") == ["café"]
    assert read_documents(write(tmp_path / "a.csv", "text,label\nx,1\n,0\ny,1\n")) == ["x", "y"]
    assert read_documents(write(tmp_path / "b.csv", "sentence1,sentence2\na,b\n")) == ["a", "b"]
    with pytest.raises(UserError, match="no text in it"):
        read_documents(write(tmp_path / "e.txt", " \n"))
    with pytest.raises(UserError, match="no text column among 'foo'"):
        read_documents(write(tmp_path / "c.csv", "foo\nx\n"))
    with pytest.raises(UserError, match=r"byte 3 \(0xe9\) is not utf-8"):
        read_documents(write(tmp_path / "d.txt", b"caf\xe9"))
