"""The reference backend: programs run by PyTorch operations, on any device and in any floating dtype.

Serves every call that no faster backend serves, and float64 checks of the lowering: values come from the forward
segments, gradients from the backward segments (never from autograd).

Matrix products run in the compute dtype through PyTorch; everything between them in float32 (float64 for float64).
Saved for backward, per layer: the layer's input (but not x itself, which the op keeps anyway), h and y (y1 and y2), as
the products gave them. Pre, mid and post values, dropout masks and LayerNorm statistics are computed again.

Rejected: `kernels.reference.ffn` with autograd. It would be as slow, save every intermediate, and leave the backward
segments without a plain executor to compare kernels with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backends.reference_tensor_ops import ReferenceTensorOps
from kernels.call import Backend, FFNCall
from kernels.language.execute import run_segment
from kernels.language.program import Flag, Segment
from kernels.language.validation import checked_words
from kernels.reference.philox import dropout


def load() -> ReferenceBackend:
    """Always available."""
    return ReferenceBackend()


class ReferenceBackend(Backend):
    """See the module."""

    name = "reference"
    tensor_ops = ReferenceTensorOps()

    def supports(self, call: FFNCall) -> str | None:
        return None

    def forward(self, call: FFNCall, save: bool) -> tuple[Tensor, list[Tensor]]:
        z, saved = call.x, []
        for layer in range(call.layers):
            if save and layer > 0:
                saved.append(z)
            z, products = _forward_layer(call, layer, z)
            if save:
                saved += products
        return z.contiguous(), saved

    def saved_like(self, call: FFNCall) -> list[Tensor]:
        x, tokens = call.x, call.tokens
        parallel = bool(call.flags & Flag.PARALLEL)
        like = []
        for layer in range(call.layers):
            if layer > 0:
                like.append(x.new_empty((tokens, call.hidden)))
            widths = [call.hidden if parallel else call.inner, call.hidden]
            like += [x.new_empty((tokens, n), dtype=call.compute_dtype) for n in widths]
        return like

    def backward(
        self,
        call: FFNCall,
        grad_out: Tensor,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
        overwrite: bool = False,
    ) -> list[Tensor]:
        del overwrite
        tensors = [call.x, *call.parameters]
        groups = len(call.parameters) // call.layers
        gradients: list[Tensor | None] = [None] * len(tensors)
        g = grad_out.to(_accumulator(call))
        for layer in reversed(range(call.layers)):
            start = 3 * layer - 1
            z = call.x if layer == 0 else saved[start]
            g, parameters = _backward_layer(call, layer, z, saved[start + 1], saved[start + 2], g)
            for group in range(groups):
                gradients[1 + group * call.layers + layer] = parameters[group]
        gradients[0] = g
        return [
            gradient.to(t.dtype).contiguous()
            for gradient, t, need in zip(gradients, tensors, needs, strict=True)
            if need and gradient is not None
        ]


def _accumulator(call: FFNCall) -> torch.dtype:
    return torch.float64 if call.x.dtype == torch.float64 else torch.float32


def _product(call: FFNCall, operand: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """operand @ weight.T + bias in the compute dtype."""
    dtype = call.compute_dtype
    return torch.nn.functional.linear(operand.to(dtype), weight.to(dtype), bias.to(dtype))


def _forward_layer(call: FFNCall, layer: int, z: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(output [T, H] in x.dtype, [h, y] in the compute dtype)."""
    words, dtype = checked_words(call.program), _accumulator(call)
    x = z.to(dtype)
    w1, b1, w2, b2 = call.w1[layer], call.b1[layer], call.w2[layer], call.b2[layer]
    pre, *_ = run_segment(words, Segment.PRE, x)
    assert pre is not None
    first = _product(call, pre, w1, b1)
    if call.flags & Flag.PARALLEL:
        mid, *_ = run_segment(words, Segment.MID, x)
    else:
        mid, *_ = run_segment(words, Segment.MID, x, first.to(dtype))
    assert mid is not None
    second = _product(call, mid, w2, b2)
    post, *_ = run_segment(words, Segment.POST, x, *_post_inputs(call, first, second))
    assert post is not None
    if not call.has_ln:
        out = post.to(z.dtype)
        return out.clone() if out is second else out, [first, second]  # outputs of an op must not share memory
    total = x + _dropout(call, post, layer)
    weight, bias = call.ln_weight[layer].to(dtype), call.ln_bias[layer].to(dtype)
    out = torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, call.eps)
    return out.to(z.dtype), [first, second]


