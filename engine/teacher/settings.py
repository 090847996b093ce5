"""Settings of the teacher's fine-tuning, and the rules that choose those left open; plain data, so that reading a
configuration loads no framework.

Rejected: reusing `PhaseSettings`. Its clip and fraction make no sense for a teacher, and the seed must belong to the
teacher, so that searches with other seeds share one cached teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import UserError

FEW_ROWS, MANY_ROWS = 4_000, 10_000
FEW_ROWS_EPOCHS, MANY_ROWS_EPOCHS = 4.0, 2.0
LEAST_STEPS, MOST_STEPS, RULE_BATCH = 150, 1_200, 32
"""Bounds of the rule, in steps of `RULE_BATCH` sequences."""
CAPPED_STEPS = 350
"""Steps of `RULE_BATCH` sequences that `max_tokens` leaves in any case."""

NARROW, WIDE = 384, 768
NARROW_LR, WIDE_LR = 2e-4, 5e-5

EVALUATIONS, LEAST_INTERVAL = 8, 50


@dataclass
class FinetuneSettings:
    """Fine-tuning of the teacher on the task: AdamW, linear warm-up and decay, gradients clipped at norm 1.

    Args:
        epochs: passes over the training data; null with max_steps null: 4 for less than 4,000 rows, falling to 2 at
            10,000, but at least 150 and at most 1,200 steps of 32 sequences.
        max_steps: steps; with epochs, the smaller number counts. 0 takes the teacher's head as it is.
        max_tokens: most tokens the rule may train on (rows x their mean length), so that long texts do not take many
            times as long as short ones; 350 steps of 32 sequences are left in any case. Counts only where neither
            epochs nor max_steps are given.
        lr: peak learning rate; null: 2e-4 up to hidden size 384, falling to 5e-5 at 768.
        batch_size: sequences per step.
        weight_decay: decoupled weight decay; biases and LayerNorm are exempt.
        warmup_ratio: share of the steps with rising learning rate.
        dropout: while fine-tuning; null keeps the model's own, and 0 for less than one pass over the rows, where no
            row is seen twice and dropout only costs time.
        patience: evaluations (eight, evenly spread, at least 50 steps apart) in a row without a better result that end
            the training early; null trains to the end. The best weights are kept in any case.
        freeze_embeddings: leave word and position tables as they are.
        reuse_head: where the teacher has a head with the task's label names that is clearly better than the most
            frequent class, take it as it is.
        seed: of a fresh head, the order of the data and dropout.
    """

    epochs: float | None = None
    max_steps: int | None = None
    max_tokens: int | None = None
    lr: float | None = None
    batch_size: int = 32
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    dropout: float | None = None
    patience: int | None = 4
    freeze_embeddings: bool = True
    reuse_head: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fine, rule in (
            ("epochs", self.epochs is None or 0 < self.epochs < float("inf"), "null, or > 0"),
            ("max_steps", self.max_steps is None or self.max_steps >= 0, "null, or >= 0"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "null, or >= 1"),
            ("lr", self.lr is None or 0 < self.lr < float("inf"), "null, or > 0"),
            ("batch_size", self.batch_size >= 1, ">= 1"),
            ("weight_decay", 0 <= self.weight_decay < float("inf"), ">= 0"),
            ("warmup_ratio", 0 <= self.warmup_ratio <= 1, "between 0 and 1"),
            ("dropout", self.dropout is None or 0 <= self.dropout < 1, "null, or >= 0 and < 1"),
            ("patience", self.patience is None or self.patience >= 1, "null, or >= 1"),
        ):
            if not fine:
                raise UserError(f"finetune.{name} is {getattr(self, name)}: it must be {rule}")


def total_steps(settings: FinetuneSettings, rows: int, batches_per_epoch: int, row_tokens: float = 1.0) -> int:
    """Optimizer steps of a fine-tuning on `rows` rows of `row_tokens` tokens on average.

    Args:
        settings: what is asked for.
        rows: of the training data.
        batches_per_epoch: batches they make.
        row_tokens: their mean length.
    """
    if settings.epochs is None and settings.max_steps is None:
        steps = rule_steps(rows, settings.batch_size)
        return capped_steps(steps, settings.max_tokens, settings.batch_size, row_tokens)
    if settings.epochs is None:
        return settings.max_steps or 0
    steps = max(1, round(settings.epochs * batches_per_epoch))
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def rule_steps(rows: int, batch_size: int) -> int:
    """Steps by the size of the data: few rows are seen more often, within bounds on the work.

    4 epochs up to 4,000 rows, 2 from 10,000 on, straight between; at least 150 and at most 1,200 times 32 sequences.
    """
    share = min(1.0, max(0.0, (rows - FEW_ROWS) / (MANY_ROWS - FEW_ROWS)))
    epochs = FEW_ROWS_EPOCHS + share * (MANY_ROWS_EPOCHS - FEW_ROWS_EPOCHS)
    sequences = min(MOST_STEPS * RULE_BATCH, max(LEAST_STEPS * RULE_BATCH, epochs * rows))
    return max(1, round(sequences / batch_size))


def capped_steps(steps: int, max_tokens: int | None, batch_size: int, row_tokens: float) -> int:
    """`steps`, or the fewer that `max_tokens` allows: at least 350 times 32 sequences of them."""
    if max_tokens is None:
        return steps
    allowed = max(CAPPED_STEPS * RULE_BATCH, max_tokens / max(1.0, row_tokens)) / batch_size
    return min(steps, max(1, round(allowed)))


def learning_rate(settings: FinetuneSettings, hidden_size: int) -> float:
    """Peak learning rate; by the rule 2e-4 up to hidden size 384, 5e-5 from 768 on, between them linear in 1/width."""
    if settings.lr is not None:
        return settings.lr
    width = min(max(hidden_size, NARROW), WIDE)
    share = (1 / width - 1 / WIDE) / (1 / NARROW - 1 / WIDE)
    return WIDE_LR + share * (NARROW_LR - WIDE_LR)


def evaluation_interval(total: int) -> int:
    """Steps between two evaluations on `select`: an eighth of them, at least 50."""
    return max(LEAST_INTERVAL, round(total / EVALUATIONS))
