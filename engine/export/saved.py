"""Loads an exported model directory as the class that wrote it, on our own code (never the directory's)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError

from engine import student
from engine.errors import UserError
from engine.student.modeling import FFNASPreTrainedModel


def load_saved(folder: str | os.PathLike[str]) -> FFNASPreTrainedModel:
    """The model of a directory that `export_model` or `save_pretrained` wrote, in float32 and eval mode.

    Raises:
        UserError: there is none, it is another kind of model, or its files are damaged.
    """
    path = Path(folder)
    try:
        names = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model {path}: no readable config.json with `architectures`: give a model directory"
        ) from error
    known = [
        name
        for name in student.__all__
        if name.startswith("FFNAS") and not name.endswith(("Config", "PreTrainedModel"))
    ]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in known:
        raise UserError(f"model {path}: {names!r:.80} is none of ffnas' models: give a directory of one of theirs")
    try:
        made, report = getattr(student, names[0]).from_pretrained(path, local_files_only=True, output_loading_info=True)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"model {path}: cannot be loaded ({reason:.160})") from error
    if made.base_model is made and any(name.startswith("cls_pooler.") for name in report["missing_keys"]):
        made.cls_pooler = None  # an encoder that was saved without one, and was given a random one here
    return made.eval()
