"""Embedding block of the student: tokens, positions and segments summed, then LayerNorm and dropout.

    trigram      dense([t(i+1), t(i), t(i-1)]) with t the V x E token table and zeros past both ends of the sequence
    factorized   dense(t(i)) with t the V x E token table
    full         t(i) with t the V x H token table

The order next, current, previous is MobileBERT's (Sun et al., ACL 2020, section 3). A padding token is a neighbour like
any other, as there; its row starts at zero and is not trained, so that predictions do not depend on how texts were
batched (docs/decisions/0019).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import UserError
from engine.student.configuration import FFNASConfig
from kernels import readable


class FFNASEmbeddings(nn.Module):
    """Token, position and segment embeddings, [B, S] ids to [B, S, H]."""

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.trigram = config.embedding_type == "trigram"
        self.token_embeddings = nn.Embedding(config.vocab_size, config.token_width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.segment_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        inputs = config.shape.embedding_inputs
        self.dense = nn.Linear(inputs, hidden) if inputs else None
        self.layernorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """[B, S, H].

        Args:
            input_ids: [B, S] token ids; or
            inputs_embeds: [B, S, E] (full embedding: [B, S, H]) rows in place of the token table's.
            token_type_ids: [B, S] segment ids, None for all 0.
            position_ids: [B, S] or [1, S] positions, None for 0..S-1.

        Raises:
            UserError: not exactly one of `input_ids` and `inputs_embeds`, or S is longer than the position table.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("input_ids: give exactly one of input_ids and inputs_embeds")
        tokens = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.dense is not None:
            tokens = self.dense(_with_neighbours(tokens) if self.trigram else tokens)
        x = tokens + self._positions(tokens.shape[1], position_ids, tokens.device)
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, 1, dtype=torch.long, device=x.device)
        return self.dropout(self.layernorm(x + self.segment_embeddings(token_type_ids)))

    def _positions(self, length: int, position_ids: Tensor | None, device: torch.device) -> Tensor:
        if position_ids is not None:
            return self.position_embeddings(position_ids)
        positions = self.position_embeddings
        stored = getattr(positions, "num_embeddings", length)
        if length > stored:
            raise UserError(
                f"input_ids: sequences of {length} tokens, the model has {stored} positions;"
                " truncate the text, or use a larger max_position_embeddings"
            )
        if readable.are_readable(positions) and positions.max_norm is None and readable.are_tensors(positions.weight):
            return positions.weight[:length]
        return positions(torch.arange(length, device=device)[None])


def _with_neighbours(tokens: Tensor) -> Tensor:
    """[B, S, E] to [B, S, 3E]: next, current and previous token, zeros past the ends."""
    following = F.pad(tokens[:, 1:], (0, 0, 0, 1))
    previous = F.pad(tokens[:, :-1], (0, 0, 1, 0))
    return torch.cat([following, tokens, previous], dim=-1)
