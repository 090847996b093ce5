"""Weights that are Kronecker products `A (x) B`: the product, the nearest one to a full weight, and FFNs with them.

A weight [a1 b1, a2 b2] with A [a1, a2] and B [b1, b2] has the entries W[i1 b1 + i2, j1 b2 + j2] = A[i1, j1] B[i2, j2].
With x of a2 b2 columns read as a matrix X [a2, b2] per row, x W^T is A X B^T: two products of a2 b1 (b2 + a1) or
a1 b2 (a2 + b1) multiply-accumulates, whichever is fewer.

`route` chooses between writing the weight out for the fused kernels, on any backend, and two small products in PyTorch
with the program's segments between them. Both give the same results to the rounding of the dtype. Which is faster when:
docs/performance.md; why there is no kernel for it: docs/decisions/0004.

Sources: Van Loan and Pitsianos, "Approximation with Kronecker Products", 1993 (nearest product); Tahaei et al.,
"KroneckerBERT", NAACL 2022 (as weights of an encoder).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.language.execute import run_segment
from kernels.language.kron_shape import large_first_products, small_first_products
from kernels.language.program import Flag, Segment, WidthRule
from kernels.language.validation import checked_header, checked_words
from kernels.reference.philox import dropout

FEW_TOKENS = 64
MANY_PRODUCTS = 400


class KronWeight(NamedTuple):
    """A weight A (x) B, given by its factors [a1, a2] and [b1, b2]; takes a tensor's place in `kernels.ffn.ops`."""

    a: Tensor
    b: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product."""
        return self.a.shape[0] * self.b.shape[0], self.a.shape[1] * self.b.shape[1]

    @property
    def requires_grad(self) -> bool:
        """Whether a factor does."""
        return self.a.requires_grad or self.b.requires_grad

    def whole(self) -> Tensor:
        """The product [a1 b1, a2 b2]; gradients flow to the factors."""
        (a1, a2), (b1, b2) = self.a.shape, self.b.shape
        return (self.a[:, None, :, None] * self.b[None, :, None, :]).reshape(a1 * b1, a2 * b2)


Weight = Tensor | KronWeight


def whole(weight: Weight) -> Tensor:
    """The weight as one matrix."""
    return weight.whole() if isinstance(weight, KronWeight) else weight


def kron_linear(x: Tensor, weight: KronWeight, bias: Tensor) -> Tensor:
    """x @ (A (x) B)^T + bias by two small products.

    Args:
        x: [T, a2 b2].
        weight: the factors, of x's dtype.
        bias: [a1 b1].

    Returns:
        [T, a1 b1].
    """
    a, b = weight
    (a1, a2), (b1, b2) = a.shape, b.shape
    x = x.reshape(-1, a2, b2)
    if small_first_products(a1, a2, b1, b2) <= large_first_products(a1, a2, b1, b2):
        y = torch.matmul(a, torch.matmul(x, b.T))
    else:
        y = torch.matmul(torch.matmul(a, x), b.T)
    return y.reshape(-1, a1 * b1) + bias


@torch.no_grad()
def nearest_kron(weight: Tensor, small: tuple[int, int]) -> KronWeight:
    """The factors whose product is nearest to `weight` in the Frobenius norm.

    The blocks of `weight`, [b1, b2] each, become rows of a matrix whose best rank-1 approximation (by singular value
    decomposition, in float64) is vec(A) vec(B)^T. The scale is split evenly: both factors get the same norm. The sign
    is that in which B's entry of largest magnitude is positive.

    Args:
        weight: [a1 b1, a2 b2].
        small: shape (b1, b2) of B.

    Raises:
        ValueError: `small` does not divide the weight's shape.
    """
    (rows, columns), (b1, b2) = weight.shape, small
    if rows % b1 or columns % b2:
        raise ValueError(f"factor {list(small)} does not divide a weight of shape {list(weight.shape)}")
    a1, a2 = rows // b1, columns // b2
    blocks = weight.double().reshape(a1, b1, a2, b2).permute(0, 2, 1, 3).reshape(a1 * a2, b1 * b2)
    left, strength, right = _leading(blocks)
    sign = torch.where(right[right.abs().argmax()] < 0, -1.0, 1.0) * strength.sqrt()
    a, b = (left * sign).reshape(a1, a2), (right * sign).reshape(b1, b2)
    return KronWeight(a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous())


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triple (u, s, v); from the Gram matrix of the shorter side, which is small."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    vector = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -1]
    image = tall @ vector
    strength = image.norm()
    other = image / strength if strength > 0 else torch.zeros_like(image)
    return (other, strength, vector) if tall is matrix else (vector, strength, other)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of `kernels.ffn.ops.fused_ffn_stack` with a Kronecker weight; the arguments are that function's.

    Attributes:
        x: [T, H].
        dtype: of the products' operands; elementwise code is float32 (float64 for float64).
    """

    x: Tensor
    w1: Sequence[Weight]
    b1: Sequence[Tensor]
    w2: Sequence[Weight]
    b2: Sequence[Tensor]
    ln_weight: Sequence[Tensor]
    ln_bias: Sequence[Tensor]
    program: Tensor
    p_drop: float
    seed: int | Tensor | None
    eps: float
    dtype: torch.dtype


