"""Knowledge-distillation losses in plain PyTorch: the reference of the fused losses.

Shapes: B batch, S sequence length, d head size (student and teacher may differ), H hidden size (may differ).
`mask` [B, S] is boolean, True at real tokens; padded positions are left out of every term, and a batch without real
tokens gives 0. Gradients flow to the student only: teacher tensors are detached here. Losses are computed in fp32
(float64 for float64 inputs), outside any autocast, except that the projection of `hidden_mse` follows autocast.
Nothing here reads a tensor's value on the host, apart from `method="auto"` of `attention_score_mse` on the CPU.

The attention-score loss has three exact forms of

    L = sum over b, h, real i, j of (scale_s q_s[i]·k_s[j] - scale_t q_t[i]·k_t[j])²  /  (heads · sum_b n_b²)

- dense: materializes the [B, heads, S, S] difference and keeps it for the backward pass.
- tiled: blocks of query rows, recomputed in the backward pass; saves q and k only, O(S · tile) memory per head.
- gram: with rows of padded positions set to 0, sum D² = <QsᵀQs, KsᵀKs> - 2 <QsᵀQt, KsᵀKt> + <QtᵀQt, KtᵀKt>, in
  float64: O(S d²) work and no S×S at all. It cancels as the loss falls; see `gram_error_bound`.

Rejected: the Gram form in fp32. At a loss of 1e-6 its relative error is already 4e-3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64
"""Query rows per block of the tiled form; 32..256 differ by less than the noise on a CPU with AVX-512."""

DENSE_MAX_LENGTH = 64
"""Longest sequence for which `auto` keeps the S×S difference (one block of the tiled form)."""

GRAM_MIN_RATIO = 3
"""`auto` tries the Gram form from S > 3 (d_s + d_t); on a CPU with AVX-512 it overtakes the tiled form near 2.5."""

GRAM_MAX_RELATIVE_ERROR = 1e-3
"""Largest guaranteed relative error at which `auto` accepts the Gram form."""

METHODS = ("auto", "dense", "tiled", "gram")


def hidden_mse(h_s: Tensor, fit_weight: Tensor | None, fit_bias: Tensor | None, h_t: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error between projected student states and teacher states over real tokens and the teacher width.

    Args:
        h_s: [B, S, Hs] student states.
        fit_weight: [Ht, Hs] projection, None for the identity (then Hs == Ht).
        fit_bias: [Ht] or None.
        h_t: [B, S, Ht] teacher states.
        mask: [B, S] bool.

    Returns:
        Scalar, fp32 or float64.

    Raises:
        ValueError: shapes do not fit.
    """
    _check_mask(mask, h_s.shape[:-1], h_t.shape[:-1])
    width = h_s.shape[-1] if fit_weight is None else fit_weight.shape[0]
    if width != h_t.shape[-1]:
        raise ValueError(f"hidden_mse: student states are {width} wide after projection, teacher's {h_t.shape[-1]}")
    projected = project(h_s, fit_weight, fit_bias)
    with _autocast_off(h_s):
        difference = _wide(projected) - _wide(h_t.detach())
        total = torch.where(mask.unsqueeze(-1), difference, 0.0).square().sum()
        return total / (mask.sum() * width).clamp(min=1).to(total.dtype)


