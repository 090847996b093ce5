"""Building students, and moving weights between a supernet and models of its subnets.

A supernet is a student whose layers are stored at the largest stack and ratio; `forward(architecture=...)` runs a
subnet of it on views. `extract` copies such a subnet out into a model of its own, `inherit` copies it into a model
that exists. Both take leading slices: FFN l, n the leading rows of `dense1` and columns of `dense2`, attention the
leading rows of queries, keys and values and columns of `dense`, everything else whole. So the copy computes bit for bit
what the views compute. Layers that are left out are not copied; the copy's `source_layers` says which it has.

A weight that is a Kronecker product in one and full in the other is converted (nearest product, or the product written
out; `kernels.ffn.kron`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from engine.architecture.architecture import Architecture
from engine.architecture.file import layers_to_list
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from engine.student.configuration import FFNASConfig
from engine.student.heads import FFNASForSequenceClassification
from engine.student.modeling import FFNASPreTrainedModel
from kernels.ffn.kron import KronWeight, nearest_kron
from kernels.language.expression import kron_weights, with_kron

if TYPE_CHECKING:
    from engine.data import TaskSpec

Student = TypeVar("Student", bound=FFNASPreTrainedModel)

_SLICED = re.compile(
    r"encoder\.\d+\.(all_ffn\.\d+\.dense(1\.(weight|bias|a)|2\.(weight|a))"
    r"|attention\.((query|key|value)\.(weight|bias)|dense\.weight))"
)
_LAYER = re.compile(r"(.*?encoder\.)(\d+)(\..*)")
_FACTORED = re.compile(r"(.*encoder\.\d+\.all_ffn\.\d+\.dense[12]\.)(weight|a|b)")


def build_student(
    shape: ModelShape,
    architecture: Architecture | None,
    heads: int,
    task: TaskSpec | None = None,
    *,
    policy: str = "truncate",
    model_class: type[Student] | None = None,
    seed: int | None = None,
    **config: Any,
) -> Student:
    """A freshly initialised student (or supernet: its largest architecture).

    Args:
        shape: sizes; `teacher_hidden_size` gives the model its `fit_dense`.
        architecture: what is stored; None is the plain GELU FFN, stack 1, ratio 1, in every layer.
        heads: number of attention heads; divides the hidden size.
        task: names the labels and the kind of problem.
        policy: width policy of binary operators.
        model_class: which head; None: the one for the task's kind (without a task: sequence classification).
        seed: initial weights as a function of it alone, torch's global generator left as it was; None uses and
            advances that generator.
        **config: other fields of `FFNASConfig`.

    Raises:
        UserError: the values do not fit together.
    """
    settings: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": heads,
        "intermediate_size": shape.ffn_size,
        "embedding_type": _embedding_type(shape),
        "embedding_size": shape.hidden_size if shape.embedding_size is None else shape.embedding_size,
        "layers": architecture,
        "width_policy": policy,
        "teacher_hidden_size": shape.teacher_hidden_size,
        "kron_block": None if shape.kron_block is None else list(shape.kron_block),
        "max_position_embeddings": shape.max_positions,
        "type_vocab_size": shape.type_vocab,
    }
    if task is not None:
        settings |= task.head.config_fields(task)
    made = FFNASConfig(**settings | config)
    if model_class is None:
        model_class = cast(
            "type[Student]", FFNASForSequenceClassification if task is None else task.head.student_class()
        )
    if seed is None:
        return model_class(made)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return model_class(made)


def extract(model: Student, architecture: Architecture | None, *, fit_dense: bool = False) -> Student:
    """The subnet `architecture` of `model` as a model of the same class with its own weights.

    Args:
        model: a student or supernet; not changed.
        architecture: what to take, None for everything stored.
        fit_dense: keep the distillation projection.

    Returns:
        A model whose outputs equal `model(..., architecture=architecture)`, on the same device, in the same dtype and
        mode (training or evaluation), without the layers that are left out. Kronecker weights of `architecture` that
        `model` stores as full ones are the nearest products; the other way round, the products.

    Raises:
        UserError: `model` does not store the architecture.
    """
    base = model.base_model
    base.planner(None if architecture is None else _as_stored(model, architecture))
    config = copy.deepcopy(model.config)
    taken = config.full_architecture if architecture is None else architecture
    kept = [index for index, layer in enumerate(taken.layers) if not layer.skipped]
    config.layers = layers_to_list(Architecture(tuple(taken.layers[index] for index in kept)))
    if len(kept) < len(taken.layers):
        config.num_hidden_layers = len(kept)
        config.source_layers = [_sources(model)[index] for index in kept]
    if not fit_dense:
        config.teacher_hidden_size = None
    with torch.device("meta"):
        target = type(model)(config, **constructor_options(model))
    wanted = target.state_dict()
    given = _Given(_renumbered(model.state_dict(), kept), {name: tensor.shape for name, tensor in wanted.items()})
    sliced = {name: given[name].clone() for name in wanted}
    target.load_state_dict(sliced, assign=True)
    target.tie_weights()
    return target.train(model.training)


@torch.no_grad()
def inherit(target: FFNASPreTrainedModel, source: FFNASPreTrainedModel) -> list[str]:
    """Copies into `target`, in place, the weights it shares with the supernet `source`.

    The two may have different heads: encoder weights go from encoder to encoder, head weights only where name and
    shape agree. Layers are matched by `source_layers` where a config names them. `fit_dense` and the pooler are copied
    where both have them.

    Returns:
        Names of target's parameters that `source` has no weights for, and that were left as they are.

    Raises:
        UserError: `target` is larger than `source`, or of other sizes.
    """
    own = {_encoder_name(target, name): (name, tensor) for name, tensor in target.state_dict().items()}
    stored = {_encoder_name(source, name): tensor for name, tensor in source.state_dict().items()}
    stored = _renumbered(stored, _matching_layers(target, source))
    given = _Given(stored, {inner: tensor.shape for inner, (_, tensor) in own.items()})
    left: list[str] = []
    copies: list[tuple[Tensor, Tensor]] = []
    for inner, (name, tensor) in own.items():
        in_encoder = inner.startswith(("embeddings.", "encoder."))
        if in_encoder and inner not in given:
            raise UserError(
                f"inherit: the supernet stores no {inner}; use a supernet with larger stacks or more layers"
            )
        if inner not in given or (not in_encoder and stored[inner].shape != tensor.shape):
            left.append(name)
            continue
        copies.append((tensor, given[inner]))
    for tensor, value in copies:
        tensor.copy_(value)
    return left


def _matching_layers(target: FFNASPreTrainedModel, source: FFNASPreTrainedModel) -> list[int]:
    """Which of the layers of `source` each of `target` is. Raises `UserError`: there is none, or heads differ."""
    sizes = [model.config.hidden_size // model.config.num_attention_heads for model in (target, source)]
    pruned = any(layer.heads is not None for m in (target, source) for layer in m.config.full_architecture.layers)
    if pruned and sizes[0] != sizes[1]:
        raise UserError(
            f"inherit: heads are {sizes[1]} wide in the supernet and {sizes[0]} in the model; build both with the same"
            " number of heads"
        )
    places = {layer: index for index, layer in enumerate(_sources(source))}
    missing = [layer for layer in _sources(target) if layer not in places]
    if missing:
        raise UserError(f"inherit: the supernet stores no encoder.{missing[0]}; use a supernet with more layers")
    return [places[layer] for layer in _sources(target)]


def _sources(model: FFNASPreTrainedModel) -> list[int]:
    """The numbers of a model's layers in the model they were taken from."""
    own = model.config.source_layers
    return list(range(model.config.num_hidden_layers)) if own is None else list(own)


