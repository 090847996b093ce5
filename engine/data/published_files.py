"""Readers of the files that published tasks come in; see `engine.data.catalog`.

GLUE's TSV files are lines cut at tabs: quotation marks are plain characters, CoLA's train and dev have no header, and
a few published lines of QQP lack fields; such lines are left out if they are fewer than one in a hundred.

Chosen: reading lines by hand. Rejected: a CSV reader with quoting off; it splits at line separators other than the
newline (U+2028, a lone carriage return), which GLUE's texts contain.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.catalog import PublishedTask
from engine.data.filechecks import check_encoding
from engine.data.labels import class_ids, label_keys
from engine.data.readers import csv_rows, mended
from engine.data.rows import Gold, Rows
from engine.data.sources import read_table
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.data.catalog import PublishedTask

_MAX_BAD_LINES = 0.01


def read_glue(task: PublishedTask, path: Path, labelled: bool, encoding: str) -> Rows:
    """A GLUE TSV file; test files name their rows in the first column."""
    with open(path, encoding=check_encoding(path, encoding), newline="\n") as file:
        lines = [line.rstrip("\n").rstrip("\r") for line in file]
    fields = [line.split("\t") for line in lines if line.strip()]
    if task.header or not labelled:
        if not fields:
            raise UserError(f"{path}: the file is empty: give GLUE's {path.name} of {task.folder}")
        header, fields = [name.strip() for name in fields[0]], fields[1:]
    else:
        header = ["source", task.label, "star", *task.texts]
    wanted = [*task.texts, *([task.label] if labelled else [])]
    missing = [name for name in wanted if name not in header]
    if missing:
        raise UserError(
            f"{path}: no column {missing[0]!r} in the header ({', '.join(header)}): give GLUE's file of {task.folder},"
            " or name your own columns with --data.train and without --data.task"
        )
    whole = [f for f in fields if len(f) >= len(header)]
    if len(whole) < len(fields) * (1 - _MAX_BAD_LINES) or not whole:
        place = next((i for i, f in enumerate(fields, start=1) if len(f) < len(header)), 0)
        raise UserError(
            f"{path}: {len(fields) - len(whole)} of {len(fields)} rows have fewer fields than the header's"
            f" {len(header)}, first data row {place}: give the file as published"
        )
    column = {name: [f[header.index(name)] for f in whole] for name in wanted}
    ids = [f[0] for f in whole] if not labelled else None
    labels = _labels(task, column[task.label], str(path)) if labelled else None
    return Rows(tuple(column[name] for name in task.texts), labels, ids)


def read_squad(task: PublishedTask, path: Path, labelled: bool, encoding: str) -> Rows:
    """SQuAD's JSON, v1.1 or v2.0; unanswerable questions are refused in v1.1."""
    data = _json(path, encoding)
    questions, contexts, ids, golds = [], [], [], []
    try:
        for article in data["data"]:
            for paragraph in article["paragraphs"]:
                for item in paragraph["qas"]:
                    name = str(item["id"])
                    questions.append(_text(item, "question", name).strip())
                    contexts.append(_text(paragraph, "context", name))
                    ids.append(name)
                    golds.append(_gold(item, name))
    except KeyError as error:
        raise UserError(f"{path}: not in SQuAD's format: no {error} after {len(ids)} questions: add it") from error
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not in SQuAD's format after {len(ids)} questions: lists of articles, paragraphs and qas are"
            " wanted: give the file as published"
        ) from error
    except _Wrong as error:
        raise UserError(f"{path}: {error}: correct it") from error
    if not ids:
        raise UserError(f"{path}: no question in it: give SQuAD's train or dev file")
    for identity, context, gold in zip(ids, contexts, golds, strict=True):
        for text, start in zip(gold.texts, gold.starts, strict=True):
            if context[start : start + len(text)] != text:
                raise UserError(f"{path}: answer {text!r} of question {identity} does not stand at character {start}")
        if labelled and not gold.texts and not task.spec.no_answer:
            raise UserError(f"{path}: question {identity} has no answer: use --data.task squad_v2")
    return Rows((questions, contexts), None, ids, golds if labelled else None)


class _Wrong(Exception):
    """A value of a published file that is not what it should be; the message says which and where."""


def _text(item: dict[str, Any], name: str, place: str) -> str:
    """A field that must be text."""
    value = item[name]
    if not isinstance(value, str):
        raise _Wrong(f"question {place}: {name!r} is {json.dumps(value)[:60]}, not text")
    return value


