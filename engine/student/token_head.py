"""Token classification on the student encoder: a score of every tag at every token, alone or in a linear-chain CRF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.generic import can_return_tuple

from engine.handover.known import HandOver
from engine.student.chain import best_tags, packed
from engine.student.configuration import FFNASConfig
from engine.student.heads import IGNORED_LABEL, HeadedModel, head_dropout, with_logits
from engine.student.modeling import FFNASModel
from engine.student.outputs import FFNASModelOutput, FFNASTokenClassifierOutput

_PLAIN = Path(__file__).parents[1] / "handover" / "token_classification_ffnas.py"


class FFNASForTokenClassification(HeadedModel):
    """Dropout and a linear layer per token; with `config.token_head` "crf", scores of one tag after another, too.

    `logits` are the linear layer's; those of a CRF say little alone: `answer` has the transitions below them
    (`engine.student.chain`).
    """

    native_head = "tokens"
    hand_over = HandOver("AutoModelForTokenClassification", "token-classification", ("logits", "answer"), plain=_PLAIN)

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__(config)
        self.ffnas = FFNASModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 1)
        self.transitions = self.start = self.end = None
        if config.token_head == "crf":
            self.add_crf()
        self.post_init()

    def add_crf(self) -> None:
        """Gives the head transitions, all 0: the chain of independent tokens that it was."""
        tags = self.config.num_labels or 1
        self.config.token_head = "crf"
        for name, shape in (("transitions", (tags, tags)), ("start", (tags,)), ("end", (tags,))):
            setattr(self, name, nn.Parameter(torch.zeros(shape, device=self.classifier.weight.device)))

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
    ) -> FFNASTokenClassifierOutput:
        """logits [B, S, num_labels], `answer` and the logits in `states` as `engine.student.chain` has them.

        `labels` [B, S] are class ids, -100 where a token has none; their loss is the softmax's, without transitions.
        """
        logits = self._fast(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, kwargs)
        out = FFNASModelOutput()
        if logits is None:
            out = self.ffnas(
                input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
            )
            logits = self.classifier(self.dropout(out.last_hidden_state))
        answer = self._with_transitions(logits)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
        return FFNASTokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            states=with_logits(out.states, answer),
            answer=None if self.transitions is None else answer,
        )

    def classify(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The answer [B, S (+ L + 2), L] from the last layer's output [B, S, H]."""
        return self._with_transitions(self.classifier(self.dropout(hidden)))

    def decode(self, logits: Tensor, words: Tensor) -> list[list[int]]:
        """The best tags of the words of every sequence.

        Args:
            logits: [B, S, num_labels] without the transitions.
            words: [B, S] true at the first token of every word.
        """
        best = best_tags(self._with_transitions(logits), words.to(torch.bool))
        return [row[row >= 0].tolist() for row in best]

    def _with_transitions(self, logits: Tensor) -> Tensor:
        if self.transitions is None:
            return logits
        return packed(logits, (self.transitions, self.start, self.end))
