"""The FFN op's benchmark cases: shapes, inputs, and the sides that are compared.

Sides take no arguments and run the same mathematics on the same tensors:

    eager     plain PyTorch (`kernels.reference.ffn`), what a user writes without ffnas
    compile   the same under torch.compile, one graph per case, steady state
    ffnas     `fused_ffn`, which packs the weights in every call
    kept      the same with parameters, whose packed weights are kept (`kernels.backends.packed_weights`); forward only
    floor     the matrix products alone on oneDNN, weights packed beforehand: what no fusion can go below
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import fused_ffn, parse_expression
from kernels.reference.ffn import ffn

RELEASED = (
    "tanh(linear(gelu(linear(x,wb1)),wb2))",
    "elu(linear(gelu(linear(x,wb1)),wb2))",
    "sigmoid(linear(relu(linear(x,wb1)),wb2))",
    "linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)",
    "linear(relu(mul(linear(x,wb1),x)),wb2)",
    "leaky_relu(linear(gelu(linear(x,wb1)),wb2))",
)
"""Expressions of the released EfficientBERT, in layer order."""
HIDDEN = 540
INNER = (540, 270, 180, 135)
TOKENS = (128, 1024, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDES = ("eager", "compile", "ffnas")
COMPILE_MODES = {"compile": "default", "compile-max": "max-autotune-no-cudagraphs"}


@dataclass(frozen=True)
class Case:
    """One benchmark: an expression at a shape and dtype.

    Attributes:
        backward: adds the gradients of x and all parameters.
        autocast: "" or the dtype of the products under autocast; tensors are then float32 (`dtype` "fp32").
    """

    expression: str
    dtype: str
    inner: int
    tokens: int
    backward: bool
    hidden: int = HIDDEN
    device: str = "cpu"
    autocast: str = ""

    def __str__(self) -> str:
        direction = "fwd+bwd" if self.backward else "fwd"
        width = "" if self.hidden == HIDDEN else f" H={self.hidden}"
        return f"{self.precision} {direction} T={self.tokens}{width} d={self.inner} {self.expression}"

    @property
    def precision(self) -> str:
        """The dtype, and that of the products where autocast sets it."""
        return f"{self.dtype}/{self.autocast}" if self.autocast else self.dtype


def inputs(case: Case) -> list[Tensor]:
    """x [T, H], w1 [d, H], b1, w2 [H, d], b2, LayerNorm weight and bias; leaves that require gradients if asked for."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner = case.hidden, case.inner
    shapes = ((case.tokens, hidden), (inner, hidden), (inner,), (hidden, inner), (hidden,), (hidden,), (hidden,))
    scales = (1.0, hidden**-0.5, 0.02, inner**-0.5, 0.02, 0.1, 0.02)
    tensors = [torch.randn(s, generator=generator) * k for s, k in zip(shapes, scales, strict=True)]
    tensors[5] += 1
    return [t.to(case.device, DTYPES[case.dtype]).requires_grad_(case.backward) for t in tensors]


def runner(case: Case, side: str) -> Callable[[], object]:
    """The function to time. Compiling, where the side compiles, happens at the first call.

    Raises:
        ValueError: no side of that name.
    """
    if side == "floor":
        return floor(case)
    tensors = inputs(case)
    expression = parse_expression(case.expression)
    if side == "kept":
        tensors = [tensors[0], *(torch.nn.Parameter(t, requires_grad=False) for t in tensors[1:])]
    if side in ("ffnas", "kept"):
        call = lambda: fused_ffn(*tensors, expression)  # noqa: E731
    elif side == "eager":
        call = lambda: ffn(*tensors, expression)  # noqa: E731
    elif side in COMPILE_MODES:
        torch._dynamo.reset()
        mode = COMPILE_MODES[side]
        compiled = torch.compile(lambda *t: ffn(*t, expression), fullgraph=True, dynamic=False, mode=mode)
        call = lambda: compiled(*tensors)  # noqa: E731
    else:
        raise ValueError(f"side {side!r} is none of {', '.join(SIDES)}, kept, floor")
    if side == "kept" and case.backward:
        raise ValueError("side 'kept' is of forward passes only")
    if case.autocast:
        call = torch.autocast(case.device, dtype=DTYPES[case.autocast])(call)
    if not case.backward:
        return torch.no_grad()(call)
    weight = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(1))
    weight = weight.to(case.device, tensors[0].dtype)

    def both() -> None:
        torch.autograd.grad(call(), tensors, weight)

    return both


def floor(case: Case) -> Callable[[], object]:
    """Two products on oneDNN; six with backward (two for the operands, two for the weights)."""
    x, w1, b1, w2, b2, *_ = (t.detach() for t in inputs(case))
    inner = torch.randn(case.tokens, case.inner).to(x.dtype)
    forward = [_onednn(x, w1, b1), _onednn(inner, w2, b2)]
    gradients = [_onednn(x, w2.T, None), _onednn(inner, w1.T, None)]  # dm = dy @ w2, dp = dh @ w1
    weights = [_onednn(x.T, inner.T, None), _onednn(inner.T, x.T, None)]  # dw2 = dy.T @ m, dw1 = dh.T @ p
    products = [*forward, *gradients, *weights] if case.backward else forward

    def run() -> None:
        for product in products:
            product()

    return torch.no_grad()(run)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    """x @ weight.T + bias on oneDNN, whatever library torch's own `linear` would pick."""
    x, weight = x.contiguous(), weight.contiguous()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
