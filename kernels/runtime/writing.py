"""Writes a model as a folder: what `kernels.runtime.folder` and C++ read."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from .description import Description
from .folder import ENCODER, FILE, FORMAT, VERSION
from .words import model_words

_MAGIC = b"FFNASENC"
_KEY, _STEP, _HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xA0761D6478BD642F), np.uint64(32)
_PIECE = 2**20


def files(description: Description, weights: bytes, extra: Mapping[str, Any]) -> dict[str, bytes]:
    """ffnas.json and encoder.bin of a model whose weights.safetensors holds `weights`; `extra` is shown, not used."""
    encoder = encoder_file(description, weights)
    values = {
        "format": FORMAT,
        "version": VERSION,
        **description.answers._asdict(),
        "sha256": hashlib.sha256(encoder).hexdigest(),
        "extra": dict(extra),
    }
    return {ENCODER: encoder, FILE: (json.dumps(values, indent=1) + "\n").encode()}


def encoder_file(description: Description, weights: bytes) -> bytes:
    """encoder.bin."""
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])

    def place(name: str) -> tuple[int, int]:
        entry = header[name]
        return 8 + length + entry["data_offsets"][0], entry["shape"][-1]

    programs: list[int] = []
    starts = []
    for layer in description.layers:
        starts.append((len(programs), len(layer.program)))
        programs += layer.program
    words = model_words(description, place, starts.__getitem__)
    body = struct.pack("<d", description.eps) + np.array(words, "<i8").tobytes() + np.array(programs, "<i4").tobytes()
    numbers = struct.pack("<4q", VERSION, len(words), len(programs), len(weights))
    return _MAGIC + numbers + struct.pack("<2Q", checksum(weights), checksum(body)) + body


def checksum(data: bytes) -> int:
    """Of words of eight bytes, the last one filled up with zeros, as csrc/cpu/encoder_file.h does it."""
    words = np.frombuffer(data + bytes(-len(data) % 8), "<u8")
    plain = mixed = np.uint64(0)
    with np.errstate(over="ignore"):
        for begin in range(0, len(words), _PIECE):
            part = words[begin : begin + _PIECE]
            t = part ^ (_KEY + np.arange(begin, begin + len(part), dtype=np.uint64) * _STEP)
            plain += part.sum(dtype=np.uint64)
            mixed += ((t & np.uint64(2**32 - 1)) * (t >> _HALF)).sum(dtype=np.uint64)
    return int(mixed ^ (plain << _HALF | plain >> _HALF))
