"""The published code's arithmetic of the KD losses, kept for comparison (`paper_exact`).

Differences from `kernels.losses.ops`, as in `finetune.py` and `utils/utils.py` of the code published with
EfficientBERT: padding counts in every mean; the attention mask is added to the scores as -10000 at padded keys, and
every score <= -100 is replaced by 0 on both sides before the MSE, so real scores below -100 vanish too; soft
cross-entropy is averaged over classes as well as rows and not multiplied by T²; that of question answering leaves out
the first position too, and adds the terms of beginnings and ends.

Chosen: separate, literal functions that do materialize S×S. Rejected: switches inside the exact losses, which would
put two definitions of one term into every fused kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.losses.ops import project

MASKED_SCORE = -10000.0
ZEROED_FROM = -100.0


def hidden_mse_paper(h_s: Tensor, fit_weight: Tensor | None, fit_bias: Tensor | None, h_t: Tensor) -> Tensor:
    """MSE over all positions, padded ones included; shapes as in `kernels.losses.ops.hidden_mse`. Scalar."""
    return F.mse_loss(project(h_s, fit_weight, fit_bias).float(), h_t.detach().float())


def attention_score_mse_paper(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor,
    *,
    scale_s: float | None = None,
    scale_t: float | None = None,
) -> Tensor:
    """MSE over all S×S scores with those <= -100 zeroed; arguments as in `kernels.losses.ops.attention_score_mse`."""
    student = _scores(q_s, k_s, mask, scale_s)
    teacher = _scores(q_t.detach(), k_t.detach(), mask, scale_t)
    return F.mse_loss(student, teacher)


def soft_cross_entropy_paper(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over rows *and classes* of -p_t log p_s, without T². Scalar."""
    log_p = F.log_softmax(student_logits.float() / temperature, dim=-1)
    target = F.softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return (-target * log_p).mean()


def span_soft_cross_entropy_paper(
    student_scores: Tensor, teacher_scores: Tensor, mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """Mean over rows and positions of the two terms' *sum*, positions of padding and the first one masked out. Scalar.

    Args:
        student_scores, teacher_scores: [B, S, 2] scores of beginnings and ends.
        mask: [B, S] bool, True at real tokens.
        temperature: > 0; without T².
    """
    out = ~mask
    out[:, 0] = True
    masked = (out * MASKED_SCORE)[..., None]
    sides = ((own + masked).float().unbind(-1) for own in (student_scores, teacher_scores))
    terms = [soft_cross_entropy_paper(own, wanted, temperature) for own, wanted in zip(*sides, strict=True)]
    return terms[0] + terms[1]


def _scores(q: Tensor, k: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """[B, heads, S, S] masked scores, zeroed where <= -100."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.mT).float() * scale + (~mask)[:, None, None, :] * MASKED_SCORE
    return torch.where(scores <= ZEROED_FROM, 0.0, scores)
