"""Presets as transformers configurations and models, random weights.

The baselines come from transformers' own BERT and MobileBERT code, so that they are timed as their users run them.
Apart from `engine.published.presets`, which must load no framework. Rejected: our students with the baselines' sizes,
which would put our kernels into the baselines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    PreTrainedConfig,
)

from engine.published.presets import ModelPreset
from engine.student.configuration import FFNASConfig
from engine.student.heads import FFNASForSequenceClassification

_CLASSES = {
    "ffnas": FFNASForSequenceClassification,
    "bert": BertForSequenceClassification,
    "mobilebert": MobileBertForSequenceClassification,
}


def transformers_config(preset: ModelPreset, **changes: Any) -> PreTrainedConfig:
    """The configuration of the preset in its own family; `changes` are further fields of that class.

    Raises:
        UserError: the values do not fit together.
    """
    shape = preset.shape
    if preset.family == "ffnas":
        return FFNASConfig(**preset.student_config(**changes))
    common: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": preset.heads,
        "intermediate_size": shape.ffn_size,
        "max_position_embeddings": shape.max_positions,
        "type_vocab_size": shape.type_vocab,
    }
    if preset.family == "bert":
        return BertConfig(**common | changes)
    tiny = {
        "embedding_size": shape.embedding_size,
        "num_feedforward_networks": 2,
        "use_bottleneck_attention": True,
        "key_query_shared_bottleneck": False,
        "classifier_activation": False,
    }
    return MobileBertConfig(**common | tiny | changes)


def build_preset(preset: ModelPreset, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A sequence classifier with random weights, a function of `seed` alone, in eval mode on the CPU."""
    config = transformers_config(preset, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _CLASSES[preset.family](config).eval()