def _gold(item: dict[str, Any], name: str) -> Gold:
    """Accepted answers of one question without the white space around them."""
    flag = item.get("is_impossible", False)
    impossible = _FLAGS.get(flag.strip().casefold() if isinstance(flag, str) else flag)
    if impossible is None:
        raise _Wrong(f"question {name}: 'is_impossible' is {json.dumps(flag)[:60]}, neither true nor false")
    answers = [] if impossible else item.get("answers") or []
    texts, starts = [], []
    for answer in answers:
        text, start = _text(answer, "text", name), _whole_number(answer["answer_start"], name)
        if text.strip():
            texts.append(text.strip())
            starts.append(start + len(text) - len(text.lstrip()))
    return Gold(tuple(texts), tuple(starts))


_FLAGS: dict[object, bool] = {
    True: True,
    False: False,
    "true": True,
    "false": False,
    "1": True,
    "0": False,
    None: False,
}
"""Ways files write `is_impossible`."""


def _whole_number(value: Any, name: str) -> int:
    """A character position, also where it is written as text or with `.0`."""
    try:
        number = int(str(value).strip().removesuffix(".0"))
    except ValueError:
        number = -1
    if isinstance(value, bool) or number < 0:
        raise _Wrong(f"question {name}: 'answer_start' is {json.dumps(value)[:60]}, no position in the context")
    return number


def read_swag(task: PublishedTask, path: Path, labelled: bool, encoding: str) -> Rows:
    """SWAG's CSV: `sent1`, then `sent2` with each of `ending0` to `ending3`."""
    found = csv_rows(path, check_encoding(path, encoding), ",")
    columns = next(found)
    endings = [f"ending{i}" for i in range(len(task.classes))]
    missing = [n for n in ("sent1", "sent2", *endings, *(["label"] if labelled else [])) if n not in columns]
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r} ({', '.join(columns)}): give SWAG's train.csv, val.csv, ...")
    rows = [dict(zip(columns, row, strict=True)) for row in found]
    if not rows:
        raise UserError(f"{path}: only a header line and no rows: give a file with data")
    texts = ([r["sent1"] for r in rows], *([f"{r['sent2']} {r[e]}".strip() for r in rows] for e in endings))
    labels = _labels(task, [r["label"] for r in rows], str(path)) if labelled else None
    return Rows(texts, labels, [str(i) for i in range(len(rows))])


