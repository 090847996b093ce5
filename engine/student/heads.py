"""Task heads on the student encoder: sequence classification or regression, question answering, multiple choice and
masked language modeling, with BERT's arithmetic and transformers' output records and losses.

Every forward takes the encoder's `architecture` and `states_layers` (see `FFNASModel.forward`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.generic import can_return_tuple

from engine.errors import UserError
from engine.handover.known import MASKED_LM, HandOver
from engine.states import EncoderStates
from engine.student.configuration import FFNASConfig
from engine.student.modeling import FFNASModel, FFNASPreTrainedModel
from engine.student.outputs import (
    FFNASClassifierOutput,
    FFNASMaskedLMOutput,
    FFNASModelOutput,
    FFNASMultipleChoiceOutput,
    FFNASQuestionAnsweringOutput,
)

IGNORED_LABEL = -100
_PIPELINE = Path(__file__).parents[1] / "handover" / "question_answering_ffnas.py"


class HeadedModel(FFNASPreTrainedModel):
    """A model with an encoder inside, `ffnas`: what heads share."""

    @property
    def fit_dense(self) -> nn.Linear | None:
        """The encoder's distillation projection."""
        return self.base_model.fit_dense

    def classify(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The head's output from the last layer's output [rows, S, H]; mean pooling needs the mask [rows, S]."""
        raise NotImplementedError(type(self).__name__)

    def answer(self, hidden: Tensor, attention_mask: Tensor) -> Tensor | None:
        """`classify` for a batch."""
        return self.classify(hidden, attention_mask.flatten(0, -2))

    def _fast(
        self, input_ids: Any, attention_mask: Any, token_type_ids: Any, position_ids: Any, inputs_embeds: Any,
        others: Mapping[str, Any],
    ) -> Tensor | None:  # fmt: skip
        """The head's scores where one call of the runtime gives them (`engine.student.fast_pass`), else None."""
        given = (input_ids, attention_mask, token_type_ids)
        return self.from_runtime("head", given, (position_ids, inputs_embeds), others)


class FFNASForSequenceClassification(HeadedModel):
    """Pooled sequence, dropout, linear: classes, or a value when `num_labels` is 1 or `problem_type` is regression."""

    native_head = "sequence"
    hand_over = HandOver("AutoModelForSequenceClassification", "text-classification")

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__(config)
        self.ffnas = FFNASModel(config)
        self.dropout = nn.Dropout(head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> FFNASClassifierOutput:
        """logits [B, num_labels]; `labels` [B] class ids, [B] values, or [B, num_labels] floats (multi-label)."""
        logits = self._fast(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs)
        if logits is not None:
            loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
            return FFNASClassifierOutput(loss=loss, logits=logits)
        out = self.ffnas(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True,
            first_token_only=True, **kwargs,
        )  # fmt: skip
        logits = self._logits(out.pooler_output)
        return FFNASClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config.problem_type),
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            states=with_logits(out.states, logits),
        )

    def classify(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, num_labels] from the last layer's output [B, S, H]; mean pooling needs the mask [B, S]."""
        return self._logits(self.ffnas.pooled(hidden, attention_mask))

    def _logits(self, pooled: Tensor) -> Tensor:
        return self.classifier(self.dropout(pooled))


