"""Writes a model for `kernels.runtime`: one folder that answers texts without PyTorch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from transformers import PreTrainedTokenizerBase

from engine.errors import UserError
from engine.files import atomic_directory
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.native import describe
from kernels.runtime.folder import TOKENIZER, WEIGHTS
from kernels.runtime.writing import files


def write_native(
    model: FFNASPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    measured: Mapping[str, Any] | None = None,
) -> None:
    """Writes the folder, whole or not at all, over one that is there.

    Args:
        model, tokenizer: what it answers with; without a tokenizer it takes ids alone.
        folder: where.
        precision: of matrix products, where a session is not asked for another; weights are float32 in any case.
        measured: what that precision costs, for the folder's ffnas.json.

    Raises:
        UserError: the model cannot be described, or its tokenizer has no form of the tokenizers library.
        OSError: the folder cannot be written.
    """
    longest = None if tokenizer is None else int(min(tokenizer.model_max_length, 2**20))
    description, arrays = describe(model, longest)
    mask = getattr(tokenizer, "mask_token", None)
    if description.answers.head == "mask" and mask:
        description = description._replace(answers=description.answers._replace(mask_token=str(mask)))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is not None and backend is None:
        raise UserError(f"--native: {type(tokenizer).__name__} is no fast tokenizer; convert it, or use --onnx")
    weights = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
    description = description._replace(answers=description.answers._replace(precision=precision))
    extra: dict[str, Any] = {"model_type": model.config.model_type, "class": type(model).__name__}
    if measured is not None:
        extra["measured"] = dict(measured)
    with atomic_directory(folder) as made:
        Path(made, WEIGHTS).write_bytes(weights)
        for name, content in files(description, weights, extra).items():
            Path(made, name).write_bytes(content)
        if backend is not None:
            Path(made, TOKENIZER).write_text(backend.to_str(pretty=False), encoding="utf-8")
