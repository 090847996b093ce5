"""Rows of local tables: CSV and TSV, JSON Lines and JSON, Parquet.

Every value comes as the file has it: a CSV field is its text ("NA" stays "NA", "1.0" stays "1.0"), a JSON string stays
a string even where it looks like a date. Types are decided later, in `engine.data.labels`. A row with too few fields,
an unclosed quotation mark or a line that is no JSON is named with its line.

Chosen: the standard library and pyarrow, one pass per file (about 1 s per million short rows). Rejected: `datasets` for
local files. It makes timestamps of JSON strings that look like dates, takes `a::b` in a path for a chain of file
systems, wants a copy of the file in a cache, and takes most of a second to import before it can name a mistake.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.data.filechecks import check_encoding
from engine.errors import UserError

SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
"""File name suffixes of tables, and what reads each."""

SEPARATORS = (",", ";", "\t", "|")
"""What may separate the fields of a CSV file whose separator is not given."""

DELIMITER_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}

_SAMPLE = 1 << 16
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Reading:
    """How text formats are read; see `DataConfig` for the values."""

    encoding: str = "utf-8"
    quoting: str = "standard"
    delimiter: str = "auto"


@dataclass(frozen=True)
class Columns:
    """A whole local table.

    Attributes:
        data: values by column name, in file order; all columns are equally long.
        rows: their length.
        form: the format in words, such as `CSV separated by ';'`.
        class_names: names of the classes of columns whose ids have names (Parquet files of `datasets`).
        notes: what had to be mended in the file.
    """

    data: dict[str, list[Any]]
    rows: int
    form: str
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_columns(path: Path, reading: Reading) -> Columns:
    """All rows of a file whose suffix is one of `SUFFIXES`.

    Raises:
        UserError: not readable, a wrong row, or none at all; with file, place and remedy.
    """
    suffix = path.suffix.casefold()
    if SUFFIXES[suffix] == "parquet":
        return _read_parquet(path)
    encoding = check_encoding(path, reading.encoding)
    if SUFFIXES[suffix] == "json":
        return _read_json(path, encoding)
    delimiter = delimiter_of(path, encoding, reading)
    rows = csv_rows(path, encoding, delimiter, reading.quoting)
    header = next(rows)
    columns = [list(values) for values in zip(*rows, strict=True)]
    if not columns:
        raise UserError(f"{path}: only a header line and no rows: give a file with data")
    form = suffix[1:].upper()
    if delimiter != _usual(suffix):
        form += f" separated by {'tabs' if delimiter == TAB else repr(delimiter)}"
    return Columns(dict(zip(header, columns, strict=True)), len(columns[0]), form)


TAB = "\t"


def csv_rows(path: Path, encoding: str, delimiter: str, quoting: str = "standard") -> Iterator[list[str]]:
    """The header of a CSV file, then its rows, each checked against the header; blank lines are left out.

    Raises:
        UserError: an empty file, an unclosed quotation mark, a column name that occurs twice, or a row of another
            number of fields.
    """
    csv.field_size_limit(sys.maxsize)  # of the process; Python's own limit is 131,072 characters
    with open(path, encoding=encoding, newline="") as file:
        # strict: text after a closing quotation mark is refused, where a lenient reader joins lines without a word
        reader = csv.reader(file, delimiter=delimiter, quoting=_quoting(quoting), strict=True)
        width, begin = 0, 1
        try:
            for fields in reader:
                first, begin = begin, reader.line_num + 1
                if len(fields) <= 1 and not "".join(fields).strip():
                    continue
                if not width:
                    width = len(fields)
                    yield _header(path, fields)
                elif len(fields) != width:
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(fields)} fields, the header has {width}"
                        f"{_begun(first, reader.line_num)}: quote fields that hold {delimiter!r} or line ends, or set "
                        "--data.quoting none, or say what separates fields with --data.delimiter"
                    )
                else:
                    yield fields
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num}: {error}{_begun(begin, reader.line_num)}: close the quotation mark, "
                "double those inside a quoted field, or set --data.quoting none"
            ) from error
    if not width:
        raise UserError(f"{path}: the file is empty: give a file with a header line and rows")


def delimiter_of(path: Path, encoding: str, reading: Reading) -> str:
    """What separates the fields of a CSV file: as given, or found in its first 64 KiB.

    The suffix's own one (comma, or tab) where all rows of the sample have as many fields by it as the header, and two
    or more; else another of `SEPARATORS` that does better.
    """
    if reading.delimiter != "auto":
        return parse_delimiter(reading.delimiter)
    usual = _usual(path.suffix.casefold())
    with open(path, encoding=encoding, newline="") as file:
        sample = file.read(_SAMPLE)
        cut = bool(file.read(1))
    best, best_rank = usual, (False, 0.5, False, 0)
    for delimiter in SEPARATORS:
        widths = _widths(sample, delimiter, reading.quoting, cut)
        if not widths or widths[0] < 2:
            continue
        share = sum(w == widths[0] for w in widths) / len(widths)
        rank = (share == 1.0, share, delimiter == usual, widths[0])
        if rank > best_rank:
            best, best_rank = delimiter, rank
    return best


def parse_delimiter(given: str) -> str:
    """`data.delimiter` as one character, or `auto`.

    Raises:
        UserError: it is none, or one that cannot separate fields.
    """
    delimiter = DELIMITER_NAMES.get(given, given)
    if given != "auto" and (len(delimiter) != 1 or delimiter in '"\r\n\0'):
        raise UserError(f"data.delimiter is {given!r}: give one character, tab, or auto")
    return delimiter


def json_rows(path: Path, encoding: str) -> Iterator[tuple[dict[str, Any], bool]]:
    """Rows of a JSON Lines file, of a list of objects, or of an object of columns, and whether a row was mended.

    Half a surrogate pair, which no tokenizer takes, becomes U+FFFD.

    Raises:
        UserError: a line that is no JSON or no object.
    """
    with open(path, encoding=encoding) as file:
        first = file.read(_SAMPLE).lstrip()[:1]
        file.seek(0)
        if first == "[":
            yield from _records(path, _parsed(file.read(), path, ""))
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = _parsed(line, path, f"line {number}: ")
            except UserError:
                if number > 1 or first != "{":
                    raise
                file.seek(0)
                yield from _whole_object(path, file.read(), line)
                return
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not an object with named fields: write one object a line")
            if number == 1 and _is_columns(row):
                if file.read().strip():
                    raise UserError(f"{path}, line 1: nested objects: write one object with named texts a line")
                yield from _records(path, row)
                return
            yield mended(row) if "\\ud" in line.casefold() else (row, False)


def mended(value: Any) -> tuple[Any, bool]:
    """A JSON value whose unpaired surrogates are U+FFFD, and whether there was one."""
    if isinstance(value, str):
        whole = _SURROGATE.sub("\ufffd", value)
        return whole, whole != value
    if isinstance(value, list):
        parts = [mended(part) for part in value]
        return [part for part, _ in parts], any(changed for _, changed in parts)
    if isinstance(value, dict):
        pairs = [(mended(key), mended(part)) for key, part in value.items()]
        return {k: v for (k, _), (v, _) in pairs}, any(a or b for (_, a), (_, b) in pairs)
    return value, False


def open_parquet(path: Path) -> Any:
    """The `pyarrow.parquet.ParquetFile`; raises `UserError` where it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(pyarrow.OSFile(str(path)))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as parquet ({_first_line(error)}): correct the file") from error


