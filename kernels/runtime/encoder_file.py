"""Writes encoder.bin, by which programs without Python read a native folder (csrc/cpu/encoder_file.h)."""

from __future__ import annotations

import json
import struct

import numpy as np

from kernels.runtime.description import Description
from kernels.runtime.words import model_words

FILE = "encoder.bin"
_MAGIC, _VERSION = b"FFNASENC", 1
_PRIME, _BASIS, _MASK = 1099511628211, 14695981039346656037, 2**64 - 1


def encoder_file(description: Description, weights: bytes) -> bytes:
    """The file's bytes, for a model whose weights.safetensors holds `weights`."""
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
    numbers = struct.pack("<4q", _VERSION, len(words), len(programs), len(weights))
    return _MAGIC + numbers + struct.pack("<2Q", _hash(weights), _hash(body)) + body


def _hash(data: bytes) -> int:
    """FNV-1a over words of eight bytes, the last one filled up with zeros."""
    value = _BASIS
    for word in np.frombuffer(data + bytes(-len(data) % 8), "<u8").tolist():
        value = ((value ^ word) * _PRIME) & _MASK
    return value
