"""Published encoders as models of ours: BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, MiniLM and DistilBERT.

All are the same layers under other names: attention block, `linear(ACT(linear(x,wb1)),wb2)`, each with residual and
LayerNorm behind. What differs:

    RoBERTa's kin   count positions from padding_idx + 1: the rows before are dropped (texts are padded behind)
    DistilBERT      has no segments: one row of zeros
    heads           dense, activation and linear, in classes of other names: pooling "cls" with that activation

Outputs are equal; while training, RoBERTa's and ELECTRA's heads drop out once more, before the dense layer.

Rejected: running transformers' own classes as the supernet. They run neither subnets on views nor our kernels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.architecture.architecture import uniform
from engine.architecture.file import layers_to_list
from engine.data.task import heads
from engine.errors import UserError
from engine.student.configuration import FFNASConfig
from engine.student.heads import FFNASForMultipleChoice, FFNASForSequenceClassification
from engine.student.modeling import FFNASModel, FFNASPreTrainedModel
from kernels.language.expression import parse_expression

if TYPE_CHECKING:
    from engine.data import TaskSpec

_LIKE_BERT = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
FAMILIES = (*_LIKE_BERT, "distilbert")
"""`model_type` of the configurations that are known."""

_OTHERWISE = {
    "albert": "its layers share their weights",
    "modernbert": "it has rotary positions and normalises before its blocks",
    "mpnet": "its attention scores have a position bias",
    "deberta": "its attention scores have relative positions",
    "deberta-v2": "its attention scores have relative positions",
    "mobilebert": "its layers have bottlenecks",
    "roformer": "it has rotary positions",
    "xlm-roberta-xl": "it normalises before its blocks",
    "xlnet": "its attention scores have relative positions",
}
"""Why some families are none of ours, by `model_type`."""

ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "silu": "swish",
    "swish": "swish",
}
"""transformers' names of activations to those of operators."""

_BERT_NAMES = (
    (r"embeddings\.word_embeddings\.", "embeddings.token_embeddings."),
    (r"embeddings\.token_type_embeddings\.", "embeddings.segment_embeddings."),
    (r"embeddings\.LayerNorm\.", "embeddings.layernorm."),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.", r"encoder.\1.attention.\2."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"encoder.\1.attention.dense."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"encoder.\1.attention.layernorm."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"encoder.\1.all_ffn.0.dense1."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"encoder.\1.all_ffn.0.dense2."),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"encoder.\1.all_ffn.0.layernorm."),
    (r"pooler\.dense\.", "cls_pooler.dense."),
)
_DISTILBERT_NAMES = (
    (r"embeddings\.word_embeddings\.", "embeddings.token_embeddings."),
    (r"embeddings\.LayerNorm\.", "embeddings.layernorm."),
    (r"transformer\.layer\.(\d+)\.attention\.q_lin\.", r"encoder.\1.attention.query."),
    (r"transformer\.layer\.(\d+)\.attention\.k_lin\.", r"encoder.\1.attention.key."),
    (r"transformer\.layer\.(\d+)\.attention\.v_lin\.", r"encoder.\1.attention.value."),
    (r"transformer\.layer\.(\d+)\.attention\.out_lin\.", r"encoder.\1.attention.dense."),
    (r"transformer\.layer\.(\d+)\.sa_layer_norm\.", r"encoder.\1.attention.layernorm."),
    (r"transformer\.layer\.(\d+)\.ffn\.lin([12])\.", r"encoder.\1.all_ffn.0.dense\2."),
    (r"transformer\.layer\.(\d+)\.output_layer_norm\.", r"encoder.\1.all_ffn.0.layernorm."),
)
_HEAD_NAMES = (
    (r"(classifier\.dense|pre_classifier|sequence_summary\.summary)\.", "ffnas.cls_pooler.dense."),
    (r"classifier\.out_proj\.", "classifier."),
)

MEAN_DROPOUT = 0.1
"""Dropout before the fresh classifier of a mean-pooled sentence encoder."""


