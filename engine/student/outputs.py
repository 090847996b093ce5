"""Output records of the student models: transformers' own, with the recorded encoder states beside.

`states` is None unless a forward pass was asked to record. Rejected: returning states from a second entry point
instead of `forward`; wrappers such as DistributedDataParallel and `torch.func.functional_call` only know `forward`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from engine.states import EncoderStates


@dataclass
class FFNASModelOutput(BaseModelOutputWithPooling):
    """Encoder output."""

    states: EncoderStates | None = None


@dataclass
class FFNASClassifierOutput(SequenceClassifierOutput):
    """Sequence classification or regression; logits [B, num_labels]."""

    states: EncoderStates | None = None


@dataclass
class FFNASQuestionAnsweringOutput(QuestionAnsweringModelOutput):
    """Extractive question answering; start and end logits [B, S]."""

    states: EncoderStates | None = None


@dataclass
class FFNASMultipleChoiceOutput(MultipleChoiceModelOutput):
    """Multiple choice; logits [B, choices]."""

    states: EncoderStates | None = None


@dataclass
class FFNASTokenClassifierOutput(TokenClassifierOutput):
    """Token classification; logits [B, S, num_labels]; `answer` of a CRF has its transitions below them."""

    states: EncoderStates | None = None
    answer: Tensor | None = None


@dataclass
class FFNASMaskedLMOutput(MaskedLMOutput):
    """Masked language modeling; logits [B, S, V]."""

    states: EncoderStates | None = None
