"""How a sentence-transformers folder makes one vector of a text: its `modules.json` and the pooling module's own file.

Other checkpoints have no such files; nothing is guessed for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import UserError

_MODULES = "modules.json"
_DEFAULT = "1_Pooling"


def sentence_pooling(folder: Path) -> str | None:
    """`"mean"` or `"cls"`; None where the folder says nothing, or pools in another way.

    Args:
        folder: of the model.

    Raises:
        UserError: the files are there and cannot be read.
    """
    pooling = _pooling_folder(folder)
    if pooling is None or not (pooling / "config.json").is_file():
        return None
    values = _read(pooling / "config.json")
    if not isinstance(values, dict):
        return None
    named = values.get("pooling_mode")  # one name since version 5, before that a switch for each
    if named is None:
        on = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
        named = {("pooling_mode_mean_tokens",): "mean", ("pooling_mode_cls_token",): "cls"}.get(tuple(on))
    return named if named in ("mean", "cls") else None


def _pooling_folder(folder: Path) -> Path | None:
    """Where the pooling module's file is."""
    if not (folder / _MODULES).is_file():
        return folder / _DEFAULT
    modules = _read(folder / _MODULES)
    for module in modules if isinstance(modules, list) else ():
        if isinstance(module, dict) and str(module.get("type", "")).endswith(".Pooling"):
            path = Path(str(module.get("path", "")))
            return None if path.is_absolute() or ".." in path.parts else folder / path
    return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"teacher: {path} cannot be read ({type(error).__name__}): fetch the model again") from error
