# SPDX-License-Identifier: Apache-2.0
"""What an ffnas encoder's sequence heads read: one vector per sequence. Needs torch only."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_ffnas import FFNASConfig

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
}


class Pooler(nn.Module):
    """activation(dense(first token)), or the mean over real tokens; [B, S, H] to [B, H]."""

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size) if config.pooling == "cls" else None
        self.activation = config.pooler_activation

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """`mask` [B, S], 1 or true at real tokens, None where all are."""
        if self.dense is not None:
            return ACTIVATIONS[self.activation](self.dense(hidden[:, 0]))
        if mask is None:
            return hidden.mean(dim=1)
        real = mask.to(hidden.dtype)[:, :, None]
        return (hidden * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
