"""A model as a folder: what Python and C read to answer texts without PyTorch.

    ffnas.json            names of the answers (`Answers`), and the SHA-256 of encoder.bin
    encoder.bin           sizes, programs, where each matrix lies, and a hash of the weights (csrc/cpu/encoder_file.h)
    weights.safetensors   float32 arrays, named as `Description.arrays` says
    tokenizer.json        of the tokenizers library; absent where a model takes ids alone

Everything in it may come from a stranger: this file checks ffnas.json, C++ the other two, before a number is used.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from kernels.runtime.description import HEADS, PRECISIONS, Answers, Description, NativeError
from kernels.runtime.words import model_words

FORMAT, VERSION = "ffnas-native", 1
FILE, ENCODER, WEIGHTS, TOKENIZER = "ffnas.json", "encoder.bin", "weights.safetensors", "tokenizer.json"

_MAGIC = b"FFNASENC"
_PRIME, _BASIS, _MASK = 1099511628211, 14695981039346656037, 2**64 - 1
_MOST = 2**28
"""Of any size."""


def files(description: Description, weights: bytes, extra: Mapping[str, Any]) -> dict[str, bytes]:
    """ffnas.json and encoder.bin of a model whose weights.safetensors holds `weights`; `extra` is shown, not used."""
    encoder = encoder_file(description, weights)
    values = {
        "format": FORMAT,
        "version": VERSION,
        **asdict(description.answers),
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
    return _MAGIC + numbers + struct.pack("<2Q", fnv(weights), fnv(body)) + body


def fnv(data: bytes) -> int:
    """FNV-1a over words of eight bytes, the last one filled up with zeros."""
    value = _BASIS
    for word in np.frombuffer(data + bytes(-len(data) % 8), "<u8").tolist():
        value = ((value ^ word) * _PRIME) & _MASK
    return value


def read_answers(folder: Path) -> Answers:
    """What a folder's model answers.

    Raises:
        NativeError: there is none, ffnas.json is not what it should be, or encoder.bin is another one.
    """
    file = folder / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        encoder = hashlib.sha256((folder / ENCODER).read_bytes()).hexdigest()
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise NativeError(f"{folder}: no {missing} there; `ffnas export RUN --native {folder}` writes it") from None
    except OSError as error:
        raise NativeError(f"{folder}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise NativeError(f"{file}: no JSON; export the model again") from error
    answers = parse(values, str(file))
    if values.get("sha256") != encoder:
        raise NativeError(f"{folder / ENCODER}: is not the one that {FILE} was written with; export the model again")
    return answers


def parse(values: Any, place: str) -> Answers:
    """The content of ffnas.json.

    Raises:
        NativeError: a field is missing, unknown, or of another kind; `place` is named.
    """
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise NativeError(f"{place}: format must be {FORMAT!r}; this is no native model")
    if values.get("version") != VERSION:
        raise NativeError(f"{place}: version {values.get('version')!r:.20}, this ffnas reads {VERSION}; export again")
    given = {k: v for k, v in values.items() if k not in ("format", "version", "sha256", "extra")}
    wrong = sorted(set(given) ^ {f.name for f in fields(Answers)})
    if wrong:
        raise NativeError(f"{place}: unknown or missing fields {', '.join(wrong)!r:.200}; export again")
    for name in ("hidden_size", "positions", "max_length"):
        if type(given[name]) is not int or not 1 <= given[name] <= _MOST:
            raise NativeError(f"{place}: {name} must be a whole number from 1 to {_MOST}, got {given[name]!r:.60}")
    for name in ("pools", "regression"):
        if not isinstance(given[name], bool):
            raise NativeError(f"{place}: {name} must be true or false, got {given[name]!r:.60}")
    if given["head"] not in HEADS:
        raise NativeError(f"{place}: head must be one of {', '.join(HEADS)}, got {given['head']!r:.60}")
    if given["precision"] not in PRECISIONS:
        raise NativeError(f"{place}: precision must be one of {', '.join(PRECISIONS)}, got {given['precision']!r:.60}")
    labels = given["labels"]
    if not isinstance(labels, list) or not all(isinstance(v, str) for v in labels):
        raise NativeError(f"{place}: labels must be a list of names, got {labels!r:.60}")
    return Answers(**{**given, "labels": tuple(labels)})
