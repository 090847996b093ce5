"""What a native model is: sizes, layers with their programs, and arrays; and the folder it lies in.

    ffnas.json            a `Description`, and the weights' checksum
    weights.safetensors   float32 arrays, named as `Description.arrays` says
    encoder.bin           the same for programs in C (`kernels.runtime.encoder_file`); not read here
    tokenizer.json        of the tokenizers library; absent where a model takes ids alone

Everything in the folder may come from a stranger: sizes and shapes are checked here, programs in C++, so that no file
makes the library read outside its arrays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from kernels.runtime.safetensors_file import DamagedFile, read_float32

FORMAT, VERSION = "ffnas-native", 1
FILE, WEIGHTS, TOKENIZER = "ffnas.json", "weights.safetensors", "tokenizer.json"

EMBEDDINGS = ("full", "factorized", "trigram")
POOLINGS = ("none", "cls", "mean")
ACTIVATIONS = ("tanh", "relu", "gelu", "gelu_erf")
HEADS = ("none", "sequence", "tokens")

_MOST = 2**28
"""Of any size."""

Arrays = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]


class NativeError(ValueError):
    """A native model cannot be used; one line says which field or file is wrong, and what to do."""


@dataclass(frozen=True)
class Layer:
    """heads: of attention, 0 for no attention block; stack: FFNs, 0 for none; inner: their width; program: words."""

    heads: int
    stack: int = 0
    inner: int = 0
    program: tuple[int, ...] = ()


@dataclass(frozen=True)
class Description:
    """A model but for its arrays.

    Attributes:
        hidden_size, head_size, vocab_size, positions, types: sizes; positions and types are rows of those tables.
        eps: LayerNorm's.
        embedding: how token rows become hidden ones; `token_width` is their width.
        pooling: a vector per sequence from its tokens' (`activation` of the pooler's dense layer, for cls).
        head: scores per sequence, per token, or none.
        labels: names of the classes, in order; one for a regression.
        regression: whether the head gives numbers instead of classes.
        max_length: tokens per sequence that the model was trained on; longer ones are cut.
    """

    hidden_size: int
    head_size: int
    vocab_size: int
    positions: int
    types: int
    eps: float
    layers: tuple[Layer, ...]
    embedding: str = "full"
    token_width: int = 0
    pooling: str = "none"
    activation: str = "tanh"
    head: str = "none"
    labels: tuple[str, ...] = ()
    regression: bool = False
    max_length: int = 512
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from; shown, not used."""

    def arrays(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the arrays the model has; weights are [outputs, inputs]."""
        hidden = self.hidden_size
        width = hidden if self.embedding == "full" else self.token_width
        yield "embeddings.token", (self.vocab_size, width)
        yield "embeddings.position", (self.positions, hidden)
        yield "embeddings.type", (self.types, hidden)
        if self.embedding != "full":
            yield from _dense("embeddings.dense", hidden, width * (3 if self.embedding == "trigram" else 1))
        yield from _norm("embeddings.norm", hidden)
        for index, layer in enumerate(self.layers):
            name, heads = f"layers.{index}", layer.heads * self.head_size
            if heads:
                for part in ("query", "key", "value"):
                    yield from _dense(f"{name}.{part}", heads, hidden)
                yield from _dense(f"{name}.output", hidden, heads)
                yield from _norm(f"{name}.norm", hidden)
            for ffn in range(layer.stack):
                yield from _dense(f"{name}.ffn.{ffn}.first", layer.inner, hidden)
                yield from _dense(f"{name}.ffn.{ffn}.second", hidden, layer.inner)
                yield from _norm(f"{name}.ffn.{ffn}.norm", hidden)
        if self.pooling == "cls":
            yield from _dense("pooler", hidden, hidden)
        if self.head != "none":
            yield from _dense("classifier", len(self.labels), hidden)

    def to_json(self) -> dict[str, Any]:
        """As `read` takes it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        layers = [
            {"heads": v.heads, "stack": v.stack, "inner": v.inner, "program": list(v.program)} for v in self.layers
        ]
        return {"format": FORMAT, "version": VERSION, **values, "layers": layers, "labels": list(self.labels)}


def _dense(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (hidden,)
    yield f"{name}.bias", (hidden,)


def read(folder: Path) -> tuple[Description, dict[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    """The model in a folder.

    Raises:
        NativeError: there is none, or something in it is not what it should be.
    """
    file = folder / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NativeError(f"{folder}: no {FILE} there; `ffnas export RUN --native {folder}` writes one") from None
    except OSError as error:
        raise NativeError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise NativeError(f"{file}: no JSON; export the model again") from error
    description = parse(values, str(file))
    weights = folder / WEIGHTS
    try:
        wanted = values.get("sha256")
        if wanted != hashlib.sha256(weights.read_bytes()).hexdigest():
            raise NativeError(f"{weights}: changed since it was exported (its SHA-256 is not {wanted!r:.70})")
        arrays = read_float32(weights)
    except DamagedFile as error:
        raise NativeError(f"{error}; export the model again") from error
    except OSError as error:
        raise NativeError(f"{weights}: cannot be read ({error.strerror})") from error
    return description, dict(check_arrays(description, arrays, str(weights)))


def parse(values: Any, place: str) -> Description:
    """A description from JSON.

    Raises:
        NativeError: a field is missing, unknown, or of another kind; `place` is named.
    """
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise NativeError(f"{place}: format must be {FORMAT!r}; this is no native model")
    if values.get("version") != VERSION:
        raise NativeError(f"{place}: version {values.get('version')!r:.20}, this ffnas reads {VERSION}; export again")
    given = {k: v for k, v in values.items() if k not in ("format", "version", "sha256")}
    unknown = sorted(set(given) - {f.name for f in fields(Description)})
    missing = sorted({*_SIZES, "eps", "layers"} - set(given))
    if unknown or missing:
        raise NativeError(f"{place}: unknown or missing fields {', '.join([*unknown, *missing])!r:.200}; export again")
    for name in (*_SIZES, *(n for n in ("max_length", "token_width") if n in given)):
        _whole(given, name, 0 if name == "token_width" else 1, place)
    for name, allowed in (
        ("embedding", EMBEDDINGS),
        ("pooling", POOLINGS),
        ("activation", ACTIVATIONS),
        ("head", HEADS),
    ):
        if given.get(name, allowed[0]) not in allowed:
            raise NativeError(f"{place}: {name} must be one of {', '.join(allowed)}, got {given[name]!r:.60}")
    if not isinstance(given["eps"], float) or not 0.0 <= given["eps"] < 1.0:
        raise NativeError(f"{place}: eps must be a number from 0 to 1, got {given['eps']!r:.60}")
    labels = given.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(v, str) for v in labels):
        raise NativeError(f"{place}: labels must be a list of names, got {labels!r:.60}")
    if not isinstance(given.get("regression", False), bool) or not isinstance(given.get("extra", {}), dict):
        raise NativeError(f"{place}: regression must be true or false, and extra an object")
    if bool(labels) != (given.get("head", HEADS[0]) != "none"):
        raise NativeError(
            f"{place}: head {given.get('head', 'none')!r} with {len(labels)} labels; one goes with the other"
        )
    if given.get("head") == "sequence" and given.get("pooling", "none") == "none":
        raise NativeError(f"{place}: pooling must be cls or mean where head is sequence")
    if given.get("embedding", "full") != "full" and not given.get("token_width"):
        raise NativeError(f"{place}: token_width must be given where embedding is not full")
    layers = given["layers"]
    if not isinstance(layers, list) or not 1 <= len(layers) <= 1024:
        raise NativeError(f"{place}: layers must be a list of 1 to 1024 layers")
    parsed = tuple(_layer(v, f"{place}: layers[{i}]") for i, v in enumerate(layers))
    return Description(**{**given, "layers": parsed, "labels": tuple(labels)})


_SIZES = ("hidden_size", "head_size", "vocab_size", "positions", "types")


def _layer(values: Any, place: str) -> Layer:
    if not isinstance(values, dict) or set(values) - {"heads", "stack", "inner", "program"}:
        raise NativeError(f"{place} must have heads, stack, inner and program alone")
    given = {"heads": 0, "stack": 0, "inner": 0, "program": [], **values}
    for name, least in (("heads", 0), ("stack", 0), ("inner", 1 if given["stack"] else 0)):
        _whole(given, name, least, place)
    program = given["program"]
    if not isinstance(program, list) or not all(type(v) is int and -(2**31) <= v < 2**31 for v in program):
        raise NativeError(f"{place}.program must be a list of 32-bit numbers")
    if given["heads"] > 4096 or given["stack"] > 64 or len(program) > 2**20 or bool(given["stack"]) != bool(program):
        raise NativeError(f"{place}: heads, stack and program do not fit together")
    return Layer(given["heads"], given["stack"], given["inner"], tuple(program))


def _whole(values: Mapping[str, Any], name: str, least: int, place: str) -> None:
    value = values[name]
    if type(value) is not int or not least <= value <= _MOST:
        raise NativeError(f"{place}: {name} must be a whole number from {least} to {_MOST}, got {value!r:.60}")


def check_arrays(description: Description, arrays: Arrays, place: str) -> Iterator[tuple[str, Any]]:
    """The arrays the model has, contiguous.

    Raises:
        NativeError: one is missing or has another shape or dtype.
    """
    for name, shape in description.arrays():
        found = arrays.get(name)
        if found is None or found.shape != shape or found.dtype != np.float32:
            what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise NativeError(f"{place}: array {name} is {what}, the description asks for float32 {list(shape)}")
        yield name, np.ascontiguousarray(found)
