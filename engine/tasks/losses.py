"""Losses of answers, gold and the teacher's, that several kinds of tasks share; all in float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.data.rows import NO_LABEL
from engine.errors import UserError
from kernels.losses.ops import soft_cross_entropy
from kernels.losses.paper import soft_cross_entropy_paper


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of [N, C] logits over the rows that have a label, 0 where none has; `labels` [N] int64."""
    known = labels != NO_LABEL
    total = F.cross_entropy(logits.float(), labels, ignore_index=NO_LABEL, reduction="sum")
    return total / known.sum().clamp(min=1)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher || student) of [N, C] logits, the mean over rows."""
    own, wanted = ((t.float() / temperature).log_softmax(dim=-1) for t in (student, teacher))
    return temperature**2 * F.kl_div(own, wanted, log_target=True, reduction="batchmean")


def divergence_of_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """[N] KL(teacher || student) of [N, C] logits."""
    own, wanted = (t.float().log_softmax(dim=-1) for t in (student, teacher))
    return (wanted.exp() * (wanted - own)).sum(dim=-1)


def soft_labels(student: Tensor, teacher: Tensor | None, temperature: float, paper_exact: bool) -> Tensor:
    """Soft cross-entropy with temperature of [N, C] logits, mean over rows; see `comparable`."""
    loss = soft_cross_entropy_paper if paper_exact else soft_cross_entropy
    return loss(student, comparable(student, teacher), temperature)


def comparable(student: Tensor, teacher: Tensor | None) -> Tensor:
    """The teacher's outputs.

    Raises:
        UserError: there are none, or they are of another shape than the student's.
    """
    if teacher is None:
        raise UserError("prediction: the teacher gave no logits: load it with a task, or leave the term out")
    if student.shape != teacher.shape:
        raise UserError(
            f"num_labels: the student answers {tuple(student.shape)}, the teacher "
            f"{tuple(teacher.shape)}: both need one output per class"
        )
    return teacher
