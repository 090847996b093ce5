"""EfficientBERT's published checkpoints to our models, and back.

A published file is a pickle with `state_dict`, of one model or of a supernet (all FFNs at the largest stack and
ratio), its names with or without `module.` in front:

    embeddings.{token,segment,position}_embeddings.weight   embeddings.dense.*   embeddings.layernorm.*
    encoder.L.attention.{query,key,value,dense,layernorm}.*  encoder.L.all_ffn.N.{dense1,dense2,layernorm}.*
    fit_dense.*   cls_pooler.dense.*   classifier.* or, of several tasks, classifiers.T.*

The arithmetic is ours where texts have a real token: LayerNorm with epsilon 1e-5 (which the config says), GELU in the
tanh form, trigrams with padding as a neighbour like any other, and a mask that adds -10000 to the scores of padding,
whose softmax underflows to the 0 that we compute.

Sizes are read from the tensors, FFNs are sliced to the architecture (leading rows of `dense1`, leading columns of
`dense2`, the first FFNs of a stack). A name that is not understood or not there is an error that lists it: a
checkpoint that loads by halves gives a model that is merely bad. Rejected: `load_state_dict(strict=False)`.

Only `torch.load(weights_only=True)` reads the files, so that a hostile one cannot run code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.shape import inner_width
from engine.errors import UserError
from engine.files import write_atomic
from engine.published.presets import LAYER_NORM_EPS
from engine.student.configuration import FFNASConfig
from engine.student.heads import FFNASForQuestionAnswering, FFNASForSequenceClassification
from engine.student.modeling import FFNASModel, FFNASPreTrainedModel

MODULE = "module."
RENAMED = (
    ("embeddings.", "ffnas.embeddings."),
    ("encoder.", "ffnas.encoder."),
    ("fit_dense.", "ffnas.fit_dense."),
    ("cls_pooler.", "ffnas.cls_pooler."),
    ("classifier.", "classifier."),
)
"""Published name, our name; what follows is the same. The head of question answering is our `qa_outputs`."""

KINDS: dict[str, type[FFNASPreTrainedModel]] = {
    "classification": FFNASForSequenceClassification,
    "question-answering": FFNASForQuestionAnswering,
    "encoder": FFNASModel,
}
_FFN = re.compile(r"encoder\.(\d+)\.all_ffn\.(\d+)\.(dense1|dense2|layernorm)\.(weight|bias)")
_TASK_HEAD = re.compile(r"classifiers\.([^.]+)\.(weight|bias)")


@dataclass(frozen=True)
class Converted:
    """A converted model and what was left out of it.

    Attributes:
        model: in eval mode, float32.
        notes: one line per kind of thing that was sliced or left out.
    """

    model: FFNASPreTrainedModel
    notes: tuple[str, ...]


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a published file, by name without `module.`; also those of a model's *.safetensors file.

    Raises:
        UserError: the file cannot be read without running code from it, or holds no state dict of float tensors.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return {name.removeprefix("ffnas."): tensor for name, tensor in load_file(path).items()}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path}: there is no such file: check the path") from error
    except Exception as error:  # of damaged pickles: IndexError, struct.error, AttributeError and more
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"checkpoint {path}: not a file of tensors ({reason:.160}): give a file whose `state_dict` torch.load"
            " reads with weights_only=True"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(_is_weight(n, t) for n, t in state.items()):
        raise UserError(f"checkpoint {path}: holds no `state_dict` of names and float tensors: give a model's file")
    tensors = {name.removeprefix(MODULE): tensor for name, tensor in state.items()}
    if len(tensors) != len(state):
        raise UserError(f"checkpoint {path}: the same names with and without {MODULE!r}: remove one of each")
    return tensors


def from_published(
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    *,
    heads: int = 12,
    ffn_size: int | None = None,
    policy: str = "truncate",
    kind: str | None = None,
    task: str | None = None,
    stored: bool = False,
    drop: Sequence[str] = (),
    **config: Any,
) -> Converted:
    """A model of ours from published tensors.

    Args:
        tensors: as `read_published` gives them.
        architecture: of the model.
        heads: attention heads; the tensors do not tell.
        ffn_size: F; None for the hidden size.
        policy: width policy.
        kind: a name in `KINDS`; None takes what the tensors have (pooler and classifier, classifier alone, neither).
        task: T of `classifiers.T` to take, where there are several.
        stored: keep a supernet whole, at the stacks and widths it stores, instead of slicing the architecture out.
        drop: beginnings of names to leave out although they are not understood.
        **config: further fields of `FFNASConfig`, such as `id2label`.

    Raises:
        UserError: names are missing or not understood (all are listed), or sizes do not fit.
    """
    given, dropped = _split(tensors, lambda name: any(name.startswith(prefix) for prefix in drop))
    given, others = _chosen_head(given, task)
    kind = kind or _kind_of(given)
    if kind not in KINDS:
        raise UserError(f"kind: {kind!r} is not known: choose one of {', '.join(KINDS)}")
    _require(given, ["embeddings.token_embeddings.weight", "embeddings.position_embeddings.weight"])
    sizes = _sizes(given, architecture, heads, ffn_size, policy)
    if stored:
        sizes["layers"] = _stored_layers(given, architecture, sizes["intermediate_size"])
    if kind == "classification" and "classifier.weight" in given:
        outputs = given["classifier.weight"].shape[0]
        names = config.get("id2label")
        if names is not None and len(names) != outputs:
            raise UserError(f"labels: {len(names)} names for a classifier of {outputs} outputs: give one for each")
        if names is None:
            config["num_labels"] = outputs
    with torch.device("meta"):
        model = _build(kind, FFNASConfig(**sizes | config), pooler="cls_pooler.dense.weight" in given)
    wanted = {_published(name): (name, tensor.shape) for name, tensor in model.state_dict().items()}
    unknown, extra = [], 0
    for name in given:
        if name in wanted:
            continue
        if _further_ffn(name, len(architecture)):
            extra += 1
        else:
            unknown.append(name)
    _refuse(unknown, [name for name in wanted if name not in given])
    values = {ours: _leading(name, given[name], shape) for name, (ours, shape) in wanted.items()}
    sliced = sum(given[name].shape != shape for name, (_, shape) in wanted.items())
    if (sliced or extra) and not _is_supernet(given):
        raise UserError(
            "architecture: it is smaller than what the checkpoint stores, and the checkpoint is no supernet (its layers"
            " differ in stack or width): give the architecture it was made for"
        )
    model.load_state_dict(values, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    notes = [
        f"{extra} tensors of FFNs beyond the architecture's stacks left out" if extra else "",
        f"{sliced} tensors sliced to the architecture's widths" if sliced else "",
        f"heads of other tasks left out: {', '.join(others)}" if others else "",
        f"dropped as asked: {', '.join(dropped)}" if dropped else "",
    ]
    return Converted(model.eval(), tuple(note for note in notes if note))


def to_published(model: FFNASPreTrainedModel, *, task: str | None = None, module: bool = False) -> dict[str, Tensor]:
    """The published names and the tensors of a model of ours, copied to the CPU.

    Args:
        model: with a head that published checkpoints know.
        task: names the head `classifiers.TASK` instead of `classifier`.
        module: put `module.` in front of every name.

    Raises:
        UserError: the model's class is not among `KINDS`.
    """
    if type(model) not in KINDS.values():
        known = ", ".join(c.__name__ for c in KINDS.values())
        raise UserError(f"model: published checkpoints know no {type(model).__name__}: give one of {known}")
    result = {}
    for name, tensor in model.state_dict().items():
        published = _published(name)
        if task is not None and published.startswith("classifier."):
            published = f"classifiers.{task}.{published.removeprefix('classifier.')}"
        result[f"{MODULE if module else ''}{published}"] = tensor.detach().cpu().clone()
    return result


def write_published(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes `{"state_dict": state}` as the published files are, whole or not at all."""
    with write_atomic(path) as temporary:
        torch.save({"state_dict": dict(state)}, temporary)


