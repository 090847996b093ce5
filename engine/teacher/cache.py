"""Fine-tuned teachers on disk, one folder per content hash, checked before use.

    CACHE/KEY/  what `save_pretrained` writes   teacher.json (format, key, metrics, sha256 of every file)

The key covers everything that decides the result: weights, configuration and tokenizer of the source, the encoded
data, the task and the settings. A folder is written whole or not at all; a file that was changed or lost since is
noticed by its hash and the entry made again.

Rejected: trusting names and times. A half-copied cache or an edited configuration would become a wrong teacher
without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError
from engine.files import atomic_directory, file_hash, write_json_atomic

if TYPE_CHECKING:
    from engine.teacher.adapter import Teacher

FORMAT = 1
RECORD = "teacher.json"


class Damaged(Exception):
    """A cache entry is not what was written; the message says in what way."""


def content_key(parts: Mapping[str, Any]) -> str:
    """32 hexadecimal digits from plain values; equal values, equal key."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def prepare_cache(folder: Path) -> None:
    """Create the cache folder.

    Raises:
        UserError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"teacher cache {folder} cannot be created ({error.strerror}): choose a folder you can write"
        ) from error


def store(folder: Path, key: str, teacher: Teacher, details: Mapping[str, Any]) -> None:
    """Write the entry `folder` whole or not at all, with `details` (plain values) in its record."""
    with atomic_directory(folder) as temporary:
        teacher.save(temporary)
        files = {p.name: file_hash(p) for p in sorted(temporary.iterdir())}
        record = {"format": FORMAT, "key": key, "metrics": teacher.metrics, "files": files, **details}
        write_json_atomic(temporary / RECORD, record)


def check(folder: Path, key: str) -> dict[str, Any] | None:
    """The record of an intact entry, None when there is no entry.

    Raises:
        Damaged: there is one, and a file is missing or was changed.
    """
    if not folder.exists():
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT or record["key"] != key:
            raise Damaged(f"{RECORD} belongs to another entry")
        for name, expected in record["files"].items():
            if file_hash(folder / name) != expected:
                raise Damaged(f"{name} was changed")
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{RECORD} cannot be read") from error
    return record