def _post_inputs(call: FFNCall, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
    dtype = _accumulator(call)
    return (first.to(dtype), second.to(dtype)) if call.flags & Flag.PARALLEL else (second.to(dtype), None)


def _dropout(call: FFNCall, value: Tensor, layer: int) -> Tensor:
    return value if call.seed is None else dropout(value, call.p_drop, int(call.seed), stream=layer)


def _backward_layer(
    call: FFNCall, layer: int, z: Tensor, first: Tensor, second: Tensor, g: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """(gradient of the layer's input, of w1, b1, w2, b2 and LayerNorm's two), all in the accumulator dtype."""
    words, dtype = checked_words(call.program), _accumulator(call)
    x = z.to(dtype)
    a, b = _post_inputs(call, first, second)
    dx = torch.zeros_like(x)
    norm: list[Tensor] = []
    if call.has_ln:
        post, *_ = run_segment(words, Segment.POST, x, a, b)
        assert post is not None
        g, *norm = _layer_norm_backward(call, layer, x + _dropout(call, post, layer), g)
        dx += g
        g = _dropout(call, g, layer)
    _, dx_post, da, db = run_segment(words, Segment.POST_BWD, x, a, b, g)
    _accumulate(dx, dx_post)
    assert da is not None
    if call.flags & Flag.PARALLEL:
        assert db is not None
        first_grads = _branch(call, Segment.PRE, x, call.w1[layer], da, dx)
        second_grads = _branch(call, Segment.MID, x, call.w2[layer], db, dx)
        return dx, [*first_grads, *second_grads, *norm]
    h = first.to(dtype)
    dm = _matmul(call, da, call.w2[layer])
    mid, dx_mid, dh, _ = run_segment(words, Segment.MID_BWDV, x, h, g=dm)
    _accumulate(dx, dx_mid)
    assert mid is not None
    assert dh is not None
    second_grads = [_matmul(call, da.T, mid), da.sum(0)]
    return dx, [*_branch(call, Segment.PRE, x, call.w1[layer], dh, dx), *second_grads, *norm]


def _layer_norm_backward(call: FFNCall, layer: int, total: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = (t[layer].to(total.dtype) for t in (call.ln_weight, call.ln_bias))
    shape = list(total.shape[-1:])
    _, mean, rstd = torch.native_layer_norm(total, shape, weight, bias, call.eps)
    return torch.ops.aten.native_layer_norm_backward(g, total, shape, mean, rstd, weight, bias, [True, True, True])


def _branch(call: FFNCall, segment: Segment, x: Tensor, weight: Tensor, g: Tensor, dx: Tensor) -> list[Tensor]:
    """Gradients of a product whose operand depends on x alone; adds the operand's share to `dx`."""
    operand, dx_own, *_ = run_segment(
        checked_words(call.program), Segment(segment + Segment.PRE_BWDV), x, g=_matmul(call, g, weight)
    )
    assert operand is not None
    _accumulate(dx, dx_own)
    return [_matmul(call, g.T, operand), g.sum(0)]


def _matmul(call: FFNCall, a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the compute dtype, as the accumulator dtype."""
    return (a.to(call.compute_dtype) @ b.to(call.compute_dtype)).to(_accumulator(call))


def _accumulate(dx: Tensor, own: Tensor | None) -> None:
    """Adds a segment's x gradient to the columns it has in common with dx."""
    if own is not None:
        columns = min(own.shape[-1], dx.shape[-1])
        dx[..., :columns] += own[..., :columns]
