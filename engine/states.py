"""What distillation sees of an encoder: one record, the same for teacher and student.

Both sides hand over the embedding output, the outputs of chosen layers, and the queries and keys of the same layers
after the head split. Queries carry the softmax scale already, so that `queries[l] @ keys[l].transpose(-1, -2)` is
the pre-softmax score of layer l, before any mask.

Rejected: handing over the scores themselves. They are [B, heads, S, S] per layer, and the score loss needs only the
two factors.
"""

from __future__ import annotations

from collections.abc import Callable
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
        queries: one [B, heads, S, d] per recorded layer that has an attention block, multiplied by the softmax scale.
        keys: one [B, heads, S, d] per recorded layer that has an attention block.
        score_loss: sum over the recorded layers of the attention-score loss, where the pass was given a teacher's
            queries and keys and computed it inside its attention (`engine.student.attention`); queries and keys are
            then not recorded.
        logits: output of the task head, None where the model has none or it was not asked for: [B, C], start and end
            scores [B, S, 2] of question answering, or [B / choices, choices] of multiple choice.
    """

    embeddings: Tensor
    hidden: tuple[Tensor, ...] = ()
    queries: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()
    logits: Tensor | None = None
    score_loss: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> EncoderStates:
        """The same states with `change` applied to each tensor."""
        return EncoderStates(
            change(self.embeddings),
            tuple(map(change, self.hidden)),
            tuple(map(change, self.queries)),
            tuple(map(change, self.keys)),
            None if self.logits is None else change(self.logits),
            None if self.score_loss is None else change(self.score_loss),
        )

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the attributes."""
        seen: list[Tensor] = []
        self.map(lambda t: seen.append(t) or t)  # type: ignore[func-returns-value]
        return seen


class Recorder:
    """Collects `EncoderStates` of a student, layer by layer.

    Args:
        embeddings: [B, S, H].
    """

    def __init__(self, embeddings: Tensor) -> None:
        self.embeddings = embeddings
        self.hidden: list[Tensor] = []
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.losses: list[Tensor] = []

    def add(self, hidden: Tensor, query: Tensor | None, key: Tensor | None, scale: float, loss: Tensor | None) -> None:
        """A layer's output, and its score loss (any shape, summed), or without one its unscaled queries and keys (None
        where it has no attention block)."""
        self.hidden.append(hidden)
        if loss is not None:
            self.losses.append(loss.sum())
        elif query is not None and key is not None:
            self.queries.append(query * scale)
            self.keys.append(key)

    def states(self) -> EncoderStates:
        """What was recorded."""
        loss = torch.stack(self.losses).sum() if self.losses else None
        return EncoderStates(
            self.embeddings, tuple(self.hidden), tuple(self.queries), tuple(self.keys), score_loss=loss
        )


def answers(output: Any) -> Tensor:
    """The logits of any head's output; start and end scores of question answering as one [B, S, 2]."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits
