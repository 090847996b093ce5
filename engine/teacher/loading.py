"""A model folder to a transformers model: the right class, safetensors only, no code from the folder, a fitting head.

A head is kept when the folder has one with as many outputs as the task; if its label names are the task's in another
order, its rows are put into the task's order. Otherwise a fresh head is made, from a fixed seed. The head is the
family's standard one, so that a fine-tuned teacher loads anywhere (MiniLM's sentence vectors come from mean pooling,
which the standard BERT head does not do; the loss of accuracy after fine-tuning is small). Only teachers that become
models of ours (`standardised`) pool as their sentence encoder did.

Rejected: our own head on top of the bare encoder; no other program could load the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from engine.errors import UserError
from engine.model_sources import _LOAD_ERRORS, TeacherSource, _first_line, quiet
from engine.published.presets import LAYER_NORM_EPS
from engine.student.from_encoder import reason_against, standard_model
from engine.student.modeling import FFNASPreTrainedModel
from engine.teacher.sentence import sentence_pooling

if TYPE_CHECKING:
    from engine.data import TaskSpec

PUBLISHED_BERT = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": LAYER_NORM_EPS}
"""EfficientBERT's published code runs every BERT so, whatever its own configuration says (erf GELU, 1e-12)."""


def load_model(
    source: TeacherSource, task: TaskSpec | None, *, seed: int = 0, published: bool = False
) -> tuple[PreTrainedModel, bool]:
    """The model in float32 on the CPU, and whether its head was loaded (False without a task).

    `published`: a BERT with the published code's arithmetic.

    Raises:
        UserError: the folder cannot be loaded, or holds no encoder.
    """
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise UserError(f"teacher {source.name!r}: its config.json cannot be used ({_first_line(error)})") from error
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        raise UserError(f"teacher {source.name!r} is no encoder ({config.model_type}): choose a bidirectional encoder")
    require_language(config, source.name)
    auto, options = AutoModel, {}
    own_names = dict(config.id2label)
    if task is not None:
        auto, options = task.head.auto_class(), task.head.config_fields(task)
    if published and config.model_type == "bert":
        options = options | PUBLISHED_BERT
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        try:
            model, report = auto.from_pretrained(
                source.folder,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                ignore_mismatched_sizes=task is not None,
                output_loading_info=True,
                **options,
            )
        except _LOAD_ERRORS as error:
            raise UserError(f"teacher {source.name!r} cannot be loaded ({_first_line(error)})") from error
    fresh = _fresh_parameters(report)
    _require_encoder_weights(model, fresh, source)
    _require_finite(model, source)
    has_head = task is not None and not any(not name.startswith(f"{model.base_model_prefix}.") for name in fresh)
    if has_head and task is not None and task.head.named_outputs:
        require_one_label(config, source.name)
        _order_head(model, own_names, task)
    model.config._name_or_path = source.name
    return model, has_head


def placed(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """The model, moved in place."""
    cast("nn.Module", model).to(device)  # transformers' own signature of `to` says something else
    return model


def require_language(config: Any, name: str) -> None:
    """Raise `UserError` for a model of one adapter per language (XMOD) that does not say which one to use."""
    languages = getattr(config, "languages", None)
    if config.model_type == "xmod" and getattr(config, "default_language", None) is None:
        known = ", ".join(map(str, languages or ()))
        raise UserError(
            f"teacher {name!r}: its config.json names no default_language, and its layers differ by language: set"
            f' "default_language" there to one of {known}'
        )


def require_one_label(config: Any, name: str) -> None:
    """Raise `UserError` for a head that answers several labels at once.

    Its answers are no distribution over the classes, so neither distillation nor `predict` would be right.
    """
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise UserError(
            f"teacher {name!r}: its config.json says multi_label_classification, which is not served: give a model of"
            " one label per text, or a bare encoder (save_pretrained of model.base_model), which gets a head here"
        )


def standardised(
    model: PreTrainedModel, source: TeacherSource, *, has_head: bool, seed: int = 0
) -> tuple[PreTrainedModel, str | None]:
    """The model as one of ours where its family is known, else as it is with the reason, in a few words.

    A fresh head of a sentence encoder pools as its folder says; a head that was loaded stays as it is.
    """
    if isinstance(model, FFNASPreTrainedModel):
        return model, None
    reason = reason_against(model)
    if reason is not None:
        return model, reason
    made = standard_model(model, pooling=None if has_head else sentence_pooling(source.folder), seed=seed)
    made.config._name_or_path = source.name
    return made, None


def names_labels(source: TeacherSource, task: TaskSpec) -> bool:
    """Whether the folder's configuration names the classes of `task`, in any order and case."""
    if not task.head.named_outputs:
        return False
    names = AutoConfig.from_pretrained(source.folder, trust_remote_code=False).id2label.values()
    return sorted(str(name).casefold() for name in names) == sorted(name.casefold() for name in task.label_names)


def _fresh_parameters(report: dict[str, Any]) -> set[str]:
    """Names of parameters that did not come from the file: missing there, or of another shape."""
    mismatched = {entry[0] if isinstance(entry, (tuple, list)) else entry for entry in report["mismatched_keys"]}
    return set(report["missing_keys"]) | mismatched


def _require_encoder_weights(model: PreTrainedModel, fresh: set[str], source: TeacherSource) -> None:
    """A pooler may be fresh (checkpoints of language models have none), the rest of the encoder may not."""
    encoder = model.base_model
    poolers = [getattr(encoder, name, None) for name in ("pooler", "cls_pooler")]  # the second one: models of ours
    pooled = {id(p) for pooler in poolers if pooler is not None for p in pooler.parameters()}
    own = {id(p) for p in encoder.parameters()} - pooled
    missing = sorted(name for name, p in model.named_parameters() if name in fresh and id(p) in own)
    if missing:
        raise UserError(
            f"teacher {source.name!r}: {len(missing)} tensors of the encoder are missing or of another shape in the "
            f"weights, first {missing[0]!r}: the folder's config.json and weights do not belong together"
        )


def _require_finite(model: PreTrainedModel, source: TeacherSource) -> None:
    """Otherwise the first loss is NaN, and a smaller learning rate, the usual remedy, is none."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(
                f"teacher {source.name!r}: {name!r} holds NaN or infinity, so its weights are damaged: fetch them again"
            )


def _order_head(model: PreTrainedModel, names: dict[int, str], task: TaskSpec) -> None:
    """Put the rows of a loaded head into the task's order of classes, where its label names tell the order."""
    have = [str(names[i]).casefold() for i in sorted(names)]
    want = [name.casefold() for name in task.label_names]
    if have == want or sorted(have) != sorted(want) or len(set(have)) != len(have):
        return
    order = torch.tensor([have.index(name) for name in want])
    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(want)][-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.copy_(parameter[order].clone())