def reason_against(model: PreTrainedModel) -> str | None:
    """Why this transformers model is none of ours under other names, in a few words; None where it is one."""
    config = model.config
    kind = str(config.model_type)
    if kind not in FAMILIES:
        return f"{kind}: {_OTHERWISE.get(kind, 'a family that is not known')}"
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return f"{kind}: it is a decoder"
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
        return f"{kind}: its positions are relative"
    if _activation(config) not in ACTIVATIONS:
        return f"{kind}: its activation {_activation(config)!r:.40} is not known"
    if getattr(model.base_model, "embeddings_project", None) is not None:
        return f"{kind}: its embeddings are narrower than its layers, with a LayerNorm before the projection"
    if model.base_model is model:
        return None
    head = _head_of(model)
    if head is None:
        return f"{kind}: {type(model).__name__} has a head of another kind"
    if head is FFNASForMultipleChoice and kind == "electra" and not _plain_summary(config):
        return f"{kind}: its sequence summary is of another kind"
    return None


def standard_model(
    model: PreTrainedModel, task: TaskSpec | None = None, *, pooling: str | None = None, seed: int = 0
) -> FFNASPreTrainedModel:
    """A transformers encoder as a model of ours with equal outputs, its weights copied.

    Args:
        model: of a family in `FAMILIES`, bare or with a head for classes, values, spans or choices; not changed.
        task: gives a bare encoder a fresh head for it; a head that is there stays as it is.
        pooling: `"mean"` gives sequence heads the mean over real tokens and a fresh classifier; None and `"cls"` keep
            the family's own.
        seed: of fresh weights: normal with the model's `initializer_range`, biases 0.

    Returns:
        On the same device, in the same dtype and mode; stack 1, ratio 1, full embedding.

    Raises:
        UserError: the family is not known (`reason_against` says why).
    """
    reason = reason_against(model)
    if reason is not None:
        raise UserError(
            f"teacher: cannot be taken apart into layers ({reason}): choose a BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA,"
            " MiniLM or DistilBERT"
        )
    own = _head_of(model)
    model_class = own or (FFNASModel if task is None else task.head.student_class())
    given = _renamed(model, model_class)
    fresh = pooling == "mean" and model_class in (FFNASForSequenceClassification, FFNASForMultipleChoice)
    if fresh:
        given = {name: value for name, value in given.items() if not name.startswith("classifier.")}
    config = _config(model, pooling, fresh)
    if task is not None and own is None:
        for name, value in task.head.config_fields(task).items():
            setattr(config, name, value)
    with torch.device("meta"):
        unpooled = model_class is FFNASModel and pooling != "mean" and "cls_pooler.dense.weight" not in given
        target = FFNASModel(config, add_pooling_layer=False) if unpooled else model_class(config)
    state = _completed(target, given, config.initializer_range, seed)
    target.load_state_dict(state, assign=True)
    return target.train(model.training)


def _head_of(model: PreTrainedModel) -> type[FFNASPreTrainedModel] | None:
    """Our class for a model of transformers with a head: the names end alike."""
    name = type(model).__name__
    known = (head.student_class() for head in heads())
    return next((ours for ours in known if name.endswith(ours.__name__.removeprefix("FFNAS"))), None)


def _activation(config: Any) -> Any:
    value = config.activation if config.model_type == "distilbert" else config.hidden_act
    return value if isinstance(value, str) else type(value).__name__


def _plain_summary(config: Any) -> bool:
    return (
        getattr(config, "summary_type", None) == "first"
        and bool(getattr(config, "summary_use_proj", False))
        and not getattr(config, "summary_proj_to_labels", False)
        and getattr(config, "summary_activation", None) in ("gelu", "tanh", "relu")
    )


