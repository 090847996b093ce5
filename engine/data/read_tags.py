"""Files of words with their tags: CoNLL's columns, CoNLL-U, and JSON Lines of `tokens` and `tags`.

columns     a word a line, its tag in the last column, an empty line between sentences: CoNLL-2002/2003, WNUT;
            columns parted by tabs where the line has one, else by white space; -DOCSTART- lines are left out
.conllu     Universal Dependencies: the form and the universal part of speech
.jsonl      {"tokens": [...], "tags": [...]}; tags may be missing where only answers are asked for
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError

COLUMN_SUFFIXES = (".conll", ".conllu", ".iob", ".iob2", ".bio", ".bioes")
_TABLES = (".csv", ".tsv", ".json", ".parquet", ".arrow", ".gz", ".zip", ".yaml", ".bin", ".pt", ".safetensors")
_DOCUMENT = "-DOCSTART-"
_LOOKED_AT = 200
"""Lines of a file without a known suffix that are looked at."""


class Sentence(NamedTuple):
    """Words, and their tags where the file has them."""

    words: list[str]
    tags: list[str] | None


def holds_tags(source: str) -> bool:
    """Whether a file is one of words and tags, by its suffix, or else by its first lines."""
    path = Path(source)
    suffix = path.suffix.casefold()
    if suffix in COLUMN_SUFFIXES:
        return True
    if suffix in _TABLES or not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line.rstrip("\r\n") for line, _ in zip(file, range(_LOOKED_AT), strict=False)]
    except (OSError, UnicodeDecodeError):
        return False
    if suffix == ".jsonl":
        return bool(lines) and _is_tagged(lines[0])
    rows = [_columns(line) for line in lines if line.strip() and not line.startswith(_DOCUMENT)]
    return bool(rows) and all(len(row) > 1 and _may_be_entity(row[-1]) for row in rows)


def read_sentences(source: str, encoding: str = "utf-8") -> list[Sentence]:
    """All sentences of a file that have a word.

    Raises:
        UserError: it cannot be read, is empty, or a line does not fit; with the line's number and a remedy.
    """
    try:
        lines = Path(source).read_text(encoding=encoding).splitlines()
    except (OSError, UnicodeDecodeError, LookupError) as error:
        raise UserError(f"{source}: cannot be read ({error}): check the path, or give --data.encoding") from error
    suffix = Path(source).suffix.casefold()
    read = _json_lines if suffix == ".jsonl" else _conllu if suffix == ".conllu" else _column_lines
    found = [sentence for sentence in read(source, lines) if sentence.words]
    if not found:
        raise UserError(f"{source}: no sentence in it: give a file of words and tags, a word a line")
    return found


def _column_lines(source: str, lines: Sequence[str]) -> Iterator[Sentence]:
    words: list[str] = []
    tags: list[str] = []
    width = 0
    for number, line in enumerate([*lines, ""], start=1):
        if not line.strip() or line.startswith(_DOCUMENT):
            yield Sentence(words, tags if width != 1 else None)
            words, tags = [], []
            continue
        row = _columns(line)
        if not width:
            width = len(row)
        if len(row) != width:
            raise UserError(
                f"{source}: line {number} has {len(row)} column(s), those before {width}: write a word, its columns"
                " and its tag on each line, and an empty line between sentences"
            )
        words.append(_word(row[0]))
        tags.append(row[-1])


def _conllu(source: str, lines: Sequence[str]) -> Iterator[Sentence]:
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if not line.strip():
            yield Sentence(words, tags)
            words, tags = [], []
        elif not line.startswith("#"):
            row = line.split("\t")
            if len(row) != 10:
                raise UserError(f"{source}: line {number} has {len(row)} columns, CoNLL-U has 10: check the file")
            if row[0].isdigit():  # neither a range of words nor an empty one
                words.append(_word(row[1]))
                tags.append(row[3])


def _json_lines(source: str, lines: Sequence[str]) -> Iterator[Sentence]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            words, tags = row["tokens"], row.get("tags")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{source}: line {number} is no {{"tokens": [...], "tags": [...]}} ({error})') from error
        good = isinstance(words, list) and all(isinstance(w, str) and w for w in words)
        if not good or (tags is not None and (not isinstance(tags, list) or len(tags) != len(words))):
            raise UserError(f"{source}: line {number}: tokens must be words, and tags as many: one tag a word")
        yield Sentence([_word(w) for w in words], None if tags is None else [str(tag) for tag in tags])


def _columns(line: str) -> list[str]:
    return [part.strip() for part in line.split("\t")] if "\t" in line else line.split()


def _word(word: str) -> str:
    """Without spaces inside, which part the words of a text."""
    return "_".join(word.split()) or "_"


def _may_be_entity(tag: str) -> bool:
    return tag == "O" or (len(tag) > 2 and tag[0] in "BIESLU" and tag[1] == "-")


def _is_tagged(line: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("tokens"), list)