def _published(name: str) -> str:
    """The published name of one of our parameters, of a model with or without a head around the encoder."""
    if name.startswith("qa_outputs."):
        return f"classifier.{name.removeprefix('qa_outputs.')}"
    for published, ours in RENAMED:
        for prefix in (ours, ours.removeprefix("ffnas.")):
            if name.startswith(prefix):
                return f"{published}{name.removeprefix(prefix)}"
    raise UserError(f"model: {name} has no published name; convert a classification or question answering model")


def _is_weight(name: Any, tensor: Any) -> bool:
    return isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_floating_point()


def _split(tensors: Mapping[str, Tensor], leave: Any) -> tuple[dict[str, Tensor], list[str]]:
    left = [name for name in tensors if leave(name)]
    return {name: tensor for name, tensor in tensors.items() if not leave(name)}, left


def _chosen_head(tensors: dict[str, Tensor], task: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors with one head, named `classifier`; and the tasks whose heads were left out."""
    tasks = sorted({match.group(1) for name in tensors if (match := _TASK_HEAD.fullmatch(name))})
    if task is None and len(tasks) == 1 and "classifier.weight" not in tensors:
        task = tasks[0]
    if task is not None and task not in tasks:
        raise UserError(f"task: the checkpoint has no head {task!r}: it has {', '.join(tasks) or 'none by task'}")
    if tasks and task is None:
        raise UserError(f"task: the checkpoint has heads for {', '.join(tasks)}: say which one to take")
    chosen = {}
    for name, tensor in tensors.items():
        match = _TASK_HEAD.fullmatch(name)
        if match is None:
            chosen[name] = tensor
        elif match.group(1) == task:
            chosen[f"classifier.{match.group(2)}"] = tensor
    return chosen, [name for name in tasks if name != task]


def _kind_of(tensors: Mapping[str, Tensor]) -> str:
    if "classifier.weight" not in tensors:
        return "encoder"
    return "classification" if "cls_pooler.dense.weight" in tensors else "question-answering"


def _sizes(
    tensors: Mapping[str, Tensor], architecture: Architecture, heads: int, ffn_size: int | None, policy: str
) -> dict[str, Any]:
    vocab, width = tensors["embeddings.token_embeddings.weight"].shape
    positions, hidden = tensors["embeddings.position_embeddings.weight"].shape
    trigram = "embeddings.dense.weight" in tensors
    segments, teacher = tensors.get("embeddings.segment_embeddings.weight"), tensors.get("fit_dense.weight")
    layers = {int(name.split(".")[1]) for name in tensors if re.match(r"encoder\.\d+\.", name)}
    if layers != set(range(len(architecture))):
        raise UserError(
            f"architecture: it has {len(architecture)} layers, the checkpoint {len(layers)}: give the checkpoint's own"
        )
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": len(architecture),
        "num_attention_heads": heads,
        "intermediate_size": ffn_size or hidden,
        "embedding_type": "trigram" if trigram else "full",
        "embedding_size": width,
        "layers": architecture,
        "width_policy": policy,
        "teacher_hidden_size": None if teacher is None else teacher.shape[0],
        "max_position_embeddings": positions,
        "type_vocab_size": 2 if segments is None else segments.shape[0],
        "pad_token_id": 0,
        "layer_norm_eps": LAYER_NORM_EPS,
    }


def _stored_layers(tensors: Mapping[str, Tensor], architecture: Architecture, ffn_size: int) -> Architecture:
    """The architecture's expressions at the stacks and widths the tensors have."""
    specs = []
    for index, layer in enumerate(architecture.layers):
        found = [m for name in tensors if (m := _FFN.fullmatch(name)) and int(m.group(1)) == index]
        widths = {tensors[m.group()].shape[0] for m in found if m.group(3, 4) == ("dense1", "weight")}
        stack = len({int(m.group(2)) for m in found})
        ratios = [Fraction(1, k) for k in range(1, 65) if k <= ffn_size]
        ratio = next((r for r in ratios if widths == {inner_width(r, ffn_size)}), None)
        if ratio is None:
            raise UserError(
                f"ffn_size: layer {index} stores inner widths {sorted(widths)}, not one width {ffn_size} / k:"
                " give the checkpoint's FFN width at ratio 1"
            )
        specs.append(LayerSpec(layer.expression, stack, ratio))
    return Architecture(tuple(specs))


def _build(kind: str, config: FFNASConfig, *, pooler: bool) -> FFNASPreTrainedModel:
    if kind == "encoder":
        return FFNASModel(config, add_pooling_layer=pooler)
    return KINDS[kind](config)


def _further_ffn(name: str, layers: int) -> bool:
    """Whether this can be an FFN of a larger stack than the architecture's (those within it are wanted names)."""
    match = _FFN.fullmatch(name)
    return match is not None and int(match.group(1)) < layers


def _is_supernet(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all layers store the same number of FFNs and all FFNs the same width."""
    stacks: dict[str, int] = {}
    widths = set()
    for name, tensor in tensors.items():
        match = _FFN.fullmatch(name)
        if match is not None and match.group(3, 4) == ("dense1", "bias"):
            stacks[match.group(1)] = stacks.get(match.group(1), 0) + 1
            widths.add(tensor.shape[0])
    return len(set(stacks.values())) == 1 and len(widths) == 1


def _leading(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """The leading part of this shape, float32; only inner widths of FFNs may be cut."""
    match = _FFN.fullmatch(name)
    cut = match is not None and match.group(3, 4) in (("dense1", "weight"), ("dense1", "bias"), ("dense2", "weight"))
    larger = tensor.dim() == len(shape) and all(a >= b for a, b in zip(tensor.shape, shape, strict=True))
    if tensor.shape != shape and not (cut and larger):
        raise UserError(
            f"{name}: {list(tensor.shape)} in the checkpoint, {list(shape)} in the model: check preset or"
            " architecture, ffn_size and kind"
        )
    return tensor[tuple(slice(size) for size in shape)].to(torch.float32, copy=True).contiguous()


def _require(tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    _refuse([], [name for name in names if name not in tensors or tensors[name].dim() != 2])


def _refuse(unknown: list[str], missing: list[str]) -> None:
    if unknown or missing:
        kinds = (("missing", sorted(missing)), ("not understood", sorted(unknown)))
        parts = [f"{len(names)} {what}: {', '.join(names)}" for what, names in kinds if names]
        raise UserError(
            f"checkpoint: {'; '.join(parts)}; check preset or architecture and kind (names that are not needed can be"
            " dropped by their beginning)"
        )