def _config(model: PreTrainedModel, pooling: str | None, fresh: bool) -> FFNASConfig:
    """Our configuration of the model: sizes, dropout, labels, pooling."""
    config: Any = model.config
    block: Any = model.base_model.embeddings
    distil = config.model_type == "distilbert"
    positions, segments = block.position_embeddings, getattr(block, "token_type_embeddings", None)
    formula = parse_expression(f"linear({ACTIVATIONS[_activation(config)]}(linear(x,wb1)),wb2)")
    return FFNASConfig(
        vocab_size=block.word_embeddings.num_embeddings,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.hidden_dim if distil else config.intermediate_size,
        embedding_type="full",
        embedding_size=config.hidden_size,
        layers=layers_to_list(uniform(formula, 1, Fraction(1), config.num_hidden_layers)),
        hidden_dropout_prob=config.dropout if distil else config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_dropout if distil else config.attention_probs_dropout_prob,
        classifier_dropout=MEAN_DROPOUT if fresh else _head_dropout(model),
        layer_norm_eps=block.LayerNorm.eps,
        max_position_embeddings=positions.num_embeddings - _first_position(positions),
        type_vocab_size=1 if segments is None else segments.num_embeddings,
        initializer_range=config.initializer_range,
        pad_token_id=config.pad_token_id,
        pooling="mean" if pooling == "mean" else "cls",
        pooler_activation=_pooler_activation(model),
        id2label=dict(config.id2label),
        label2id=dict(config.label2id),
        problem_type=config.problem_type,
    )


def _head_dropout(model: PreTrainedModel) -> float | None:
    config, choices = model.config, type(model).__name__.endswith("ForMultipleChoice")
    if config.model_type == "distilbert":
        return config.seq_classif_dropout
    if config.model_type == "electra" and choices:
        return float(getattr(config, "summary_last_dropout", 0.0))
    return config.classifier_dropout


def _pooler_activation(model: PreTrainedModel) -> str:
    kind, name = model.config.model_type, type(model).__name__
    if kind == "distilbert":
        return "relu"
    if kind == "electra" and name.endswith("ForMultipleChoice"):
        used = model.config.summary_activation
        return ACTIVATIONS.get(used, used)
    return "gelu_erf" if kind == "electra" else "tanh"


def _first_position(positions: nn.Embedding) -> int:
    """Rows of the table before the one of the first token."""
    return 0 if positions.padding_idx is None else positions.padding_idx + 1


def _renamed(model: PreTrainedModel, model_class: type[FFNASPreTrainedModel]) -> dict[str, Tensor]:
    """Copies of the weights under our names, positions and segments in our shapes."""
    base: Any = model.base_model
    names = _DISTILBERT_NAMES if base.config.model_type == "distilbert" else _BERT_NAMES
    inner = "" if model_class is FFNASModel else "ffnas."
    outer = "" if base is model else f"{model.base_model_prefix}."
    made: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.startswith(outer) and (outer or base is model):
            ours = inner + _replaced(name.removeprefix(outer), names)
        else:
            ours = _replaced(name, _HEAD_NAMES)
        made[ours] = value.detach().clone()
    positions = f"{inner}embeddings.position_embeddings.weight"
    made[positions] = made[positions][_first_position(base.embeddings.position_embeddings) :].clone()
    segments = f"{inner}embeddings.segment_embeddings.weight"
    if segments not in made:
        made[segments] = torch.zeros_like(made[positions][:1])
    return made


def _replaced(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in names:
        match = re.match(pattern, name)
        if match is not None:
            return match.expand(ours) + name[match.end() :]
    return name


def _completed(target: nn.Module, given: Mapping[str, Tensor], deviation: float, seed: int) -> dict[str, Tensor]:
    """The weights `target` has, fresh ones where none are given: those of a head or pooler."""
    generator = torch.Generator().manual_seed(seed)
    like = next(iter(given.values()))
    state: dict[str, Tensor] = {}
    for name, wanted in target.state_dict().items():
        if name in given:
            state[name] = given[name]
        elif ".embeddings." in f".{name}" or ".encoder." in f".{name}":
            raise UserError(f"teacher: its weights have no {name}: the model is not laid out like its family")
        else:
            value = torch.zeros(wanted.shape)
            if value.ndim == 2:
                value.normal_(0.0, deviation, generator=generator)
            state[name] = value.to(like)
    return state
