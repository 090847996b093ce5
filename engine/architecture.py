"""Architectures: one (expression, stack, ratio) per layer, as a value, as text and as a file.

Text is the published code's form, one layer text per layer joined by `, `; the file is JSON (format 1):

    {"format": 1, "hidden_size": 540, "num_layers": 6,
     "layers": [{"expression": "linear(gelu(linear(x,wb1)),wb2)", "stack": 4, "ratio": [1, 2]}, ...],
     "params": 15737724}

`params` is written from the formula and read back only as a number: sizes it depends on (vocabulary, teacher width)
are not in the file. Files are read as hostile: each field is checked and a `UserError` names the one that is wrong.
Rejected: a schema library. One shape of file does not repay the dependency, and its errors run over many lines.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import write_json_atomic
from engine.params import MAX_SIZE, ModelShape, count_parameters
from kernels.bounded import EXPRESSIONS
from kernels.canonical import canonicalize
from kernels.expression import Expression, ExpressionError, parse_expression, parse_layers
from kernels.widths import check_policy, check_weights

FORMAT = 1
MAX_STACK = 64
MAX_LAYERS = 256
MAX_RATIO_DENOMINATOR = 64
_MAX_FILE_BYTES = 1 << 22
_MAX_PARAMS = 1 << 62


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What the search decides for one layer.

    Attributes:
        expression: FFN body; wb1 and wb2 once each. Widths are checked where the model's sizes are known.
        stack: n, FFNs after the attention block, 1..64.
        ratio: expansion ratio r = 1/k, k in 1..64.

    Raises:
        UserError: a field has the wrong type or range.
    """

    expression: Expression
    stack: int
    ratio: Fraction

    def __post_init__(self) -> None:
        if not isinstance(self.expression, Expression):
            raise UserError(f"expression: must be an Expression, got {type(self.expression).__name__}")
        try:
            check_weights(self.expression)
        except ExpressionError as error:
            raise UserError(f"expression: {error}") from error
        check_stack(self.stack)
        object.__setattr__(self, "ratio", parse_ratio(self.ratio))

    def __str__(self) -> str:
        return self.expression.text(self.stack, self.ratio)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One `LayerSpec` per layer, input side first. Immutable, hashable, compared by structure."""

    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise UserError(f"layers: an architecture has 1 to {MAX_LAYERS} layers, got {len(self.layers)}")
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, LayerSpec):
                raise UserError(f"layers[{index}]: must be a LayerSpec, got {type(layer).__name__}")

    def __str__(self) -> str:
        return ", ".join(self.texts())

    def __len__(self) -> int:
        return len(self.layers)

    def texts(self) -> list[str]:
        """Layer texts in the published form, e.g. `linear4_2(gelu(linear4_2(x,wb1)),wb2)`."""
        return [str(layer) for layer in self.layers]

    def key(self, policy: str = "truncate") -> str:
        """Canonical key: equal keys mean the same function, layer by layer, under this width policy."""
        check_policy(policy)
        keys = (_layer_key(s.expression, s.stack, s.ratio.denominator) for s in self.layers)
        return f"{policy}: " + ", ".join(keys)

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """Reads layer texts joined by commas, each carrying stack and ratio (`linear4_2(...)`).

        Raises:
            UserError: the text is not an expression list, or a layer lacks stack and ratio.
        """
        try:
            layers = parse_layers(text)
        except ExpressionError as error:
            raise UserError(f"architecture: {error}") from error
        specs = []
        for index, layer in enumerate(layers):
            if layer.stack is None or layer.ratio is None:
                raise UserError(
                    f"architecture: layer {index} has no stack and ratio; write linearN_K for stack N and ratio 1/K"
                )
            specs.append(_named(f"layers[{index}].", LayerSpec, layer.expression, layer.stack, layer.ratio))
        return cls(tuple(specs))

    def to_dict(self, shape: ModelShape, *, fit_dense: bool = True) -> dict[str, Any]:
        """The file's content; `params` by formula for a student of these sizes. Raises `UserError` as it does."""
        return {
            "format": FORMAT,
            "hidden_size": shape.hidden_size,
            "num_layers": len(self.layers),
            "layers": [
                {"expression": str(s.expression), "stack": s.stack, "ratio": [s.ratio.numerator, s.ratio.denominator]}
                for s in self.layers
            ],
            "params": count_parameters(self, shape, fit_dense=fit_dense),
        }

    @classmethod
    def from_dict(cls, data: Any, *, shape: ModelShape | None = None) -> Architecture:
        """Reads the file's content; with `shape`, hidden size and number of layers must agree with it.

        Raises:
            UserError: a field is missing, unknown, of the wrong type or out of range; the message names it.
        """
        _fields("architecture", data, ("format", "hidden_size", "num_layers", "layers", "params"))
        version = _integer("format", data["format"], 0, MAX_SIZE)
        if version != FORMAT:
            raise UserError(f"format: {version} is not known; this version of ffnas reads format {FORMAT}")
        hidden = _integer("hidden_size", data["hidden_size"], 1, MAX_SIZE)
        count = _integer("num_layers", data["num_layers"], 1, MAX_LAYERS)
        _integer("params", data["params"], 0, _MAX_PARAMS)
        layers = data["layers"]
        if not isinstance(layers, list):
            raise UserError(f"layers: must be a list, got {_kind(layers)}")
        if len(layers) != count:
            raise UserError(f"layers: holds {len(layers)} entries, but num_layers is {count}")
        if shape is not None and (shape.hidden_size, shape.num_layers) != (hidden, count):
            raise UserError(
                f"hidden_size, num_layers: the file has {hidden}, {count}, the model {shape.hidden_size},"
                f" {shape.num_layers}; use an architecture found for these sizes"
            )
        return cls(tuple(_layer_from(f"layers[{index}]", layer) for index, layer in enumerate(layers)))

    def save(self, path: str | os.PathLike[str], shape: ModelShape, *, fit_dense: bool = True) -> None:
        """Writes the JSON file, whole or not at all."""
        write_json_atomic(path, self.to_dict(shape, fit_dense=fit_dense))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, shape: ModelShape | None = None) -> Architecture:
        """Reads the JSON file; see `from_dict`. Raises `UserError`, the file's name first in the message."""
        data = _read_json(Path(path))
        return _named(f"{path}: ", cls.from_dict, data, shape=shape)


