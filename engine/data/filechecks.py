"""Checks of a user's text file that find the place of a mistake before a reader fails somewhere behind it.

Chosen: one walk over the file with the standard library (about 1 s per million short rows), so that a wrong byte, a row
with too few fields or an unclosed quotation mark is named with its offset or line. Rejected: translating the readers'
own errors; pandas pads short rows without a word and reads a surplus first column as an index.
"""

from __future__ import annotations

import codecs
import csv
import json
from pathlib import Path

from engine.errors import UserError

_CHUNK = 1 << 20


def check_encoding(path: Path, encoding: str) -> str:
    """The encoding to read `path` with, after every byte of it has been decoded (UTF-8 with a mark: `utf-8-sig`).

    Raises:
        UserError: an unknown encoding, or a byte that is not in it, with its offset and an encoding that would do.
    """
    try:
        name = codecs.lookup(encoding).name
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError as error:
        raise UserError(f"data.encoding {encoding!r} is unknown: try utf-8, latin-1 or cp1252") from error
    position = 0
    with open(path, "rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            if position == 0 and name == "utf-8" and chunk.startswith(codecs.BOM_UTF8):
                encoding = "utf-8-sig"
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeError as error:
                start = getattr(error, "start", 0)
                byte = f" (0x{error.object[start]:02x})" if isinstance(error, UnicodeDecodeError) else ""
                remedy = f"try --data.encoding {_likely_encoding(path)}"
                raise UserError(
                    f"{path}: byte {position - pending + start}{byte} is not {encoding}: {remedy}"
                ) from error
            if not chunk:
                return encoding
            position += len(chunk)


def check_csv(path: Path, encoding: str, delimiter: str, quoting: int) -> tuple[tuple[str, ...], int]:
    """Column names and number of rows of a CSV file, each row checked against the header."""
    with open(path, encoding=encoding, newline="") as file:
        # strict: text after a closing quotation mark is refused, where a lenient reader joins lines without a word
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        rows, header = 0, None
        try:
            for fields in reader:
                if len(fields) <= 1 and not "".join(fields).strip():
                    continue
                if header is None:
                    header = tuple(name or f"Unnamed: {i}" for i, name in enumerate(fields))
                    continue
                rows += 1
                if len(fields) != len(header):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(fields)} fields, the header has {len(header)}: quote "
                        f"fields that hold {delimiter!r} or line ends, or set --data.quoting none"
                    )
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num}: {error}: close the quotation mark, double those inside a quoted "
                "field, or set --data.quoting none"
            ) from error
    if header is None:
        raise UserError(f"{path}: the file is empty: give a file with a header line and rows")
    if rows == 0:
        raise UserError(f"{path}: only a header line and no rows: give a file with data")
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"{path}: column {twice!r} occurs twice in the header: rename one")
    return header, rows


def bad_json_line(path: Path, encoding: str) -> str:
    """Where the first line that is not JSON stands, or "" when each is."""
    with open(path, encoding=encoding) as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    json.loads(line)
            except json.JSONDecodeError as error:
                return f"line {number}: {error.msg}"
    return ""


def _likely_encoding(path: Path) -> str:
    with open(path, "rb") as file:
        data = file.read()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for name in ("utf-8", "cp1252"):
        try:
            data.decode(name)
            return name
        except UnicodeDecodeError:
            continue
    return "latin-1"