def _read_json(path: Path, encoding: str) -> Columns:
    data: dict[str, list[Any]] = {}
    count = changed = 0
    for row, was_mended in json_rows(path, encoding):
        for name in row:
            data.setdefault(name, [None] * count)
        count += 1
        changed += was_mended
        for name, values in data.items():
            values.append(row.get(name))
    if not count:
        raise UserError(f"{path}: the file has no rows: give one with data")
    if count == 1 and "data" in data and isinstance(data["data"][0], list):
        raise UserError(f"{path}: holds one object with a list, not rows: SQuAD's files go with --data.task squad")
    notes = (f"{path}: {changed:,} rows had half a surrogate pair, now U+FFFD",) if changed else ()
    return Columns(data, count, "JSON", notes=notes)


def _read_parquet(path: Path) -> Columns:
    import pyarrow

    file = open_parquet(path)
    try:
        table = file.read()
        data = {name: table.column(i).to_pylist() for i, name in enumerate(table.column_names)}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as parquet ({_first_line(error)}): correct the file") from error
    if table.num_rows == 0:
        raise UserError(f"{path}: the file has no rows: give one with data")
    return Columns(data, table.num_rows, "Parquet", _class_names(table.schema.metadata or {}))


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Names that `datasets` keeps in the schema of its Parquet files; none where it did not write them."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: tuple(map(str, feature["names"]))
            for column, feature in features.items()
            if feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _parsed(text: str, path: Path, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "") or _first_line(error)
        line = "" if place else f"line {getattr(error, 'lineno', 1)}: "
        raise UserError(
            f"{path}: not readable as {path.suffix[1:]} ({place or line}{reason}): correct the file"
        ) from error


def _whole_object(path: Path, text: str, first: str) -> Iterator[tuple[dict[str, Any], bool]]:
    """Rows of a file that is one object over several lines; the mistake of its first line where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _parsed(first, path, "line 1: ")
    yield from _records(path, value)


def _records(path: Path, value: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    """Rows of a list of objects, or of an object of columns."""
    if isinstance(value, dict):
        if not _is_columns(value):
            yield mended(value)
            return
        parts = [list(v.values()) if isinstance(v, dict) else v for v in value.values()]
        value = [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, entry {number}: not an object with named fields: write a list of objects")
        yield mended(row)


def _is_columns(value: dict[str, Any]) -> bool:
    """Whether an object holds columns, as pandas writes them: several lists, or maps by row, of one length."""
    parts = list(value.values())
    lengths = {len(part) for part in parts if isinstance(part, (list, dict))}
    return len(parts) > 1 and all(isinstance(p, dict) for p in parts) and len(lengths) == 1


def _header(path: Path, fields: list[str]) -> list[str]:
    header = [name or f"Unnamed: {i}" for i, name in enumerate(fields)]
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"{path}: column {twice!r} occurs twice in the header: rename one")
    return header


def _widths(sample: str, delimiter: str, quoting: str, cut: bool) -> list[int]:
    """Fields per row of a sample; the last row is left out where the sample ends inside the file."""
    csv.field_size_limit(sys.maxsize)
    try:
        rows = list(csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, quoting=_quoting(quoting)))
    except csv.Error:
        return []
    rows = rows[:-1] if cut and len(rows) > 1 else rows
    return [len(fields) for fields in rows if len(fields) > 1 or "".join(fields).strip()]


def _quoting(quoting: str) -> Literal[0, 3]:
    return csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL


def _usual(suffix: str) -> str:
    return TAB if suffix == ".tsv" else ","


def _begun(first: int, last: int) -> str:
    """Where a row of several lines begins."""
    return f" (in the row that begins in line {first})" if first < last else ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
