# SPDX-License-Identifier: Apache-2.0
"""Token classification on an ffnas encoder in plain PyTorch: a score of every tag at every token, and of one tag after
another where the head is a CRF.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import TokenClassifierOutput

from .modeling_ffnas import FFNASConfig, FFNASModel, FFNASPreTrainedModel

IGNORED_LABEL = -100


@dataclass
class FFNASTokenClassifierOutput(TokenClassifierOutput):
    """logits [B, S, num_labels]; `answer` of a CRF: below them its transitions, start and end, the same for all."""

    answer: Tensor | None = None


class FFNASForTokenClassification(FFNASPreTrainedModel):
    """Dropout, linear; `decode` gives the best sequence of tags."""

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__(config)
        self.ffnas = FFNASModel(config, add_pooling_layer=False)
        p = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(p)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.transitions = self.start = self.end = None
        if config.token_head == "crf":
            tags = config.num_labels
            self.transitions = nn.Parameter(torch.zeros(tags, tags))
            self.start, self.end = nn.Parameter(torch.zeros(tags)), nn.Parameter(torch.zeros(tags))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> FFNASTokenClassifierOutput | tuple:
        """logits [B, S, num_labels]; `labels` [B, S] class ids, -100 where a token has none."""
        out = self.ffnas(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(out.last_hidden_state))
        loss = answer = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
        if self.transitions is not None:
            rows = torch.cat([self.transitions, self.start[None], self.end[None]])
            answer = torch.cat([logits, rows.expand(logits.shape[0], -1, -1)], dim=1)
        output = FFNASTokenClassifierOutput(loss, logits, out.hidden_states, out.attentions, answer)
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def decode(self, logits: Tensor, words: Tensor) -> list[list[int]]:
        """The best tags of the words of every sequence; Viterbi's algorithm where there are transitions.

        Args:
            logits: [B, S, num_labels].
            words: [B, S] true at the first token of every word.
        """
        found = []
        for scores, places in zip(logits, words.to(torch.bool), strict=True):
            rows = scores[places]
            if self.transitions is None or not len(rows):
                found.append(rows.argmax(-1).tolist())
                continue
            best, back = rows[0] + self.start, []
            for row in rows[1:]:
                reached, before = (best[:, None] + self.transitions).max(0)
                best = reached + row
                back.append(before)
            tags = [int((best + self.end).argmax())]
            for before in reversed(back):
                tags.append(int(before[tags[-1]]))
            found.append(tags[::-1])
        return found
