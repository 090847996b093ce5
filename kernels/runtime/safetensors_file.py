"""Reads safetensors files with numpy alone: a length, a JSON header, then the arrays' bytes.

Rejected: the safetensors package. It is small, but one more thing to install where a model only has to answer.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

_LONGEST_HEADER = 100_000_000
_FLOAT32 = "F32"


class DamagedFile(ValueError):
    """The file is not what it should be; one line says how."""


def read_float32(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """The arrays of a file by name, float32 all of them, as views of one copy in memory.

    Raises:
        DamagedFile: the header is no JSON object of arrays that lie inside the file without gaps or overlaps, or an
            array is not float32.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    if len(data) < 8:
        raise DamagedFile(f"{path}: {len(data)} bytes are no safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > min(_LONGEST_HEADER, len(data) - 8):
        raise DamagedFile(f"{path}: its header would be {length} bytes, the file has {len(data)}")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: its header is no JSON") from error
    if not isinstance(header, dict):
        raise DamagedFile(f"{path}: its header is no JSON object")
    header.pop("__metadata__", None)
    room = bytearray(data[8 + length :])  # writable and aligned, as C code wants it
    arrays, ends = {}, [0]
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1])):
        begin, end, shape = _entry(path, name, entry)
        if begin != ends[-1] or end > len(room):
            raise DamagedFile(
                f"{path}: array {name!r:.80} lies at bytes {begin} to {end}, outside the file or over another"
            )
        ends.append(end)
        arrays[name] = np.frombuffer(room, np.float32, math.prod(shape), begin).reshape(shape)
    if ends[-1] != len(room):
        raise DamagedFile(f"{path}: {len(room) - ends[-1]} bytes belong to no array")
    return arrays


def _begin(entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[0] if isinstance(offsets, list) and offsets and type(offsets[0]) is int else -1


def _entry(path: Path, name: str, entry: Any) -> tuple[int, int, tuple[int, ...]]:
    if not isinstance(entry, dict) or entry.get("dtype") != _FLOAT32:
        raise DamagedFile(f"{path}: array {name!r:.80} is not {_FLOAT32}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise DamagedFile(f"{path}: array {name!r:.80} has no valid shape and place")
    if offsets[1] - offsets[0] != 4 * math.prod(shape) or offsets[0] % 4:
        raise DamagedFile(f"{path}: array {name!r:.80} of shape {shape} lies at bytes {offsets[0]} to {offsets[1]}")
    return offsets[0], offsets[1], tuple(shape)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 8 and all(type(v) is int and 0 <= v < 2**40 for v in values)
