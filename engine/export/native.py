"""Writes a model for `kernels.runtime`: one folder that answers texts without PyTorch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engine.errors import UserError
from engine.files import atomic_directory
from engine.student.configuration import FFNASConfig
from engine.student.ffn import may_read
from engine.student.heads import FFNASForQuestionAnswering, FFNASForSequenceClassification
from engine.student.modeling import FFNASModel, FFNASPreTrainedModel
from kernels import readable
from kernels.ffn.modules import KronLinear
from kernels.runtime.description import FILE, TOKENIZER, WEIGHTS, Description, Layer

Arrays = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def describe(model: FFNASPreTrainedModel, max_length: int | None = None) -> tuple[Description, Arrays]:
    """A model as the runtime takes it; arrays are copies in float32.

    Args:
        model: an encoder, or one with a head for classes, numbers or answer spans.
        max_length: tokens per text; None for the model's positions.

    Raises:
        UserError: the model has another head, layers that are more than their parameters (adapters, hooks), or a
            decoder's mask filling.
    """
    base = model.base_model
    config: FFNASConfig = model.config
    head, classifier = _head(model)
    pooler = base.cls_pooler
    pooling = "none" if pooler is None else config.pooling
    plans = base.planner.full
    layers, arrays = [], _embeddings(base)
    for index, (layer, plan) in enumerate(zip(base.encoder, plans, strict=True)):
        heads = layer.heads(plan)
        layers.append(Layer(heads, plan.stack, plan.inner if plan.stack else 0, _words(plan) if plan.stack else ()))
        if heads:
            attention = layer.attention
            for part in ("query", "key", "value"):
                arrays |= _dense(f"layers.{index}.{part}", getattr(attention, part))
            arrays |= _dense(f"layers.{index}.output", attention.dense) | _dense(
                f"layers.{index}.norm", attention.layernorm
            )
        may_read(list(layer.all_ffn), plan.inner, "an export without PyTorch")
        for number, ffn in enumerate(layer.all_ffn):
            name = f"layers.{index}.ffn.{number}"
            arrays |= _dense(f"{name}.first", ffn.dense1) | _dense(f"{name}.second", ffn.dense2)
            arrays |= _dense(f"{name}.norm", ffn.layernorm)
    if pooling == "cls":
        arrays |= _dense("pooler", pooler.dense)
    if classifier is not None:
        arrays |= _dense("classifier", classifier)
    positions = config.max_position_embeddings
    description = Description(
        hidden_size=config.hidden_size,
        head_size=config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        positions=positions,
        types=config.type_vocab_size,
        eps=float(config.layer_norm_eps),
        layers=tuple(layers),
        embedding=config.embedding_type,
        token_width=config.token_width,
        pooling=pooling,
        activation=getattr(config, "pooler_activation", "tanh"),
        head=head,
        labels=_labels(model, head),
        regression=config.problem_type == "regression" or (head == "sequence" and config.num_labels == 1),
        max_length=min(positions, max_length or positions),
        extra={"model_type": config.model_type, "class": type(model).__name__},
    )
    return description, arrays


def write_native(
    model: FFNASPreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | os.PathLike[str]
) -> None:
    """Writes the folder, whole or not at all, over one that is there.

    Raises:
        UserError: the model cannot be described, or its tokenizer has no form of the tokenizers library.
        OSError: the folder cannot be written.
    """
    longest = None if tokenizer is None else int(min(tokenizer.model_max_length, 2**20))
    description, arrays = describe(model, longest)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is not None and backend is None:
        raise UserError(f"--native: {type(tokenizer).__name__} is no fast tokenizer; convert it, or use --onnx")
    weights = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
    values = {**description.to_json(), "sha256": hashlib.sha256(weights).hexdigest()}
    with atomic_directory(folder) as made:
        Path(made, WEIGHTS).write_bytes(weights)
        Path(made, FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        if backend is not None:
            Path(made, TOKENIZER).write_text(backend.to_str(pretty=False), encoding="utf-8")


def _head(model: FFNASPreTrainedModel) -> tuple[str, nn.Linear | None]:
    if isinstance(model, FFNASForSequenceClassification):
        return "sequence", model.classifier
    if isinstance(model, FFNASForQuestionAnswering):
        return "tokens", model.qa_outputs
    if isinstance(model, FFNASModel):
        return "none", None
    raise UserError(
        f"--native: {type(model).__name__} is not supported; encoders are, alone or with a head for classes, numbers or"
        " answer spans. Use --onnx"
    )


def _labels(model: FFNASPreTrainedModel, head: str) -> tuple[str, ...]:
    if head == "tokens":
        return ("start", "end")
    names = model.config.id2label
    return tuple(str(names[i]) for i in range(model.config.num_labels)) if head == "sequence" else ()


def _embeddings(base: FFNASModel) -> Arrays:
    found, arrays = base.embeddings, {}
    tables = {"token": found.token_embeddings, "position": found.position_embeddings, "type": found.segment_embeddings}
    for name, table in tables.items():
        if not readable.are_readable(table) or table.max_norm is not None:
            raise UserError(f"--native: the {name} embeddings are more than a table ({type(table).__name__})")
        arrays[f"embeddings.{name}"] = _array(table.weight)
    if found.dense is not None:
        arrays |= _dense("embeddings.dense", found.dense)
    return arrays | _dense("embeddings.norm", found.layernorm)


def _dense(name: str, layer: nn.Module) -> Arrays:
    """Weight and bias of a linear layer or LayerNorm; Kronecker products multiplied out."""
    if not readable.are_readable(layer):
        raise UserError(
            f"--native: {name} has hooks, adapters or another class ({type(layer).__name__}); merge them first"
        )
    weight = layer.weight.whole() if isinstance(layer, KronLinear) else layer.weight
    return {f"{name}.weight": _array(weight), f"{name}.bias": _array(layer.bias)}


def _array(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy().copy()


def _words(plan: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in plan.program.words)