def read_race(task: PublishedTask, path: Path, labelled: bool, encoding: str) -> Rows:
    """RACE's folders of one JSON object per article: four options to each of its questions."""
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no *.txt in it: give RACE's folder with train/, dev/ and test/")
    found: list[tuple[str, str, list[str], str, str]] = []
    for file in files:
        data = _json(file, encoding)
        try:
            for number, (question, options) in enumerate(zip(data["questions"], data["options"], strict=True)):
                answer = data["answers"][number] if labelled else ""
                name = f"{data.get('id', file.stem)}/{number}"
                words = [data["article"], question, answer, *options]
                if not all(isinstance(word, str) for word in words):
                    wrong = next(word for word in words if not isinstance(word, str))
                    raise _Wrong(f"question {name} holds {json.dumps(wrong)[:60]} where text belongs")
                found.append((data["article"], question, list(options), answer, name))
        except KeyError as error:
            raise UserError(f"{file}: not in RACE's format: no {error}: give the file as published") from error
        except (IndexError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{file}: not in RACE's format ({error}): give the file as published") from error
        except _Wrong as error:
            raise UserError(f"{file}: {error}: correct it") from error
    return _race_rows(task, found, labelled, str(path))


def _race_rows(
    task: PublishedTask, found: list[tuple[str, str, list[str], str, str]], labelled: bool, where: str
) -> Rows:
    choices: list[list[str]] = [[] for _ in task.classes]
    for _, question, options, _, name in found:
        if len(options) != len(choices):
            raise UserError(f"{where}: question {name} has {len(options)} options, RACE has {len(choices)}")
        for column, option in zip(choices, options, strict=True):
            asked = question.replace("_", option, 1) if "_" in question else f"{question} {option}"
            column.append(asked.strip())
    labels = _labels(task, [answer for *_, answer, _ in found], where) if labelled else None
    return Rows(([f[0] for f in found], *choices), labels, [f[-1] for f in found])


READERS: dict[str, Callable[[PublishedTask, Path, bool, str], Rows]] = {
    "glue": read_glue,
    "squad": read_squad,
    "swag": read_swag,
    "race": read_race,
}
"""`reader(task, path, labelled, encoding)` for each format."""


def read_hub(task: PublishedTask, source: str, *, labelled: bool) -> Rows:
    """A split from the hub, whose columns have their own names.

    Raises:
        UserError: neither a path nor readable from the hub.
    """
    table = read_table(source)
    if task.reader == "squad":
        asked = ([t.strip() for t in table.texts("question")], table.texts("context"))
        golds = None
        if labelled:
            items = [
                {"answers": [{"text": t, "answer_start": s} for t, s in zip(a["text"], a["answer_start"], strict=True)]}
                for a in table.values("answers")
            ]
            golds = [_gold(item, name) for item, name in zip(items, table.texts("id"), strict=True)]
        return Rows(asked, None, table.texts("id"), golds)
    if task.reader == "swag":
        second = table.texts("sent2")
        endings = (table.texts(f"ending{i}") for i in range(len(task.classes)))
        choices = [[f"{s} {e}".strip() for s, e in zip(second, ending, strict=True)] for ending in endings]
        labels = np.array(table.values("label"), dtype=np.int64) if labelled else None
        if labels is not None and table.class_names.get("label"):
            labels = class_ids(label_keys(table.values("label"), source), task.classes, source)
        return Rows((table.texts("sent1"), *choices), labels, [str(i) for i in range(len(table))])
    if task.reader == "race":
        columns = (table.values(name) for name in ("article", "question", "options", "answer"))
        found = [(*row, str(i)) for i, row in enumerate(zip(*columns, strict=True))]
        return _race_rows(task, found, labelled, source)
    texts: tuple[list[str], ...] = tuple(
        table.texts(name) for name in (task.texts if "#" not in task.texts[0] else ("sentence1", "sentence2"))
    )
    keys = [str(v) for v in table.values("label")] if labelled else []
    labels = None
    if labelled:
        labels = task.spec.head.labels(keys, task.spec, source)
    return Rows(texts, labels, table.texts("idx") if "idx" in table.columns else None)


def _labels(task: PublishedTask, values: list[str], where: str) -> np.ndarray:
    keys = label_keys(values, where, task.values or task.classes, remedy="give the file as published")
    spec = replace(task.spec, label_names=task.values or task.classes, label_column=task.label)
    return spec.head.labels(keys, spec, where)


def _json(path: Path, encoding: str) -> Any:
    try:
        text = path.read_bytes().decode(check_encoding(path, encoding))
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}): give the file as published") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting of thousands of levels
        raise UserError(f"{path}: not JSON as files are published ({error}): give the file as published") from error
    return mended(value)[0] if "\\ud" in text.casefold() else value


def find_split(task: PublishedTask, folder: str | None, split: str, given: str | None = None) -> str | None:
    """Where a split is: the path given, the published file below `folder`, or the hub's name; None where it is not.

    A published file may lie in `folder` itself or in the task's folder below it (MRPC/, mrpc/, glue/MRPC/).
    """
    if given is not None:
        return given
    if split not in task.files:
        return None
    if folder is None:
        return f"{task.hub}@{_HUB_SPLITS.get((task.name, split), _HUB_SPLITS[split])}"
    root = Path(folder).expanduser()
    short = task.name.split("/")[-1]
    names = [task.folder, task.folder.lower(), short, f"glue/{task.folder}", f"glue_data/{task.folder}"]
    names += ["diagnostic"] if short == "ax" else []
    for place in (*(root / name for name in names), root):
        if (place / task.files[split]).exists():
            return str(place / task.files[split])
    return None


_HUB_SPLITS: dict[object, str] = {
    "train": "train",
    "dev": "validation",
    "test": "test",
    "dev_mismatched": "validation_mismatched",
    "test_mismatched": "test_mismatched",
    ("glue/mnli", "dev"): "validation_matched",
    ("glue/mnli", "test"): "test_matched",
}
"""Splits as the hub names them."""


def read_split(task: PublishedTask, source: str, *, labelled: bool = True, encoding: str = "utf-8") -> Rows:
    """The rows of one split, with gold labels or answers where `labelled`.

    Raises:
        UserError: not found, not readable, or not in the published format.
    """
    from engine.data import published_files

    if not Path(source).expanduser().exists():
        return published_files.read_hub(task, source, labelled=labelled)
    return published_files.READERS[task.reader](task, Path(source).expanduser(), labelled, encoding)
