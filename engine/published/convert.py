"""EfficientBERT's published checkpoints to our models (and back: `engine.published.back`).

A published file is a pickle with `state_dict`, of one model or of a supernet (all FFNs at the largest stack and
ratio), its names with or without `module.` in front:

    embeddings.{token,segment,position}_embeddings.weight   embeddings.dense.*   embeddings.layernorm.*
    encoder.L.attention.{query,key,value,dense,layernorm}.*  encoder.L.all_ffn.N.{dense1,dense2,layernorm}.*
    fit_dense.*   cls_pooler.dense.*   classifier.* or, of several tasks, classifiers.T.*

Sizes are read from the tensors, FFNs sliced to the architecture (leading rows of `dense1`, columns of `dense2`, the
first FFNs of a stack). A name that is not understood or not there is an error that lists it. The arithmetic is ours
where texts have a real token (docs/paper.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.shape import inner_width
from engine.errors import UserError
from engine.published.names import FFN, KINDS, TASK_HEAD, published_name
from engine.published.presets import LAYER_NORM_EPS, ModelPreset
from engine.published.tasks import BORROWED, classes, head_of, known_task
from engine.published.tasks import KINDS as KIND_OF_TASK
from engine.student.configuration import FFNASConfig
from engine.student.modeling import FFNASModel, FFNASPreTrainedModel


@dataclass(frozen=True)
class Converted:
    """A converted model and what was left out of it.

    Attributes:
        model: in eval mode, float32.
        notes: one line per kind of thing that was sliced or left out.
    """

    model: FFNASPreTrainedModel
    notes: tuple[str, ...]


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
        kind: a name in `KINDS`; None takes the task's, or what the tensors have (pooler and classifier, classifier
            alone, neither).
        task: a published task, which names classes and kind (`engine.published.tasks`) and of several heads the one to
            take; or T of `classifiers.T`.
        stored: keep a supernet whole, at the stacks and widths it stores, instead of slicing the architecture out.
        drop: beginnings of names to leave out although they are not understood.
        **config: further fields of `FFNASConfig`, such as `id2label`.

    Raises:
        UserError: names are missing or not understood (all are listed), sizes do not fit, or a single output may be a
            regression's as well as a multiple choice's.
    """
    given, dropped = _split(tensors, lambda name: any(name.startswith(prefix) for prefix in drop))
    given, others = _chosen_head(given, task)
    config = _answers(task) | config
    kind = kind or config.pop("kind", None) or _kind_of(given, config)
    config.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"kind: {kind!r} is not known: choose one of {', '.join(KINDS)}")
    _require(given, ["embeddings.token_embeddings.weight", "embeddings.position_embeddings.weight"])
    sizes = _sizes(given, architecture, heads, ffn_size, policy)
    if stored:
        sizes["layers"] = _stored_layers(given, architecture, sizes["intermediate_size"])
    if kind == "classification" and "classifier.weight" in given:
        config |= _outputs(given["classifier.weight"], config.get("id2label"))
    with torch.device("meta"):
        model = _build(kind, FFNASConfig(**sizes | config), pooler="cls_pooler.dense.weight" in given)
    wanted = {published_name(name): (name, tensor.shape) for name, tensor in model.state_dict().items()}
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
        _borrowed(task) if others else "",
        f"dropped as asked: {', '.join(dropped)}" if dropped else "",
    ]
    return Converted(model.eval(), tuple(note for note in notes if note))


def _outputs(classifier: Tensor, names: Mapping[int, str] | None) -> dict[str, int]:
    """Number of outputs where no names say it. Raises `UserError` where there are not as many names."""
    outputs = classifier.shape[0]
    if names is not None and len(names) != outputs:
        raise UserError(f"labels: {len(names)} names for a classifier of {outputs} outputs: give one for each")
    return {"num_labels": outputs} if names is None else {}


def _split(tensors: Mapping[str, Tensor], leave: Any) -> tuple[dict[str, Tensor], list[str]]:
    left = [name for name in tensors if leave(name)]
    return {name: tensor for name, tensor in tensors.items() if not leave(name)}, left


