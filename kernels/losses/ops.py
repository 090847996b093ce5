"""Knowledge-distillation losses: mean squared errors of hidden states and attention scores, soft cross-entropy.

Shapes: B batch, S sequence length, d head size (student and teacher may differ), H hidden size (may differ).
`mask` [B, S] is boolean, True at real tokens; padded positions are left out of every term, and a batch without real
tokens gives 0. Gradients flow to the student only. Losses are computed in fp32 (float64 for float64 inputs), whatever
autocast says, except that the projection of `hidden_mse` follows it. Nothing here reads a tensor's value on the host.

Each is one operator of `kernels.losses.registration`. The `_layers` forms take one tensor per layer and give the sum of
the layers' losses. Gradients are computed in forward, beside the loss (docs/decisions/0006).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.losses import registration
from kernels.reference.losses import METHODS, gram_error_bound

__all__ = (
    "METHODS", "attention_score_mse", "attention_score_mse_layers", "gram_error_bound", "hidden_mse",
    "hidden_mse_layers", "project", "soft_cross_entropy",
)  # fmt: skip

TILE = 64
"""Query rows per block of the reference's tiled form; 32..256 differ by less than the noise on a CPU with AVX-512."""


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
    return hidden_mse_layers([h_s], fit_weight, fit_bias, [h_t], mask)


def hidden_mse_layers(
    h_s: Sequence[Tensor], fit_weight: Tensor | None, fit_bias: Tensor | None, h_t: Sequence[Tensor], mask: Tensor
) -> Tensor:
    """Sum over layers of `hidden_mse` through one shared projection; one tensor per layer in `h_s` and `h_t`.

    Raises:
        ValueError: shapes do not fit, or the numbers of layers differ.
    """
    h_s, h_t = list(h_s), list(h_t)
    _check_layers("hidden_mse", h_s, h_t)
    for student, teacher in zip(h_s, h_t, strict=True):
        _check_mask(mask, student.shape[:-1], teacher.shape[:-1])
        width = student.shape[-1] if fit_weight is None else fit_weight.shape[0]
        if width != teacher.shape[-1]:
            raise ValueError(
                f"hidden_mse: student states are {width} wide after projection, teacher's {teacher.shape[-1]}"
            )
        if fit_weight is not None and fit_weight.shape[1] != student.shape[-1]:
            shape = tuple(fit_weight.shape)
            raise ValueError(f"hidden_mse: fit_weight is {shape}, states are {student.shape[-1]} wide")
    fit = [p for p in (fit_weight, fit_bias if fit_weight is not None else None) if p is not None]
    tracked = torch.is_grad_enabled()
    needs = [tracked and any(h.requires_grad for h in h_s), *(tracked and p.requires_grad for p in fit)]
    needs += [False] * (3 - len(needs))
    return registration.hidden_mse(h_s, fit, [h.detach() for h in h_t], mask, needs, _autocast_dtype(h_s[0]))[0]


def project(h_s: Tensor, fit_weight: Tensor | None, fit_bias: Tensor | None) -> Tensor:
    """[B, S, Hs] to [B, S, Ht]; in the weights' dtype, or in autocast's where that is on."""
    if fit_weight is None:
        return h_s
    if not torch.is_autocast_enabled(h_s.device.type):
        h_s = h_s.to(fit_weight.dtype)  # bf16 states of a pass that ran under autocast
    return torch.nn.functional.linear(h_s, fit_weight, fit_bias)


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
    need = torch.is_grad_enabled() and student_logits.requires_grad
    return registration.soft_cross_entropy(student_logits, teacher_logits.detach(), float(temperature), need)[0]


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
        q_s: [B, heads, S, d_s] student queries; k_s the same shape. Any strides; transposed views of [B, S, heads, d]
            are read in place.
        k_s: student keys.
        q_t: [B, heads, S, d_t] teacher queries; k_t the same shape.
        k_t: teacher keys.
        mask: [B, S] bool.
        scale_s: factor on the student's scores; None for d_s^-0.5, 1.0 when q_s carries it already.
        scale_t: the same for the teacher.
        method: "dense", "tiled", "gram", or "auto": the Gram form where it is faster and its relative error is proven
            to be at most 1e-3 (decided head by head by the C++ kernels), else tiles.
        tile: query rows per block of the reference's tiled form.

    Returns:
        Scalar, fp32 or float64.

    Raises:
        ValueError: head counts or lengths differ, or an unknown method.
    """
    return attention_score_mse_layers(
        [q_s], [k_s], [q_t], [k_t], mask, scale_s=scale_s, scale_t=scale_t, method=method, tile=tile
    )


def attention_score_mse_layers(
    q_s: Sequence[Tensor],
    k_s: Sequence[Tensor],
    q_t: Sequence[Tensor],
    k_t: Sequence[Tensor],
    mask: Tensor,
    *,
    scale_s: float | None = None,
    scale_t: float | None = None,
    method: str = "auto",
    tile: int = TILE,
) -> Tensor:
    """Sum over layers of `attention_score_mse`, from one call; one tensor per layer, all layers of one shape.

    Raises:
        ValueError: as there, or the layers differ in number or shape.
    """
    groups = [list(x) for x in (q_s, k_s, q_t, k_t)]
    _check_layers("attention_score_mse", *groups)
    for own_q, own_k, other_q, other_k in zip(*groups, strict=True):
        check_attention("attention_score_mse", own_q, own_k, other_q, other_k, mask)
    for group in groups:
        if any(x.shape != group[0].shape for x in group):
            raise ValueError(f"attention_score_mse: layers differ in shape: {[tuple(x.shape) for x in group]}")
    if method not in METHODS:
        raise ValueError(f"attention_score_mse: method {method!r} is not one of {', '.join(METHODS)}")
    if tile < 1:
        raise ValueError(f"attention_score_mse: tile must be at least 1, got {tile}")
    scale_s = groups[0][0].shape[-1] ** -0.5 if scale_s is None else float(scale_s)
    scale_t = groups[2][0].shape[-1] ** -0.5 if scale_t is None else float(scale_t)
    need = torch.is_grad_enabled() and any(x.requires_grad for x in (*groups[0], *groups[1]))
    teacher = [[x.detach() for x in group] for group in groups[2:]]
    return registration.score_mse(*groups[:2], *teacher, mask, scale_s, scale_t, method, tile, need)[0]


def check_attention(name: str, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor) -> None:
    """Raises `ValueError` unless queries and keys of student and teacher can be compared under `mask`."""
    for who, q, k in (("student", q_s, k_s), ("teacher", q_t, k_t)):
        if q.ndim != 4 or q.shape != k.shape:
            raise ValueError(
                f"{name}: {who} queries {tuple(q.shape)} and keys {tuple(k.shape)} "
                "must both be [batch, heads, sequence, head size]"
            )
        _check_mask(mask, torch.Size((q.shape[0], q.shape[2])))
    if q_s.shape[1] != q_t.shape[1]:
        raise ValueError(
            f"{name}: the student has {q_s.shape[1]} heads, the teacher {q_t.shape[1]}; "
            "the score loss compares head with head, so the counts must be equal"
        )


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _check_layers(name: str, *groups: list[Tensor]) -> None:
    counts = [len(group) for group in groups]
    if not counts[0] or len(set(counts)) > 1:
        raise ValueError(f"{name}: needs the same number of layers (at least one) on both sides, got {counts}")


def _check_mask(mask: Tensor, *shapes: torch.Size) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (True at real tokens), got {mask.dtype}")
    for shape in shapes:
        if mask.shape != shape:
            raise ValueError(f"mask is {tuple(mask.shape)}, states are {tuple(shape)}: [batch, sequence] must agree")