def uniform(expression: Expression, stack: int, ratio: Fraction, num_layers: int) -> Architecture:
    """The architecture with the same spec in each of `num_layers` layers."""
    return Architecture((LayerSpec(expression, stack, ratio),) * num_layers)


@lru_cache(maxsize=EXPRESSIONS)
def _layer_key(expression: Expression, stack: int, divisor: int) -> str:
    return canonicalize(expression).text(stack, Fraction(1, divisor))


def check_stack(stack: Any) -> int:
    """Returns `stack` if it is an integer from 1 to 64; raises `UserError` otherwise."""
    return _integer("stack", stack, 1, MAX_STACK)


def parse_ratio(value: Any) -> Fraction:
    """An expansion ratio 1/k, k in 1..64, from a Fraction, 1, 0.25, "1/4" or [1, 4]. Raises `UserError`."""
    ratio: Fraction | None = None
    if isinstance(value, Fraction):
        ratio = value
    elif isinstance(value, (list, tuple)):
        if len(value) == 2 and all(_is_int(v) and 1 <= v <= MAX_SIZE for v in value):
            ratio = Fraction(value[0], value[1])
    elif _is_int(value):
        ratio = Fraction(value)
    elif isinstance(value, float) and math.isfinite(value):
        near = Fraction(value).limit_denominator(MAX_RATIO_DENOMINATOR)
        ratio = near if abs(near - Fraction(value)) < Fraction(1, 1000) else None
    elif isinstance(value, str) and len(value) <= 32:
        numerator, _, denominator = value.partition("/")
        parts = (numerator.strip(), (denominator or "1").strip())
        if all(p.isascii() and p.isdigit() for p in parts) and int(parts[1]):
            ratio = Fraction(int(parts[0]), int(parts[1]))
        else:
            return parse_ratio(_float_of(value))
    if ratio is None or ratio.numerator != 1 or ratio.denominator > MAX_RATIO_DENOMINATOR:
        shown = f"{value}" if isinstance(value, Fraction) else f"{value!r:.60}"
        raise UserError(f"ratio: must be 1/k with k from 1 to {MAX_RATIO_DENOMINATOR}, got {shown}")
    return ratio


def _float_of(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"ratio: must be 1/k, such as 1/2, got {text!r:.60}") from error


def _layer_from(name: str, data: Any) -> LayerSpec:
    _fields(name, data, ("expression", "stack", "ratio"))
    text, ratio = data["expression"], data["ratio"]
    if not isinstance(text, str):
        raise UserError(f"{name}.expression: must be text, got {_kind(text)}")
    if not isinstance(ratio, list):
        raise UserError(f"{name}.ratio: must be a list of two integers, got {_kind(ratio)}")
    try:
        expression = parse_expression(text)
    except ExpressionError as error:
        raise UserError(f"{name}.expression: {error}") from error
    return _named(f"{name}.", LayerSpec, expression, data["stack"], ratio)


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise UserError(f"{path}: larger than {_MAX_FILE_BYTES} bytes; this is not an architecture file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of an architecture file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; give the path of an architecture file") from error
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError as error:
        raise UserError(f"{path}: is nested too deeply for an architecture file") from error
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        raise UserError(f"{path}: is not an architecture file: {error}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {repeated!r:.60} is given twice")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number JSON knows")


def _fields(name: str, data: Any, fields: tuple[str, ...]) -> None:
    if not isinstance(data, Mapping):
        raise UserError(f"{name}: must be an object with the fields {', '.join(fields)}, got {_kind(data)}")
    for field in fields:
        if field not in data:
            raise UserError(f"{name}: field {field} is missing")
    for field in data:
        if field not in fields:
            raise UserError(f"{name}: unknown field {field!r:.60}; known fields are {', '.join(fields)}")


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not _is_int(value) or not low <= value <= high:
        shown = f"{value:.3g}" if isinstance(value, float) else _kind(value)
        raise UserError(f"{name}: must be an integer from {low} to {high}, got {shown}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    """A value as an error message shows it: itself if short, its kind if a container, "a huge integer" if so."""
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    if _is_int(value) and value.bit_length() > 128:
        return "a huge integer"
    return f"{value!r:.60}"


def _named(prefix: str, make: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls `make`, putting `prefix` before the message of a `UserError`."""
    try:
        return make(*args, **kwargs)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from error