def project(h_s: Tensor, fit_weight: Tensor | None, fit_bias: Tensor | None) -> Tensor:
    """[B, S, Hs] to [B, S, Ht]; in the weights' dtype, or in autocast's where that is on."""
    if fit_weight is None:
        return h_s
    if not torch.is_autocast_enabled(h_s.device.type):
        h_s = h_s.to(fit_weight.dtype)  # bf16 states of a pass that ran under autocast
    return F.linear(h_s, fit_weight, fit_bias)


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the student under the teacher's softened distribution, T² · mean over rows of -Σ p_t log p_s.

    T² keeps the gradient's size independent of the temperature (Hinton et al., 2015, section 2).

    Args:
        student_logits: [..., C].
        teacher_logits: [..., C].
        temperature: T > 0, divides both logits.

    Returns:
        Scalar, fp32 or float64; 0 when there are no rows.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"soft_cross_entropy: student logits {tuple(student_logits.shape)}, teacher {tuple(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"soft_cross_entropy: temperature must be > 0, got {temperature}")
    rows = max(1, student_logits.numel() // max(1, student_logits.shape[-1]))
    with _autocast_off(student_logits):
        log_p = F.log_softmax(_wide(student_logits) / temperature, dim=-1)
        target = F.softmax(_wide(teacher_logits.detach()) / temperature, dim=-1)
        return -(target * log_p).sum() * (temperature**2 / rows)


def attention_score_mse(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor,
    *,
    scale_s: float | None = None,
    scale_t: float | None = None,
    method: str = "auto",
    tile: int = TILE,
) -> Tensor:
    """Mean squared difference of pre-softmax attention scores over heads and pairs of real tokens.

    Args:
        q_s: [B, heads, S, d_s] student queries; k_s the same shape.
        k_s: student keys.
        q_t: [B, heads, S, d_t] teacher queries; k_t the same shape.
        k_t: teacher keys.
        mask: [B, S] bool.
        scale_s: factor on the student's scores; None for d_s^-0.5, 1.0 when q_s carries it already.
        scale_t: the same for the teacher.
        method: "dense", "tiled", "gram", or "auto": dense up to S = 64, tiled above, and on the CPU gram from
            S > 3 (d_s + d_t) when its relative error is proven to be at most 1e-3 (on other devices that proof would
            need a synchronization).
        tile: query rows per block of the tiled form.

    Returns:
        Scalar, fp32 or float64.

    Raises:
        ValueError: head counts or lengths differ, or an unknown method.
    """
    _check_attention(q_s, k_s, q_t, k_t, mask)
    if method not in METHODS:
        raise ValueError(f"attention_score_mse: method {method!r} is not one of {', '.join(METHODS)}")
    if tile < 1:
        raise ValueError(f"attention_score_mse: tile must be at least 1, got {tile}")
    with _autocast_off(q_s):
        real = mask[:, None, :, None]
        q_s, k_s = _rows(q_s, real, scale_s), _rows(k_s, real, 1.0)
        q_t, k_t = _rows(q_t.detach(), real, scale_t), _rows(k_t.detach(), real, 1.0)
        total = _score_sum(q_s, k_s, q_t, k_t, method, tile)
        pairs = mask.sum(-1).square().sum() * q_s.shape[1]
        return total / pairs.clamp(min=1).to(total.dtype)


def gram_error_bound(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """Upper bound of the absolute error of the Gram form's sum of squares, as computed in float64 (scalar).

    Each of the three terms sums S products twice, multiplies, and sums d² entries and then N = B · heads of them.
    With γ_n = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1) the error is at
    most γ_{2S + d² + N + 4} times the sum of absolute products, and Cauchy-Schwarz bounds that sum, head by head, by
    (|Qs||Ks| + |Qt||Kt|)² in Frobenius norms. Holds whatever the order of summation.

    Args:
        q_s: [..., S, d_s] with scale applied and padded rows 0, as the other three.
        k_s: student keys.
        q_t: teacher queries.
        k_t: teacher keys.
    """
    norm = [torch.linalg.vector_norm(x.detach().double(), dim=(-2, -1)) for x in (q_s, k_s, q_t, k_t)]
    terms = 2 * q_s.shape[-2] + max(q_s.shape[-1], q_t.shape[-1]) ** 2 + 4 + q_s[..., 0, 0].numel()
    return terms * 2.0**-53 * 1.01 * (norm[0] * norm[1] + norm[2] * norm[3]).square().sum()


def _score_sum(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, method: str, tile: int) -> Tensor:
    if method == "auto":
        length = q_s.shape[-2]
        if length <= DENSE_MAX_LENGTH:
            method = "dense"
        else:
            method = "tiled"
            long = length > GRAM_MIN_RATIO * (q_s.shape[-1] + q_t.shape[-1])
            if long and q_s.device.type == "cpu" and not torch.compiler.is_compiling():
                total = _score_sum_gram(q_s, k_s, q_t, k_t)
                bound = gram_error_bound(q_s, k_s, q_t, k_t)
                # total may itself be off by the bound, hence the 1 + 1e-3
                if bool(bound * (1 + GRAM_MAX_RELATIVE_ERROR) <= GRAM_MAX_RELATIVE_ERROR * total.detach()):
                    return total.to(q_s.dtype)
    if method == "dense":
        return (q_s @ k_s.mT - q_t @ k_t.mT).square().sum()
    if method == "tiled":
        flat = [x.flatten(0, 1) for x in (q_s, k_s, q_t, k_t)]
        return _TiledScoreSum.apply(*flat, tile)
    return _score_sum_gram(q_s, k_s, q_t, k_t).to(q_s.dtype)


def _score_sum_gram(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """Σ D² in float64 without S×S; padded rows are 0."""
    q_s, k_s, q_t, k_t = (x.double() for x in (q_s, k_s, q_t, k_t))
    heads = (-2, -1)  # within a head first: gram_error_bound relies on it
    student = ((q_s.mT @ q_s) * (k_s.mT @ k_s)).sum(heads)
    cross = ((q_s.mT @ q_t) * (k_s.mT @ k_t)).sum(heads)
    teacher = ((q_t.mT @ q_t) * (k_t.mT @ k_t)).sum(heads)
    return (student - 2 * cross + teacher).sum()


class _TiledScoreSum(torch.autograd.Function):
    """Σ (q_s k_sᵀ - q_t k_tᵀ)² over blocks of query rows; inputs [N, S, d], N = B · heads.

    Saved: the four inputs. Recomputed in backward: the difference, block by block.
    """

    @staticmethod
    def forward(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, tile: int) -> Tensor:
        total = q_s.new_zeros(())
        for begin in range(0, q_s.shape[1], tile):
            total += _difference(q_s, k_s, q_t, k_t, begin, tile).square_().sum()
        return total

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.tile = inputs[4]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_s, k_s, q_t, k_t = ctx.saved_tensors
        d_q, d_k = torch.empty_like(q_s), torch.zeros_like(k_s)
        for begin in range(0, q_s.shape[1], ctx.tile):
            difference = _difference(q_s, k_s, q_t, k_t, begin, ctx.tile)
            rows = slice(begin, begin + ctx.tile)
            d_q[:, rows] = torch.bmm(difference, k_s)
            d_k.baddbmm_(difference.mT, q_s[:, rows])
        return d_q.mul_(2 * grad), d_k.mul_(2 * grad), None, None, None


def _difference(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, begin: int, tile: int) -> Tensor:
    """[N, up to tile, S] block of the score difference."""
    rows = slice(begin, begin + tile)
    return torch.bmm(q_s[:, rows], k_s.mT).baddbmm_(q_t[:, rows], k_t.mT, alpha=-1)


def _rows(x: Tensor, real: Tensor, scale: float | None) -> Tensor:
    """[B, heads, S, d] in fp32 or wider, scaled, with padded rows (NaN included) set to 0."""
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    x = _wide(x)
    return torch.where(real, x if scale == 1.0 else x * scale, 0.0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _autocast_off(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _check_mask(mask: Tensor, *shapes: torch.Size) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (True at real tokens), got {mask.dtype}")
    for shape in shapes:
        if mask.shape != shape:
            raise ValueError(f"mask is {tuple(mask.shape)}, states are {tuple(shape)}: [batch, sequence] must agree")


def _check_attention(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor) -> None:
    for name, q, k in (("student", q_s, k_s), ("teacher", q_t, k_t)):
        if q.ndim != 4 or q.shape != k.shape:
            raise ValueError(
                f"attention_score_mse: {name} queries {tuple(q.shape)} and keys {tuple(k.shape)} "
                "must both be [batch, heads, sequence, head size]"
            )
        _check_mask(mask, torch.Size((q.shape[0], q.shape[2])))
    if q_s.shape[1] != q_t.shape[1]:
        raise ValueError(
            f"attention_score_mse: the student has {q_s.shape[1]} heads, the teacher {q_t.shape[1]}; "
            "the score loss compares head with head, so the counts must be equal"
        )
