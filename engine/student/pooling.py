"""From the last layer's output [B, S, H] to one vector per sequence [B, H].

    cls     activation(dense(first token))          BERT's way, and with other activations RoBERTa's, DistilBERT's
            and ELECTRA's classification heads
    mean    mean over the real tokens               sentence encoders' way; no parameters

Rejected: mean pooling with a dense layer behind. Sentence encoders have none, and a fresh one would have to be learned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import UserError
from engine.student.configuration import FFNASConfig


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": _gelu,
    "gelu_erf": F.gelu,
}
"""By `FFNASConfig.pooler_activation`; gelu is the tanh form, as in formulas."""


class Pooler(nn.Module):
    """activation(dense(first token)), [B, S, H] to [B, H]."""

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = config.pooler_activation

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, H]; `attention_mask` is not needed."""
        return _ACTIVATIONS[self.activation](self.dense(hidden[:, 0]))


class MeanPooler(nn.Module):
    """Mean over real tokens, [B, S, H] to [B, H]; zeros for a sequence without any."""

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, H].

        Args:
            hidden: [B, S, H].
            attention_mask: [B, S], true or 1 at real tokens; None where all are.

        Raises:
            UserError: the mask is of another shape, which does not tell which tokens are real.
        """
        if attention_mask is None:
            return hidden.mean(dim=1)
        if attention_mask.dim() != 2:
            raise UserError(
                f"attention_mask: mean pooling needs one of shape [batch, tokens], got {attention_mask.dim()} axes;"
                ' give the tokenizer\'s mask, or build the model with pooling="cls"'
            )
        real = attention_mask.to(device=hidden.device, dtype=hidden.dtype)[:, :, None]
        return (hidden * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)


def build_pooler(config: FFNASConfig) -> Pooler | MeanPooler:
    """The pooler of a configuration."""
    return MeanPooler() if config.pooling == "mean" else Pooler(config)
