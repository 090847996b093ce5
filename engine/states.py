"""What distillation sees of an encoder: one record, the same for teacher and student.

Both sides hand over the embedding output, the outputs of chosen layers, and the queries and keys of the same layers
after the head split. Queries carry the softmax scale already, so that `queries[l] @ keys[l].transpose(-1, -2)` is
the pre-softmax score of layer l, before any mask.

Rejected: handing over the scores themselves. They are [B, heads, S, S] per layer, and the score loss needs only the
two factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EncoderStates:
    """Intermediate results of one forward pass of an encoder; H = hidden size, d = head size, S = sequence length.

    Attributes:
        embeddings: [B, S, H] output of the embedding block (after its LayerNorm and dropout).
        hidden: one [B, S, H] per recorded layer, in increasing layer order: the layer's output.
        queries: one [B, heads, S, d] per recorded layer, multiplied by the softmax scale.
        keys: one [B, heads, S, d] per recorded layer.
        logits: output of the task head, None where the model has none or it was not asked for: [B, C], start and end
            scores [B, S, 2] of question answering, or [B / choices, choices] of multiple choice.
    """

    embeddings: Tensor
    hidden: tuple[Tensor, ...] = ()
    queries: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()
    logits: Tensor | None = None


def answers(output: Any) -> Tensor:
    """The logits of any head's output; start and end scores of question answering as one [B, S, 2]."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits
