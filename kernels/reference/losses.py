"""The KD losses in plain PyTorch, value and gradients in closed form: any device, any dtype, float64 for checks.

Shapes: L layers, B batch, S sequence length, d head size, H hidden size. Every function returns the loss and, where
asked for, its gradients. The score loss has three exact forms of

    L = sum over layers, b, h, real i, j of (scale_s q_s[i]·k_s[j] - scale_t q_t[i]·k_t[j])²  /  (heads · sum_b n_b²)

    dense   one tile of all query rows
    tiled   blocks of query rows; O(S · tile) memory per head
    gram    padded rows 0, P = [scale_s Q_s, -scale_t Q_t], R = [K_s, K_t], sum D² = <PᵀP, RᵀR> in float64: O(S d²) work
            and no S×S; it cancels as the loss falls, see `gram_error_bound`
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE_MAX_LENGTH = 64
"""Longest sequence for which `auto` takes one tile."""

GRAM_MIN_RATIO = 3
"""`auto` tries the Gram form from S > 3 (d_s + d_t)."""

GRAM_MAX_RELATIVE_ERROR = 1e-3
"""Largest guaranteed relative error at which `auto` accepts the Gram form."""

METHODS = ("auto", "dense", "tiled", "gram")

Tensors = Sequence[Tensor]


def score_mse(
    q_s: Tensors, k_s: Tensors, q_t: Tensors, k_t: Tensors, mask: Tensor, scale_s: float, scale_t: float,
    method: str, tile: int, gradients: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Loss, and gradients for q_s, then k_s; arguments as for `kernels.losses.ops.attention_score_mse_layers`."""
    with autocast_off(mask):
        real = mask[:, None, :, None]
        dtype = widest(*q_s, *k_s, *q_t, *k_t)
        pairs = mask.sum(-1).square().sum() * q_s[0].shape[1]
        total = torch.zeros((), dtype=dtype, device=mask.device)
        d_q, d_k = [], []
        for layer in zip(q_s, k_s, q_t, k_t, strict=True):
            scales = (scale_s, 1.0, scale_t, 1.0)
            own_q, own_k, other_q, other_k = (_rows(x.to(dtype), real, f) for x, f in zip(layer, scales, strict=True))
            value, grad_q, grad_k = _score_sum(own_q, own_k, other_q, other_k, method, tile, gradients)
            total = total + value
            if grad_q is not None and grad_k is not None:
                share = 1.0 / pairs.clamp(min=1).to(grad_q.dtype)
                d_q.append(_like(layer[0], grad_q * (share * scale_s)))
                d_k.append(_like(layer[1], grad_k * share))
        return total / pairs.clamp(min=1).to(total.dtype), [*d_q, *d_k]