def _renumbered(stored: Mapping[str, Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
    """A state dict whose layer l is layer `kept[l]` of `stored`."""
    places = {str(old): new for new, old in enumerate(kept)}
    renamed = {}
    for name, tensor in stored.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            renamed[name] = tensor
        elif match.group(2) in places:
            renamed[f"{match.group(1)}{places[match.group(2)]}{match.group(3)}"] = tensor
    return renamed


class _Given:
    """A state dict as another model needs it: leading parts, and Kronecker weights converted, by name.

    Args:
        stored: tensors by name.
        wanted: shapes by name, of the model they are for.
    """

    def __init__(self, stored: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> None:
        self.stored, self.wanted = stored, wanted
        self._nearest: dict[str, KronWeight] = {}

    def __contains__(self, name: str) -> bool:
        match = _FACTORED.fullmatch(name)
        return name in self.stored or (match is not None and self._has_weight(match.group(1)))

    def __getitem__(self, name: str) -> Tensor:
        match = _FACTORED.fullmatch(name)
        if match is None or (match.group(2) == "weight" and name in self.stored):
            return _leading(name, self.stored[name], self.wanted[name])
        prefix, part = match.groups()
        if part == "weight":
            return _leading(name, self._whole(prefix), self.wanted[name])
        if self._same_block(prefix):
            return _leading(name, self.stored[name], self.wanted[name])
        if prefix not in self._nearest:
            small = self.wanted[f"{prefix}b"]
            large = self.wanted[f"{prefix}a"]
            shape = torch.Size(m * n for m, n in zip(large, small, strict=True))
            full = _leading(f"{prefix}weight", self._whole(prefix), shape)
            self._nearest[prefix] = nearest_kron(full, (small[0], small[1]))
        return getattr(self._nearest[prefix], part)

    def _has_weight(self, prefix: str) -> bool:
        return f"{prefix}weight" in self.stored or f"{prefix}a" in self.stored

    def _same_block(self, prefix: str) -> bool:
        stored = self.stored.get(f"{prefix}b")
        return stored is not None and stored.shape == self.wanted[f"{prefix}b"]

    def _whole(self, prefix: str) -> Tensor:
        full = self.stored.get(f"{prefix}weight")
        return KronWeight(self.stored[f"{prefix}a"], self.stored[f"{prefix}b"]).whole() if full is None else full


def _as_stored(model: FFNASPreTrainedModel, architecture: Architecture) -> Architecture:
    """`architecture` with the Kronecker weights that `model` stores; as it is where the numbers of layers differ."""
    stored = model.config.full_architecture.layers
    if len(stored) != len(architecture.layers):
        return architecture
    return Architecture(
        tuple(
            replace(layer, expression=with_kron(layer.expression, kron_weights(own.expression)))
            for layer, own in zip(architecture.layers, stored, strict=True)
        )
    )


def _leading(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """The leading part of `tensor` of this shape; only FFN inner widths and numbers of heads may differ."""
    if tensor.shape == shape:
        return tensor
    smaller = all(small <= large for small, large in zip(shape, tensor.shape, strict=True))
    if not smaller or not _SLICED.search(name):
        raise UserError(
            f"inherit: {name} is {list(tensor.shape)} in the supernet and {list(shape)} in the model;"
            " build both with the same sizes, the supernet with the larger ratios"
        )
    return tensor[tuple(slice(size) for size in shape)]


def _encoder_name(model: FFNASPreTrainedModel, name: str) -> str:
    """A parameter's name without the encoder's prefix; head parameters keep theirs."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def constructor_options(model: FFNASPreTrainedModel) -> dict[str, bool]:
    """What the constructor of a model of this kind is given beside its config."""
    return {"add_pooling_layer": model.cls_pooler is not None} if model.base_model is model else {}


def _embedding_type(shape: ModelShape) -> str:
    if shape.embedding_size is None:
        return "full"
    return "trigram" if shape.trigram else "factorized"