def _chosen_head(tensors: dict[str, Tensor], task: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors with one head, named `classifier`; and the tasks whose heads were left out."""
    tasks = sorted({match.group(1) for name in tensors if (match := TASK_HEAD.fullmatch(name))})
    known = known_task(task)
    if not tasks and known is not None:
        return dict(tensors), []
    if task is None and len(tasks) == 1 and "classifier.weight" not in tensors:
        task = tasks[0]
    asked = task
    if known is not None and task not in tasks:
        named = [name for name in tasks if not name.isdigit() and known_task(name) is known]
        task = named[0] if named else head_of(known)
    if asked is not None and task not in tasks:
        raise UserError(f"task: the checkpoint has no head {asked!r}: it has {', '.join(tasks) or 'none by task'}")
    if tasks and task is None:
        raise UserError(f"task: the checkpoint has heads for {', '.join(tasks)}: say which one to take")
    chosen = {}
    for name, tensor in tensors.items():
        match = TASK_HEAD.fullmatch(name)
        if match is None:
            chosen[name] = tensor
        elif match.group(1) == task:
            chosen[f"classifier.{match.group(2)}"] = tensor
    return chosen, [name for name in tasks if name != task]


def _answers(task: str | None) -> dict[str, Any]:
    """The kind of model of a published task, and the fields of its configuration that say what it answers."""
    known = known_task(task)
    if known is None:
        return {}
    kind = KIND_OF_TASK[known.kind]
    if known.kind == "regression":
        return {"kind": kind, "problem_type": "regression"}
    if known.kind != "classification":
        return {"kind": kind}
    names = classes(known)
    label2id = {name: i for i, name in enumerate(names)}
    return {"kind": kind, "id2label": dict(enumerate(names)), "label2id": label2id}


def _borrowed(task: str | None) -> str:
    known = known_task(task)
    own = None if known is None else BORROWED.get(known.name)
    return "" if own is None else f"{task} has no head of its own: that of {own} is taken, as the published code does"


def _kind_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """By what the tensors have. Raises `UserError` where they leave open what a single output is."""
    if "classifier.weight" not in tensors:
        return "encoder"
    if "cls_pooler.dense.weight" not in tensors:
        return "question-answering"
    if tensors["classifier.weight"].shape[0] == 1 and config.get("problem_type") != "regression":
        raise UserError(
            "kind: the checkpoint's one output may score choices or be a regression's value: give --task (swag, stsb,"
            " ...), --kind multiple-choice or --regression"
        )
    return "classification"


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
        found = [m for name in tensors if (m := FFN.fullmatch(name)) and int(m.group(1)) == index]
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


def require_sizes(tensors: Mapping[str, Tensor], preset: ModelPreset, ffn_size: int | None = None) -> None:
    """Raises `UserError` where a checkpoint has other widths than the preset it is said to be of.

    Args:
        tensors: as `read_published` gives them.
        preset: one of EfficientBERT's.
        ffn_size: FFN width at ratio 1, if it is not the preset's.
    """
    assert preset.architecture is not None
    _require(tensors, ["embeddings.token_embeddings.weight", "embeddings.position_embeddings.weight"])
    shape = preset.shape
    full = shape.embedding_size is None
    inner = [t.shape[0] for n, t in tensors.items() if (m := FFN.fullmatch(n)) and m.group(3, 4) == ("dense1", "bias")]
    widest = ffn_size or shape.ffn_size
    used = max(inner_width(layer.ratio, widest) for layer in preset.architecture.layers)
    stored = max(inner, default=used)
    found = {
        "hidden size": (shape.hidden_size, tensors["embeddings.position_embeddings.weight"].shape[1]),
        "token embedding": (
            shape.hidden_size if full else shape.embedding_size,
            tensors["embeddings.token_embeddings.weight"].shape[1],
        ),
        "FFN width": (used if stored == used else widest, stored),
    }
    wrong = [f"{name} {own}, the checkpoint's {given}" for name, (own, given) in found.items() if own != given]
    if wrong or full == ("embeddings.dense.weight" in tensors):
        reason = ", ".join(wrong) or f"a {'full' if full else 'trigram'} embedding, the checkpoint's is another"
        raise UserError(
            f"--preset {preset.name}: its sizes are not the checkpoint's ({reason}): give the preset it is of"
            " (`ffnas presets`), or --architecture"
        )


def _further_ffn(name: str, layers: int) -> bool:
    """Whether this can be an FFN of a larger stack than the architecture's (those within it are wanted names)."""
    match = FFN.fullmatch(name)
    return match is not None and int(match.group(1)) < layers


def _is_supernet(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all layers store the same number of FFNs and all FFNs the same width."""
    stacks: dict[str, int] = {}
    widths = set()
    for name, tensor in tensors.items():
        match = FFN.fullmatch(name)
        if match is not None and match.group(3, 4) == ("dense1", "bias"):
            stacks[match.group(1)] = stacks.get(match.group(1), 0) + 1
            widths.add(tensor.shape[0])
    return len(set(stacks.values())) == 1 and len(widths) == 1


def _leading(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """The leading part of this shape, float32; only inner widths of FFNs may be cut."""
    match = FFN.fullmatch(name)
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
