"""Exports a found model as an ordinary Hugging Face directory.

    model.safetensors config.json      weights of the subnet alone, without `fit_dense`; labels in the config
    modeling_ffnas.py, ...             the model in plain PyTorch, for `trust_remote_code=True` (`engine.handover`)
    tokenizer files                    its length limit lowered to the model's positions
    README.md, architecture.png        model card (`engine.export.card`) and the drawing in it
    architecture.json                  the architecture file, if asked for

The directory appears whole or not at all, and loads with ffnas installed and without. Rejected: writing the supernet
with an architecture beside it. The files would be several times larger, and every reader would have to slice them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from engine.architecture.architecture import Architecture
from engine.architecture.file import save_architecture
from engine.export.card import model_card
from engine.files import atomic_directory, write_text_atomic
from engine.handover import auto_map
from engine.student.configuration import FFNASConfig
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.supernet import extract

DRAWING = "architecture.png"


def export_model(
    model: FFNASPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: str | os.PathLike[str],
    architecture: Architecture | None,
    card: Mapping[str, Any],
    *,
    architecture_file: bool = False,
    fit_dense: bool = False,
    drawing: bytes | None = None,
) -> None:
    """Writes `architecture` of `model` to the directory `out_dir`, replacing it if it exists.

    Args:
        model: a student or supernet; not changed.
        tokenizer: saved beside the model; None writes none.
        out_dir: the directory.
        architecture: the subnet to write, None for everything stored.
        card: for the model card, see `engine.export.card.model_card`.
        architecture_file: also write `architecture.json`.
        fit_dense: keep the distillation projection.
        drawing: PNG of the architecture for the model card.

    Raises:
        UserError: `model` does not store the architecture, or it cannot be written as plain PyTorch code.
        OSError: the directory cannot be written.
    """
    exported = extract(model, architecture, fit_dense=fit_dense).eval()
    exported.config.auto_map = auto_map(type(exported).__name__)  # what it names is written with the configuration
    with atomic_directory(out_dir) as folder:
        exported.save_pretrained(folder)
        if tokenizer is not None:
            _limited(tokenizer, exported.config).save_pretrained(folder)
        if drawing is not None:
            (folder / DRAWING).write_bytes(drawing)
        text = model_card(exported, card, drawing=None if drawing is None else DRAWING)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if architecture_file:
            config = exported.config
            save_architecture(config.full_architecture, folder / "architecture.json", config.shape)


def rewrite_card(model: FFNASPreTrainedModel, out_dir: str | os.PathLike[str], card: Mapping[str, Any]) -> None:
    """Writes the model card of a directory that `export_model` wrote for all of `model` again; `card` as there.

    Raises:
        OSError: the directory cannot be written.
    """
    folder = Path(out_dir)
    drawing = DRAWING if (folder / DRAWING).is_file() else None
    write_text_atomic(folder / "README.md", model_card(extract(model, None), card, drawing=drawing))


def _limited(tokenizer: PreTrainedTokenizerBase, config: FFNASConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with a length limit the model can take, so that truncation in pipelines works."""
    if tokenizer.model_max_length <= config.max_position_embeddings:
        return tokenizer
    limited = copy.deepcopy(tokenizer)
    limited.model_max_length = config.max_position_embeddings
    return limited
