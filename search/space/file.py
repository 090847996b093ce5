"""Search spaces in YAML files: `--space.file my-space.yaml`, or the name of one that comes with the package.

    activations: [gelu_erf, relu2, softplus, identity]     binaries: [add, mul, max]     linears: [linear, kron]
    heights: [3, 6]     stacks: [1, 2]     ratios: [1, 1/2, 1/4]     policy: truncate
    layer_expressions: shared     layer_shapes: per-layer     kron_block: [8, 8]

Every field may be left out; it then has the value it has without a file. Files are read as hostile: plain YAML of
limited size, without anchors and aliases, each field checked by the space's own checks.

Rejected: Python files or entry points as spaces. A space is data; running somebody's file to read it is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from engine.errors import UserError
from search.space import options

_MAX_BYTES = 1 << 16
_MAX_DEPTH = 4

FIELDS: dict[str, Callable[[Any], Any]] = {
    "activations": lambda v: list(options.operators("activations", v, arity=1)),
    "binaries": lambda v: list(options.operators("binaries", v, arity=2)),
    "linears": lambda v: list(options.linears(v)),
    "heights": lambda v: list(options.heights(v)),
    "stacks": lambda v: list(options.stacks(v)),
    "ratios": lambda v: [str(r) for r in options.ratios(v)],
    "policy": options.policy,
    "layer_expressions": lambda v: options.sharing("layer_expressions", v),
    "layer_shapes": lambda v: options.sharing("layer_shapes", v),
    "kron_block": lambda v: v if v is None else list(options.kron_block(v) or ()),
}
"""Per field of a file (and of `search.config.schema.SpaceConfig`) what checks it and makes it plain."""


def space_names() -> list[str]:
    """Names of the spaces that come with the package."""
    folder = resources.files("search") / "presets" / "spaces"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_space(name: str) -> dict[str, Any]:
    """The fields that a file gives, checked: lists, texts and numbers as `SpaceConfig` takes them.

    Args:
        name: a path, or one of `space_names()`.

    Raises:
        UserError: there is no such file, or it is not a space; one line naming the file and the field.
    """
    path = _path(name)
    values = _load(path)
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path}: must give one or more of the fields {', '.join(FIELDS)}")
    for field in values:
        if field not in FIELDS:
            raise UserError(f"{path}: unknown field {field!r:.60}; known are {', '.join(FIELDS)}")
    try:
        return {field: FIELDS[field](value) for field, value in values.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _path(name: str) -> Path:
    if name in space_names():
        return Path(str(resources.files("search") / "presets" / "spaces" / f"{name}.yaml"))
    path = Path(name)
    if not path.is_file():
        raise UserError(f"space.file: {name!r:.200} is no file; give a path, or one of {', '.join(space_names())}")
    return path


def _load(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: larger than {_MAX_BYTES} bytes; this is not a search space")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text") from error
    try:
        _check_events(path, text)
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates and numbers out of range
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error


def _check_events(path: Path, text: str) -> None:
    """Refuses what makes small files into large objects."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise UserError(f"{path}: anchors and aliases are not read; write the values out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise UserError(f"{path}: is nested more than {_MAX_DEPTH} deep; this is not a search space")


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a field given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        repeated = [key for key in keys if keys.count(key) > 1]
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"field {repeated[0]!r:.60} is given twice")
        return super().construct_mapping(node, deep)
