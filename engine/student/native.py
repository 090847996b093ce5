"""A model as `kernels.runtime` takes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from engine.errors import UserError
from engine.student.ffn import may_read
from kernels import readable
from kernels.ffn.modules import KronLinear
from kernels.runtime.description import ACTIVATIONS, Answers, Description, Layer

Arrays = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def is_described(model: nn.Module) -> bool:
    """Whether `describe` knows models of this class."""
    return getattr(model, "native_head", None) is not None


def describe(model: PreTrainedModel, max_length: int | None = None, *, copy: bool = True) -> tuple[Description, Arrays]:
    """A model as the runtime takes it; arrays are in float32.

    Args:
        model: an encoder, or one with a head of any kind.
        max_length: tokens per text; None for the model's positions.
        copy: False for arrays that are the parameters' own memory, where those are float32 on the CPU.

    Raises:
        UserError: the model has another head, or layers that are more than their parameters (adapters, hooks).
    """
    head = _head(model)
    base: Any = model.base_model  # an `FFNASModel`, whose file imports this one
    config: Any = model.config
    pooler = base.cls_pooler
    pooling = "none" if pooler is None else config.pooling
    plans = base.planner.full
    eps = float(config.layer_norm_eps)
    layers, arrays = [], _embeddings(base, eps)
    for index, (layer, plan) in enumerate(zip(base.encoder, plans, strict=True)):
        heads = layer.heads(plan)
        layers.append(Layer(heads, plan.stack, plan.inner if plan.stack else 0, _words(plan) if plan.stack else ()))
        if heads:
            attention = layer.attention
            for part in ("query", "key", "value"):
                arrays |= _dense(f"layers.{index}.{part}", getattr(attention, part))
            if attention.scaling != attention.head_size**-0.5:
                raise UserError(f"native: layers[{index}] scales its attention by {attention.scaling:g}")
            arrays |= _dense(f"layers.{index}.output", attention.dense)
            arrays |= _norm(f"layers.{index}.norm", attention.layernorm, eps)
        may_read(list(layer.all_ffn), plan.inner, "an export without PyTorch")
        for number, ffn in enumerate(layer.all_ffn):
            name = f"layers.{index}.ffn.{number}"
            arrays |= _dense(f"{name}.first", ffn.dense1) | _dense(f"{name}.second", ffn.dense2)
            arrays |= _norm(f"{name}.norm", ffn.layernorm, layer.all_ffn.eps)
        if layer.all_ffn.eps != eps:
            raise UserError(f"native: layers[{index}] has epsilon {layer.all_ffn.eps:g}, the model {eps:g}")
    if pooling == "cls":
        arrays |= _dense("pooler", pooler.dense)
    arrays |= _head_arrays(model, head, eps)
    tied = head == "mask" and arrays["classifier.weight"] is arrays["embeddings.token"]
    if tied:
        del arrays["classifier.weight"]
    positions = config.max_position_embeddings
    description = Description(
        answers=Answers(
            hidden_size=config.hidden_size,
            positions=positions,
            head=head,
            pools=pooling != "none",
            labels=_labels(model, head),
            regression=config.problem_type == "regression" or (head == "sequence" and config.num_labels == 1),
            max_length=min(positions, max_length or positions),
            sentence="mean" if config.pooling == "mean" else "cls",
        ),
        head_size=config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        types=config.type_vocab_size,
        eps=eps,
        layers=tuple(layers),
        embedding=config.embedding_type,
        token_width=config.token_width,
        pooling=pooling,
        activation=pooler.activation if pooling == "cls" else ACTIVATIONS[0],
        head_width=model.lm_head.dense.out_features if head == "mask" else 0,
        tied=tied,
    )
    return description, {name: _array(tensor, copy) for name, tensor in arrays.items()}


def _head(model: Any) -> str:
    if not is_described(model):
        raise UserError(
            f"native: {type(model).__name__} is not supported; encoders are, alone or with a head for classes, numbers,"
            " tokens, answer spans, masks or choices. Use --onnx"
        )
    if getattr(model, "transitions", None) is not None:
        raise UserError(
            "native: the transitions of a CRF are not in the runtime, and tags without them are others; train"
            " --data.kind tokens, or use --onnx, whose output `answer` has them"
        )
    return str(model.native_head)


def _head_arrays(model: Any, head: str, eps: float) -> dict[str, Tensor]:
    if head == "none":
        return {}
    if head != "mask":
        return _dense("classifier", getattr(model, model.native_scores))
    found = model.lm_head
    if not readable.is_untouched(found):
        raise UserError("native: lm_head has hooks or a forward of its own; take them away first")
    before = _dense("head.dense", found.dense) | _norm("head.norm", found.layernorm, eps)
    return before | _dense("classifier", found.decoder)


def _labels(model: Any, head: str) -> tuple[str, ...]:
    if head in ("none", "mask"):
        return ()
    if head == "choice":
        return ("score",)
    if model.native_labels is not None:
        return tuple(model.native_labels)
    names = model.config.id2label
    return tuple(str(names[i]) for i in range(model.config.num_labels))


def _embeddings(base: Any, eps: float) -> dict[str, Tensor]:
    found, arrays = base.embeddings, dict[str, Tensor]()
    tables = {"token": found.token_embeddings, "position": found.position_embeddings, "type": found.segment_embeddings}
    for name, table in tables.items():
        if not readable.are_readable(table) or table.max_norm is not None:
            raise UserError(f"native: the {name} embeddings are more than a table ({type(table).__name__})")
        arrays[f"embeddings.{name}"] = table.weight
    if found.dense is not None:
        arrays |= _dense("embeddings.dense", found.dense)
    return arrays | _norm("embeddings.norm", found.layernorm, eps)


def _dense(name: str, layer: Any) -> dict[str, Tensor]:
    """Weight and bias of a linear layer; Kronecker products multiplied out."""
    if not readable.are_readable(layer) or layer.bias is None:
        raise UserError(
            f"native: {name} has hooks, adapters, no bias, or another class ({type(layer).__name__}); merge what there"
            " is first"
        )
    weight = layer.weight.whole() if isinstance(layer, KronLinear) else layer.weight
    return {f"{name}.weight": weight, f"{name}.bias": layer.bias}


def _norm(name: str, layer: Any, eps: float) -> dict[str, Tensor]:
    """Weight and bias of a LayerNorm, which has to have the model's epsilon."""
    if not readable.are_readable(layer) or layer.weight is None or layer.bias is None or layer.eps != eps:
        raise UserError(
            f"native: {name} ({type(layer).__name__}) has hooks, no weight or bias, or another epsilon than the model's"
            f" {eps:g}"
        )
    return {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}


def _array(tensor: Tensor, copy: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    found = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return found.copy() if copy else found


def _words(plan: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in plan.program.words)
