"""Reading values out of JSON objects that somebody may have damaged: a wrong one is named with its file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import UserError

_KINDS = {int: "an integer", float: "a number", str: "text", dict: "an object", list: "a list"}


def field_of(path: Path, parent: Any, name: str, kind: type, prefix: str = "") -> Any:
    """`parent[name]` if it is of `kind` (a float may be written as an integer and must be finite).

    Raises:
        UserError: it is missing or of another kind; `prefix` is what stands before the name in the message.
    """
    value = parent.get(name) if isinstance(parent, Mapping) else None
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{path}: {prefix}{name}: must be {_KINDS[kind]}, got {value!r:.60}")
    return value
