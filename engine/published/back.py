"""Our models to EfficientBERT's published checkpoints.

The published code keeps every layer's FFNs at the full width and the largest stack, and slices them as it runs: a file
of a model that was sliced does not load there. The full-size form has zeros where the slice has nothing; they are
sliced away again, so that the outputs are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import UserError
from engine.published.files import MODULE
from engine.published.names import FFN, KINDS, published_name
from engine.published.presets import LAYER_NORM_EPS
from engine.student.modeling import FFNASPreTrainedModel
from kernels.language.expression import kron_weights

STORED_FFNS = 4
"""FFNs that the published code stores in every layer."""


def to_published(
    model: FFNASPreTrainedModel, *, task: str | None = None, module: bool = False, full: bool = False
) -> dict[str, Tensor]:
    """The published names and the tensors of a model of ours, copied to the CPU.

    Args:
        model: with a head that published checkpoints know.
        task: names the head `classifiers.TASK` instead of `classifier`.
        module: put `module.` in front of every name.
        full: every layer's FFNs as the published code stores them, zero-filled beyond what the model has.

    Raises:
        UserError: the model's class is not among `KINDS`, or it has something that published checkpoints do not.
    """
    if type(model) not in KINDS.values():
        known = ", ".join(c.__name__ for c in KINDS.values())
        raise UserError(f"model: published checkpoints know no {type(model).__name__}: give one of {known}")
    _require_publishable(model)
    result = {published_name(name): tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    if full:
        result |= _filled(model, result)
    if task is not None:
        heads = [name for name in result if name.startswith("classifier.")]
        result |= {f"classifiers.{task}.{name.removeprefix('classifier.')}": result.pop(name) for name in heads}
    return {f"{MODULE if module else ''}{name}": tensor for name, tensor in result.items()}


def differences(model: FFNASPreTrainedModel) -> list[str]:
    """What the published code computes otherwise with this model's weights, one line each."""
    eps = model.config.layer_norm_eps
    if eps == LAYER_NORM_EPS:
        return []
    return [
        f"the model's LayerNorm epsilon is {eps:g}, the published code's {LAYER_NORM_EPS:g}: answers differ a little"
    ]


def _filled(model: FFNASPreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The FFNs of all layers at the full width, and those beyond a layer's stack."""
    hidden, width = model.config.hidden_size, model.config.intermediate_size
    layers = model.config.full_architecture.layers
    stack = max(STORED_FFNS, *(layer.stack for layer in layers))
    shapes = {
        "dense1.weight": (width, hidden),
        "dense1.bias": (width,),
        "dense2.weight": (hidden, width),
        "dense2.bias": (hidden,),
        "layernorm.weight": (hidden,),
        "layernorm.bias": (hidden,),
    }
    filled = {}
    for index in range(len(layers)):
        for number in range(stack):
            for part, shape in shapes.items():
                name = f"encoder.{index}.all_ffn.{number}.{part}"
                assert FFN.fullmatch(name)
                filled[name] = torch.zeros(shape)
                if name in tensors:
                    filled[name][tuple(slice(size) for size in tensors[name].shape)] = tensors[name]
    return filled


def _require_publishable(model: FFNASPreTrainedModel) -> None:
    config = model.config
    for field, allowed in (
        ("embedding_type", ("trigram", "full")),
        ("pooling", ("cls",)),
        ("pooler_activation", ("tanh",)),
    ):
        value = getattr(config, field)
        if value not in allowed:
            raise UserError(f"model: published checkpoints know no {field} {value!r}, only {' or '.join(allowed)}")
    for index, layer in enumerate(config.full_architecture.layers):
        if layer.heads is not None or layer.stack == 0 or kron_weights(layer.expression):
            raise UserError(
                f"model: layer {index} ({layer}) is none of the published space: published checkpoints know no layers"
                " without FFN, with some of the heads or with Kronecker weights"
            )
