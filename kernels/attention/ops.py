"""Attention of the student, with its distillation loss from the same tiles.

`fused_attention` gives softmax(scale q kᵀ) v over real keys and, with a teacher's queries and keys, the attention-score
loss of `kernels.losses.ops`, without an S×S tensor in forward or backward. Saved for backward: the inputs, the context
and one number per row.

In float32 without a teacher it gains nothing over PyTorch's attention; it wins in bfloat16, and with the loss. Times:
docs/performance.md. Above `LONGEST` positions the loss is computed by itself. Why so: docs/decisions/0005.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.attention.registration import attention_fwd
from kernels.dispatch import has_kernels
from kernels.losses.ops import check_attention

LONGEST = {torch.float32: 10.0, torch.bfloat16: math.inf}
"""Longest sequence, in units of d + d_t, up to which one pass is the faster way on a CPU."""


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    p_drop: float = 0.0,
    seed: int | Tensor | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
    scale_t: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over real keys, and the mean squared difference of its scores to a teacher's.

    Args:
        q, k, v: [B, heads, S, d], float32 or bfloat16 (others run the reference), any strides; transposed views of
            [B, S, heads, d] are read in place.
        mask: [B, S] bool, True at real tokens. Padded keys are never attended to; padded queries attend like others.
        scale: factor on q kᵀ; None for d^-0.5.
        p_drop: dropout of the probabilities; the mask is that of `kernels.reference.philox` over rows (b · heads + h) ·
            S + query and columns key.
        seed: 64-bit dropout seed, an int or an int64 tensor of one element; None draws one from torch's generator.
        teacher: its queries and keys [B, heads, S, d_t], not differentiated.
        scale_t: factor on the teacher's scores; None for d_t^-0.5, 1.0 when its queries carry it already.

    Returns:
        context [B, heads, S, d], a transposed view of [B, S, heads, d] memory, in q's dtype, 0 for samples without real
        tokens; and the loss (fp32 or float64 scalar), None without a teacher.

    Raises:
        ValueError: shapes do not fit, or `p_drop` outside [0, 1].
    """
    if v.shape != q.shape:
        raise ValueError(f"fused_attention: values {tuple(v.shape)}, queries {tuple(q.shape)}: must be the same")
    q_t, k_t = (None, None) if teacher is None else (t.detach() for t in teacher)
    check_attention("fused_attention", q, k, q if q_t is None else q_t, k if k_t is None else k_t, mask)
    if not 0.0 <= p_drop <= 1.0:
        raise ValueError(f"p_drop must lie in [0, 1], got {p_drop!r}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    scale_t = (0.0 if q_t is None else q_t.shape[-1] ** -0.5) if scale_t is None else float(scale_t)
    drawn = _seed_tensor(q, seed) if p_drop else None
    context, _, loss = attention_fwd(q, k, v, mask, scale, float(p_drop), drawn, q_t, k_t, scale_t)
    return context.transpose(1, 2), None if teacher is None else loss


def one_pass_pays(q: Tensor, q_t: Tensor) -> bool:
    """Whether attention with the score loss in it beats the two apart, as measured (see the module).

    Depends on devices, dtypes and shapes alone, not on a forced backend, so that a comparison of backends sees the
    same dropout masks. On CUDA: where a backend with such kernels can be loaded; not measured on a device yet.

    Args:
        q: [B, heads, S, d].
        q_t: [B, heads, S, d_t] of the teacher.
    """
    if q.device.type == "cuda":
        return has_kernels(q, q_t)
    if q.device.type != "cpu" or q_t.dtype != q.dtype:
        return False
    longest = LONGEST.get(q.dtype)
    return longest is not None and q.shape[2] <= longest * (q.shape[3] + q_t.shape[3])


def _seed_tensor(x: Tensor, seed: int | Tensor | None) -> Tensor:
    """The dropout seed as int64 [1] on x's device."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    signed = (int(seed) + 2**63) % 2**64 - 2**63
    return torch.full((1,), signed, dtype=torch.int64, device=x.device)
