"""The character encoding of a user's text file, checked to its end before a reader fails somewhere inside it."""

from __future__ import annotations

import codecs
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
