"""Linear layers of an inference pass: several of one input, or one with its residual and LayerNorm.

    fused_linears        x @ w_i.T + b_i for i < 5, as queries, keys and values have it: x is read and packed once
    fused_linear_norm    LayerNorm(residual + x @ w.T + b), the end of an attention block, normalized while in cache

Without gradients: in training `nn.Linear` is as good (docs/decisions/0005). Times: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.dispatch import tensor_ops

MOST_LINEARS = 4
_library = torch.library.Library("ffnas", "FRAGMENT")
_library.define(
    "linear_fwd(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? residual, Tensor[] norm, float eps) -> Tensor[]"
)
linear_fwd = torch.ops.ffnas.linear_fwd.default


def fused_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """x @ w.T + b for every weight.

    Args:
        x: [..., K], float32 or bfloat16 (others run the reference).
        weights: 1 to 4 of [N_i, K], x's dtype.
        biases: [N_i] each.

    Returns:
        [..., N_i] each, x's dtype, without gradients.

    Raises:
        ValueError: shapes, dtypes or their number do not fit.
    """
    _check("fused_linears", x, weights, biases)
    outs = linear_fwd(x.detach(), list(weights), list(biases), None, [], 0.0)
    return [o.view(*x.shape[:-1], o.shape[-1]) for o in outs]


def fused_linear_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, ln_weight: Tensor, ln_bias: Tensor, *, eps: float = 1e-12
) -> Tensor:
    """LayerNorm(residual + x @ weight.T + bias), without gradients.

    Args:
        x: [..., K], float32 or bfloat16 (others run the reference).
        weight, bias: [N, K] and [N].
        residual: [..., N].
        ln_weight, ln_bias: [N].
        eps: LayerNorm's epsilon.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check("fused_linear_norm", x, [weight], [bias])
    if residual.shape != (*x.shape[:-1], weight.shape[0]) or residual.dtype != x.dtype:
        raise ValueError(
            f"fused_linear_norm: residual {tuple(residual.shape)} {residual.dtype} does not fit x {tuple(x.shape)}"
            f" {x.dtype} and weight {tuple(weight.shape)}"
        )
    for name, t in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        if t.shape != weight.shape[:1]:
            raise ValueError(f"fused_linear_norm: {name} {tuple(t.shape)} must be {tuple(weight.shape[:1])}")
    return linear_fwd(x.detach(), [weight], [bias], residual, [ln_weight, ln_bias], eps)[0].view(residual.shape)


def _check(name: str, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    if not 1 <= len(weights) <= MOST_LINEARS or len(weights) != len(biases):
        raise ValueError(f"{name}: {len(weights)} weights and {len(biases)} biases; wanted 1 to {MOST_LINEARS} of both")
    for w, b in zip(weights, biases, strict=True):
        if w.ndim != 2 or w.shape[1] != x.shape[-1] or b.shape != w.shape[:1] or w.dtype != x.dtype:
            raise ValueError(
                f"{name}: weight {tuple(w.shape)} {w.dtype} and bias {tuple(b.shape)} do not fit x {tuple(x.shape)}"
                f" {x.dtype}"
            )


def _rows(t: Tensor) -> Tensor:
    """[..., K] as [rows, K] with neighbouring columns; a matrix of that kind itself, so that it is known again."""
    flat = t if t.ndim == 2 else t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _linear_fwd(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], residual: Tensor | None, norm: Sequence[Tensor],
    eps: float,
) -> list[Tensor]:  # fmt: skip
    given = [x, *weights, *biases, *norm, *([] if residual is None else [residual])]
    own = None if residual is None else _rows(residual)
    weights, vectors = [_rows(w) for w in weights], [[v.contiguous() for v in group] for group in (biases, norm)]
    return tensor_ops(given, "linear layers").linear(_rows(x), weights, vectors[0], own, vectors[1], eps)


def _linear_fwd_fake(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], residual: Tensor | None, norm: Sequence[Tensor],
    eps: float,
) -> list[Tensor]:  # fmt: skip
    del biases, residual, norm, eps
    rows = x.numel() // max(x.shape[-1], 1)
    return [x.new_empty((rows, w.shape[0])) for w in weights]


_library.impl("linear_fwd", _linear_fwd, "CompositeExplicitAutograd")
torch.library.register_fake("ffnas::linear_fwd", _linear_fwd_fake, lib=_library)