def hidden_mse(
    h_s: Tensors, fit: Tensors, h_t: Tensors, mask: Tensor, needs: Sequence[bool], compute_dtype: torch.dtype | None
) -> tuple[Tensor, list[Tensor]]:
    """Loss, and the gradients that `needs` (states, weight, bias) asks for: those of all h_s, the weight's, the bias's.

    Args:
        h_s: L tensors [B, S, Hs].
        fit: weight [Ht, Hs] and bias [Ht], the weight alone, or nothing for the identity.
        h_t: L tensors [B, S, Ht].
        mask: [B, S] bool.
        needs: which gradients.
        compute_dtype: of the projection; None for the weight's dtype.
    """
    with autocast_off(mask):
        count = (mask.sum() * h_t[0].shape[-1]).clamp(min=1)
        total = d_weight = d_bias = torch.zeros((), device=mask.device)
        d_h: list[Tensor] = []
        for student, teacher in zip(h_s, h_t, strict=True):
            projected = student
            if fit:
                dtype = fit[0].dtype if compute_dtype is None else compute_dtype
                projected = F.linear(student.to(dtype), *(p.to(dtype) for p in fit))
            difference = torch.where(mask.unsqueeze(-1), wide(projected) - wide(teacher), 0.0)
            total = total + difference.square().sum()
            if not any(needs):
                continue
            gradient = difference * (2.0 / count.to(difference.dtype))
            if needs[0]:
                d_h.append(_like(student, gradient @ fit[0].to(gradient.dtype) if fit else gradient))
            if fit and needs[1]:
                states = torch.where(mask.unsqueeze(-1), student, 0.0).to(gradient.dtype)
                d_weight = d_weight + gradient.flatten(0, -2).T @ states.flatten(0, -2)
            if fit and needs[2]:
                d_bias = d_bias + gradient.flatten(0, -2).sum(0)
        shared = zip(fit, (d_weight, d_bias), needs[1:], strict=False)
        return total / count.to(total.dtype), [*d_h, *(_shared(p, g) for p, g, need in shared if need)]


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: float, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    """Loss T² · mean over rows of -Σ p_t log p_s, and T (p_s - p_t) / rows; logits [..., C]."""
    rows = max(1, student.numel() // max(1, student.shape[-1]))
    with autocast_off(student):
        log_p = F.log_softmax(wide(student) / temperature, dim=-1)
        target = F.softmax(wide(teacher) / temperature, dim=-1)
        loss = -(target * log_p).sum() * (temperature**2 / rows)
        if not gradient:
            return loss, []
        return loss, [_shared(student, (log_p.exp() - target) * (temperature / rows))]


def gram_error_bound(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """Upper bound of the absolute error of the Gram form's sum of squares, as computed in float64 (scalar).

    Each entry of PᵀP and RᵀR sums S products; w² products of entries (w = d_s + d_t) are summed per head, then
    N = B · heads heads. With γ_n = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, section
    3.1) the error is at most γ_{2S + w² + N + 8} times the sum of absolute products, and Cauchy-Schwarz bounds that
    sum, head by head, by (|Qs||Ks| + |Qt||Kt|)² in Frobenius norms. Holds whatever the order of summation.

    Args:
        q_s: [..., S, d_s] with scale applied and padded rows 0, as the other three.
        k_s: student keys.
        q_t: teacher queries.
        k_t: teacher keys.
    """
    norm = [torch.linalg.vector_norm(x.detach().double(), dim=(-2, -1)) for x in (q_s, k_s, q_t, k_t)]
    width = q_s.shape[-1] + q_t.shape[-1]
    terms = 2 * q_s.shape[-2] + width**2 + 8 + q_s[..., 0, 0].numel()
    return terms * 2.0**-53 * 1.01 * (norm[0] * norm[1] + norm[2] * norm[3]).square().sum()


def _score_sum(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, method: str, tile: int, gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Σ D² with its gradients for q_s and k_s."""
    length = q_s.shape[-2]
    if method == "auto":
        # the proof of the Gram form is a value: only where reading it waits for nobody
        on_cpu = q_s.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and length > GRAM_MIN_RATIO * (q_s.shape[-1] + q_t.shape[-1]):
            result = _gram_sum(q_s, k_s, q_t, k_t, gradients)
            bound = gram_error_bound(q_s, k_s, q_t, k_t)
            # the total may itself be off by the bound, hence the 1 + 1e-3
            if bool(bound * (1 + GRAM_MAX_RELATIVE_ERROR) <= GRAM_MAX_RELATIVE_ERROR * result[0]):
                return result
        method = "dense" if length <= DENSE_MAX_LENGTH else "tiled"
    if method == "gram":
        return _gram_sum(q_s, k_s, q_t, k_t, gradients)
    return _tiled_sum(q_s, k_s, q_t, k_t, max(1, length) if method == "dense" else tile, gradients)


def _tiled_sum(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, tile: int, gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    total = q_s.new_zeros(())
    d_q, d_k = [], torch.zeros_like(k_s)
    for begin in range(0, q_s.shape[-2], tile):
        rows = (..., slice(begin, begin + tile), slice(None))
        difference = q_s[rows] @ k_s.mT - q_t[rows] @ k_t.mT
        total = total + difference.square().sum()
        if gradients:
            d_q.append(2 * difference @ k_s)
            d_k = d_k + 2 * difference.mT @ q_s[rows]
    if not gradients:
        return total, None, None
    return total, torch.cat(d_q, -2) if d_q else d_k, d_k


def _gram_sum(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Σ D² in float64 without S×S; padded rows are 0."""
    dtype, width = q_s.dtype, q_s.shape[-1]
    p, r = torch.cat([q_s, -q_t], -1).double(), torch.cat([k_s, k_t], -1).double()
    gram_p, gram_r = p.mT @ p, r.mT @ r
    # within a head first: gram_error_bound relies on it
    total = (gram_p * gram_r).sum((-2, -1)).sum().clamp(min=0).to(dtype)
    if not gradients:
        return total, None, None
    return total, (2 * p @ gram_r[..., :width]).to(dtype), (2 * r @ gram_p[..., :width]).to(dtype)


def _rows(x: Tensor, real: Tensor, scale: float) -> Tensor:
    """[B, heads, S, d] scaled, with padded rows (NaN included) set to 0."""
    return torch.where(real, x if scale == 1.0 else x * scale, 0.0)


def _like(x: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` in the dtype and layout of x."""
    return gradient_like(x).copy_(gradient)


def _shared(x: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` in the dtype of x, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(gradient)


def gradient_like(x: Tensor) -> Tensor:
    """Uninitialized gradient of x: its dtype, and its memory layout where the last dimension is contiguous."""
    return torch.empty_like(x, memory_format=torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format)


def wide(x: Tensor) -> Tensor:
    """x in the dtype losses are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def widest(*tensors: Tensor) -> torch.dtype:
    """The dtype a call with these tensors is computed in: float64 if any of them has it, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def autocast_off(x: Tensor) -> torch.autocast:
    """No autocast on x's device."""
    return torch.autocast(x.device.type, enabled=False)
