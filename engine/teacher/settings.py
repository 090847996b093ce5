"""Settings of the teacher's fine-tuning; plain data, so that reading a configuration loads no framework.

Rejected: reusing `PhaseSettings`. Its clip and fraction make no sense for a teacher, and the seed must belong to the
teacher, so that searches with other seeds share one cached teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import UserError


@dataclass
class FinetuneSettings:
    """Fine-tuning of the teacher on the task: AdamW, linear warm-up and decay, gradients clipped at norm 1.

    Args:
        epochs: passes over the training data.
        max_steps: stop after this many steps even if `epochs` are not done; 0 takes the teacher's head as it is.
        lr: peak learning rate; 3e-5 to 1e-4 suits most encoders.
        batch_size: sequences per step.
        weight_decay: decoupled weight decay; biases and LayerNorm are exempt.
        warmup_ratio: share of the steps with rising learning rate.
        dropout: while fine-tuning, null keeps the model's own; 0 is faster and suits less than one epoch.
        seed: of a fresh head, the order of the data and dropout.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    lr: float = 5e-5
    batch_size: int = 32
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    dropout: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fine, rule in (
            ("epochs", 0 < self.epochs < float("inf"), "> 0"),
            ("max_steps", self.max_steps is None or self.max_steps >= 0, ">= 0"),
            ("lr", 0 < self.lr < float("inf"), "> 0"),
            ("batch_size", self.batch_size >= 1, ">= 1"),
            ("weight_decay", 0 <= self.weight_decay < float("inf"), ">= 0"),
            ("warmup_ratio", 0 <= self.warmup_ratio <= 1, "between 0 and 1"),
            ("dropout", self.dropout is None or 0 <= self.dropout < 1, "null, or >= 0 and < 1"),
        ):
            if not fine:
                raise UserError(f"finetune.{name} is {getattr(self, name)}: it must be {rule}")
