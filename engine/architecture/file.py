"""The architecture file: JSON, format 1 or 2.

    {"format": 1, "hidden_size": 540, "num_layers": 6,
     "layers": [{"expression": "linear(gelu(linear(x,wb1)),wb2)", "stack": 4, "ratio": [1, 2]}, ...],
     "params": 15737724}

Format 2 has `"heads"` in layers that keep some of the heads, stack 0 in those without FFN, and ratios other than 1/k.
It is written only for architectures that have one of these; versions that read format 1 alone then say so.

`params` is written from the formula and read back only as a number: sizes it depends on (vocabulary, teacher width)
are not in the file. Files are read as hostile: each field is checked and a `UserError` names the one that is wrong.
Rejected: a schema library. One shape of file does not repay the dependency, and its errors run over many lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.architecture.architecture import (
    MAX_LAYERS,
    Architecture,
    LayerSpec,
    check_stack,
    checked_integer,
    named_errors,
    parse_unit_ratio,
    shown_kind,
)
from engine.architecture.params import count_parameters
from engine.architecture.shape import MAX_SIZE, ModelShape
from engine.errors import UserError
from engine.files import write_json_atomic
from kernels.language.expression import ExpressionError, parse_expression

FORMATS = (1, 2)
_MAX_FILE_BYTES = 1 << 22
_MAX_PARAMS = 1 << 62


def architecture_to_dict(architecture: Architecture, shape: ModelShape, *, fit_dense: bool = True) -> dict[str, Any]:
    """The file's content; `params` by formula for a student of these sizes. Raises `UserError` as the formula does."""
    return {
        "format": _format_of(architecture),
        "hidden_size": shape.hidden_size,
        "num_layers": len(architecture.layers),
        "layers": layers_to_list(architecture),
        "params": count_parameters(architecture, shape, fit_dense=fit_dense),
    }


def layers_to_list(architecture: Architecture) -> list[dict[str, Any]]:
    """The file's `layers`."""
    return [
        {"expression": str(s.expression), "stack": s.stack, "ratio": [s.ratio.numerator, s.ratio.denominator]}
        | ({} if s.heads is None else {"heads": s.heads})
        for s in architecture.layers
    ]


def layers_from_list(layers: list[Any], version: int = FORMATS[-1]) -> Architecture:
    """Reads the file's `layers`. Raises `UserError`: a field is wrong; the message names it."""
    return Architecture(tuple(_layer_from(f"layers[{index}]", layer, version) for index, layer in enumerate(layers)))


def architecture_from_dict(data: Any, *, shape: ModelShape | None = None) -> Architecture:
    """Reads the file's content; with `shape`, hidden size and number of layers must agree with it.

    Raises:
        UserError: a field is missing, unknown, of the wrong type or out of range; the message names it.
    """
    _fields("architecture", data, ("format", "hidden_size", "num_layers", "layers", "params"))
    version = checked_integer("format", data["format"], 0, MAX_SIZE)
    if version not in FORMATS:
        raise UserError(f"format: {version} is not known; this version of ffnas reads formats 1 and 2")
    hidden = checked_integer("hidden_size", data["hidden_size"], 1, MAX_SIZE)
    count = checked_integer("num_layers", data["num_layers"], 1, MAX_LAYERS)
    checked_integer("params", data["params"], 0, _MAX_PARAMS)
    layers = data["layers"]
    if not isinstance(layers, list):
        raise UserError(f"layers: must be a list, got {shown_kind(layers)}")
    if len(layers) != count:
        raise UserError(f"layers: holds {len(layers)} entries, but num_layers is {count}")
    if shape is not None and (shape.hidden_size, shape.num_layers) != (hidden, count):
        raise UserError(
            f"hidden_size, num_layers: the file has {hidden}, {count}, the model {shape.hidden_size},"
            f" {shape.num_layers}; use an architecture found for these sizes"
        )
    return layers_from_list(layers, version)


def save_architecture(
    architecture: Architecture, path: str | os.PathLike[str], shape: ModelShape, *, fit_dense: bool = True
) -> None:
    """Writes the JSON file, whole or not at all."""
    write_json_atomic(path, architecture_to_dict(architecture, shape, fit_dense=fit_dense))


def load_architecture(path: str | os.PathLike[str], *, shape: ModelShape | None = None) -> Architecture:
    """Reads the JSON file. Raises `UserError` as `architecture_from_dict`, the file's name first in the message."""
    data = _read_json(Path(path))
    return named_errors(f"{path}: ", architecture_from_dict, data, shape=shape)


def names_file(given: str) -> bool:
    """Whether what a user gave for an architecture is a file's path rather than its text, which may be too long for a
    path."""
    try:
        return Path(given).is_file()
    except OSError:
        return False


def _format_of(architecture: Architecture) -> int:
    plain = (s.stack and s.heads is None and s.ratio.numerator == 1 for s in architecture.layers)
    return 1 if all(plain) else 2


def _layer_from(name: str, data: Any, version: int) -> LayerSpec:
    _fields(name, data, ("expression", "stack", "ratio"), ("heads",) if version > 1 else ())
    text, ratio = data["expression"], data["ratio"]
    if not isinstance(text, str):
        raise UserError(f"{name}.expression: must be text, got {shown_kind(text)}")
    if not isinstance(ratio, list):
        raise UserError(f"{name}.ratio: must be a list of two integers, got {shown_kind(ratio)}")
    try:
        expression = parse_expression(text)
    except ExpressionError as error:
        raise UserError(f"{name}.expression: {error}") from error
    if version == 1:
        named_errors(f"{name}.", check_stack, data["stack"])
        named_errors(f"{name}.", parse_unit_ratio, ratio)
    return named_errors(f"{name}.", LayerSpec, expression, data["stack"], ratio, data.get("heads"))


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


def _fields(name: str, data: Any, fields: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    if not isinstance(data, Mapping):
        raise UserError(f"{name}: must be an object with the fields {', '.join(fields)}, got {shown_kind(data)}")
    for field in fields:
        if field not in data:
            raise UserError(f"{name}: field {field} is missing")
    for field in data:
        if field not in fields and field not in optional:
            known = ", ".join((*fields, *optional))
            raise UserError(f"{name}: unknown field {field!r:.60}; known fields are {known}")