def is_factored(x: Tensor, w1: Sequence[Weight], w2: Sequence[Weight]) -> bool:
    """Whether `run` computes this call with two small products each, rather than the ordinary kernels."""
    if not w1 or not w2 or x.device.type != "cpu":
        return False
    hidden, inner = x.shape[-1], w1[0].shape[0]
    saved = sum(_saved(w) for w in (w1[0], w2[0]))
    return saved > 0 and (x.shape[0] <= FEW_TOKENS or saved >= MANY_PRODUCTS * (hidden + inner))


def _saved(weight: Weight) -> int:
    if not isinstance(weight, KronWeight):
        return 0
    sizes = (*weight.a.shape, *weight.b.shape)
    own = min(small_first_products(*sizes), large_first_products(*sizes))
    return weight.shape[0] * weight.shape[1] - own


def run_factored(call: Call) -> Tensor:
    """[T, H]: the stack by the factored route, differentiable by autograd.

    Raises:
        ValueError: a tensor's shape does not fit.
    """
    _check(call)
    z = call.x
    for layer in range(len(call.w1)):
        z = _layer(call, layer, z)
    return z


def _layer(call: Call, layer: int, z: Tensor) -> Tensor:
    words = checked_words(call.program)
    x = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)

    def segment(which: Segment, *inputs: Tensor) -> Tensor:
        value = run_segment(words, which, x, *inputs)[0]
        assert value is not None
        return value

    def product(operand: Tensor, weight: Weight, bias: Tensor) -> Tensor:
        operand, bias = operand.to(call.dtype), bias.to(call.dtype)
        if isinstance(weight, KronWeight):
            y = kron_linear(operand, KronWeight(weight.a.to(call.dtype), weight.b.to(call.dtype)), bias)
        else:
            y = torch.nn.functional.linear(operand, weight.to(call.dtype), bias)
        return y.to(x.dtype)

    first = product(
        segment(
            Segment.PRE,
        ),
        call.w1[layer],
        call.b1[layer],
    )
    if checked_header(call.program)[6] & Flag.PARALLEL:
        second = product(segment(Segment.MID), call.w2[layer], call.b2[layer])
        value = segment(Segment.POST, first, second)
    else:
        second = product(segment(Segment.MID, first), call.w2[layer], call.b2[layer])
        value = segment(Segment.POST, second)
    if not call.ln_weight:
        return value.to(z.dtype)
    total = x + _dropout(call, value, layer)
    weight, bias = call.ln_weight[layer].to(x.dtype), call.ln_bias[layer].to(x.dtype)
    return torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, call.eps).to(z.dtype)


def _dropout(call: Call, value: Tensor, layer: int) -> Tensor:
    """With a seed the mask of the fused kernels; without one PyTorch's own, from the default generator too."""
    if call.p_drop == 0.0:
        return value
    if call.seed is None:
        return torch.nn.functional.dropout(value, call.p_drop)
    return dropout(value, call.p_drop, int(call.seed), stream=layer)


def _check(call: Call) -> None:
    hidden, inner = call.x.shape[-1], call.w1[0].shape[0]
    shapes = {"b1": (inner,), "w1": (inner, hidden), "w2": (hidden, inner), "b2": (hidden,)}
    if call.ln_weight:
        shapes |= {"ln_weight": (hidden,), "ln_bias": (hidden,)}
    for name, expected in shapes.items():
        tensors = getattr(call, name)
        if len(tensors) != len(call.w1):
            raise ValueError(f"{name} holds {len(tensors)} tensors, w1 {len(call.w1)}: one per FFN is needed")
        for tensor in tensors:
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(expected)}")
    if not 0.0 <= call.p_drop <= 1.0 or (call.p_drop and not call.ln_weight):
        raise ValueError(f"p_drop={call.p_drop} must lie in [0, 1], and be 0 for the bare expression")
    rule = WidthRule(checked_header(call.program)[5])
    if not rule.allows(hidden, inner):
        raise ValueError(f"the program needs {rule.describe()}, got H={hidden} and d={inner}")
