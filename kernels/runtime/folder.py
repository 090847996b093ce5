"""A model as a folder: what Python and C read to answer texts without PyTorch.

    ffnas.json            names of the answers (`Answers`), and the SHA-256 of encoder.bin
    encoder.bin           sizes, programs, where each matrix lies, a checksum of the weights (csrc/cpu/encoder_file.h)
    weights.safetensors   float32 arrays, named as `Description.arrays` says
    tokenizer.json        of the tokenizers library; absent where a model takes ids alone

Everything in it may come from a stranger: this file checks ffnas.json, C++ the other two, before a number is used.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .description import HEAD_CODES, PRECISIONS, SENTENCES, Answers, NativeError

FORMAT, VERSION = "ffnas-native", 2
FILE, ENCODER, WEIGHTS, TOKENIZER = "ffnas.json", "encoder.bin", "weights.safetensors", "tokenizer.json"

_MOST = 2**28
"""Of any size."""


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
    wrong = sorted(set(given) ^ set(Answers._fields))
    if wrong:
        raise NativeError(f"{place}: unknown or missing fields {', '.join(wrong)!r:.200}; export again")
    for name in ("hidden_size", "positions", "max_length"):
        if type(given[name]) is not int or not 1 <= given[name] <= _MOST:
            raise NativeError(f"{place}: {name} must be a whole number from 1 to {_MOST}, got {given[name]!r:.60}")
    for name in ("pools", "regression"):
        if not isinstance(given[name], bool):
            raise NativeError(f"{place}: {name} must be true or false, got {given[name]!r:.60}")
    for name, names in (("head", tuple(HEAD_CODES)), ("sentence", SENTENCES), ("precision", PRECISIONS)):
        if given[name] not in names:
            raise NativeError(f"{place}: {name} must be one of {', '.join(names)}, got {given[name]!r:.60}")
    if not isinstance(given["mask_token"], str):
        raise NativeError(f"{place}: mask_token must be a text, got {given['mask_token']!r:.60}")
    labels = given["labels"]
    if not isinstance(labels, list) or not all(isinstance(v, str) for v in labels):
        raise NativeError(f"{place}: labels must be a list of names, got {labels!r:.60}")
    return Answers(**{**given, "labels": tuple(labels)})
