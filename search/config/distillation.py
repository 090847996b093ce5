"""Configuration of the distillation objective of strategy `paper`, and of how literally that is the published one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class KDConfig:
    """Weights of the distillation terms.

    Args:
        hidden: weight of the hidden-state MSE.
        attention: weight of the attention-score MSE.
        prediction: weight of the prediction term.
        temperature: temperature of the soft cross-entropy.
        paper_exact: do as the published code does wherever docs/paper.md says that it differs: losses, LayerNorm
            epsilon, learning rate, tokenization, the teacher's arithmetic. Needs `strategy: paper`.
        text_teacher: who teaches on text: 'finetuned', the teacher of the task, or 'pretrained', the one it was before.
    """

    hidden: float = 1.0
    attention: float = 1.0
    prediction: float = 1.0
    temperature: float = 1.0
    paper_exact: bool = False
    text_teacher: str = "finetuned"