class FFNASForQuestionAnswering(HeadedModel):
    """Start and end scores per token."""

    native_head = "tokens"
    native_scores = "qa_outputs"
    native_labels = ("start", "end")
    hand_over = HandOver(
        "AutoModelForQuestionAnswering",
        "question-answering",
        ("start_logits", "end_logits"),
        call=("question", "context"),
        own_pipeline=("QuestionAnsweringPipeline", _PIPELINE),
    )

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__(config)
        self.ffnas = FFNASModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> FFNASQuestionAnsweringOutput:
        """start_logits, end_logits [B, S]; positions [B], those outside the sequence are left out of the loss.

        The logits in `states` are [B, S, 2].
        """
        logits = self._fast(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs)
        out = FFNASModelOutput()
        if logits is None:
            out = self.ffnas(
                input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True,
                **kwargs,
            )  # fmt: skip
            logits = self.qa_outputs(out.last_hidden_state)
        start, end = logits.unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (_position_loss(start, start_positions) + _position_loss(end, end_positions)) / 2
        return FFNASQuestionAnsweringOutput(
            loss=loss,
            start_logits=start.contiguous(),
            end_logits=end.contiguous(),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            states=with_logits(out.states, logits),
        )

    def classify(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Start and end scores [B, S, 2] from the last layer's output [B, S, H]."""
        return self.qa_outputs(hidden)


class FFNASForMultipleChoice(HeadedModel):
    """One score per choice from its pooled sequence."""

    native_head = "choice"
    hand_over = HandOver("AutoModelForMultipleChoice", "multiple-choice", choices=True, pipeline=False)

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__(config)
        self.ffnas = FFNASModel(config)
        self.dropout = nn.Dropout(head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> FFNASMultipleChoiceOutput:
        """Inputs are [B, choices, S] (embeddings with one more axis), logits [B, choices], `labels` [B].

        `states` are those of the [B * choices, S] rows the encoder sees; their logits are [B, choices]. Inputs of one
        axis less (plain text) count as one choice each.
        """
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None:
            raise UserError("input_ids: give exactly one of input_ids and inputs_embeds")
        rows = [
            None if value is None else value.flatten(0, -2)
            for value in (input_ids, attention_mask, token_type_ids, position_ids)
        ]
        embedded = None if inputs_embeds is None else inputs_embeds.flatten(0, -3)
        ids, mask, types, positions = rows
        scores, out = self._fast(ids, mask, types, positions, embedded, kwargs), FFNASModelOutput()
        if scores is None:
            out = self.ffnas(*rows, embedded, return_dict=True, first_token_only=True, **kwargs)
            scores = self._score(out.pooler_output)
        logits = scores.view(len(inputs), -1)
        return FFNASMultipleChoiceOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            states=with_logits(out.states, logits),
        )

    def classify(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores [rows, 1] of single choices from the last layer's output [rows, S, H]; mean pooling needs the mask."""
        return self._score(self.ffnas.pooled(hidden, attention_mask))

    def answer(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [B, choices] for a mask [B, choices, S]; one choice each for [B, S]."""
        return self.classify(hidden, attention_mask.flatten(0, -2)).view(len(attention_mask), -1)

    def _score(self, pooled: Tensor) -> Tensor:
        return self.classifier(self.dropout(pooled))


class MaskedLMHead(nn.Module):
    """LayerNorm(gelu(dense(x))) in the token table's width, then a decoder tied to the table, with its own bias."""

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.token_width)
        self.layernorm = nn.LayerNorm(config.token_width, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.token_width, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.layernorm(F.gelu(self.dense(hidden), approximate="tanh")))


class FFNASForMaskedLM(HeadedModel):
    """Token scores; the decoder shares the token table."""

    native_head = "mask"
    hand_over = MASKED_LM

    _tied_weights_keys = {  # noqa: RUF012  transformers reads a dict
        "lm_head.decoder.weight": "ffnas.embeddings.token_embeddings.weight"
    }

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__(config)
        self.ffnas = FFNASModel(config, add_pooling_layer=False)
        self.lm_head = MaskedLMHead(config)
        self.post_init()

    def answer(self, hidden: Tensor, attention_mask: Tensor) -> Tensor | None:
        """None: distillation on text compares no predictions."""
        return None

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder."""
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the decoder."""
        self.lm_head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> FFNASMaskedLMOutput:
        """logits [B, S, V]; `labels` [B, S] token ids, -100 where no token is to be predicted.

        When states are recorded the [B, S, V] logits are not computed (and `states.logits` is None) unless there are
        labels: distillation on text compares no predictions.
        """
        out = self.ffnas(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = loss = None
        if out.states is None or labels is not None:
            logits = self.lm_head(out.last_hidden_state)
        if labels is not None and logits is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
        return FFNASMaskedLMOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions, states=out.states
        )


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Loss of a sequence classification head, by transformers' conventions.

    Args:
        logits: [B, num_labels].
        labels: [B] class ids; [B] or [B, num_labels] values for regression; [B, num_labels] floats for multi-label.
        problem_type: `"regression"`, `"single_label_classification"`, `"multi_label_classification"`, or None to
            decide: one output is a regression, integer labels are classes, others are multi-label.
    """
    if problem_type is None:
        if logits.shape[-1] == 1:
            problem_type = "regression"
        else:
            integer = not labels.is_floating_point()
            problem_type = "single_label_classification" if integer else "multi_label_classification"
    if problem_type == "regression":
        return F.mse_loss(logits.view(labels.shape), labels.to(logits.dtype))
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def head_dropout(config: FFNASConfig) -> float:
    """Of a head."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def _position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    length = logits.shape[1]
    targets = positions.view(-1).clamp(0, length)  # `length` marks answers cut off by truncation
    return F.cross_entropy(logits, targets, ignore_index=length)


def with_logits(states: EncoderStates | None, logits: Tensor) -> EncoderStates | None:
    """Recorded states with the head's output; None where none were recorded."""
    return None if states is None else replace(states, logits=logits)
