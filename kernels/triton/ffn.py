"""One call of the fused FFN op on Triton kernels: the order of launches, what is saved, what is computed again.

Forward, per layer                                        backward, per layer (serial form)
  p = pre(x)                 (not where it is x itself)     dy, dx, dgamma, dbeta, db2 = rows(grad_out)
  h, m = linear(p, w1), mid  (one kernel)                   dh, m, dx += , db1 = dy @ w2, mid_bwdv
  y = linear(m, w2)                                         dw2 = dy.T @ m
  out = rows(x, y)           post, dropout, LayerNorm       dx += , p = dh @ w1, pre_bwdv;   dw1 = dh.T @ p

The parallel form has p1, p2 instead of p, m, and two independent branches backward.

Saved per layer: the layer's input (not x itself), h of the serial form, y (y1, y2) where LayerNorm's input or post's
gradient needs it, LayerNorm's mean and 1 / deviation. p and m are computed again where their products need them, as a
by-product of epilogues that run anyway. Saved h and y have rows rounded up to 16 bytes (`kernels.triton.layout`).

Parameters of another dtype than the products' (autocast) are rounded once per call; everything else is read in place.
Gradients of weights are sums over groups of tokens, added in a fixed order: results are the same on every run and every
device of one kind, whether or not `torch.use_deterministic_algorithms` is on. Adding costs a pass over a few megabytes,
about what atomics would.

Rejected: one kernel for both products. h for 64 tokens and d = 540 fills a third of shared memory, and
products that narrow do not reach the rate of separate ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.call import FFNCall
from kernels.language.program import Flag, Segment
from kernels.triton import products
from kernels.triton.device_program import DeviceProgram
from kernels.triton.layout import padded
from kernels.triton.products import Operand
from kernels.triton.rows import Needs, RowGradients, TritonRows, pre_forward


class Rows(Protocol):
    """See `kernels.triton.rows`."""

    def forward(
        self, call: FFNCall, layer: int, x: Tensor, y: Tensor, y2: Tensor | None, device_program: DeviceProgram,
        save_stats: bool,
    ) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip

    def backward(
        self, call: FFNCall, layer: int, grad_out: Tensor, x: Tensor, y: Tensor | None, y2: Tensor | None,
        stats: Tensor | None, device_program: DeviceProgram, needs: Needs,
    ) -> RowGradients: ...  # fmt: skip


class Saves(NamedTuple):
    """Which tensors forward saves in every layer, in this order after the layer's input."""

    h: bool
    y: bool
    y2: bool
    stats: bool


@dataclass(slots=True)
class _Saved:
    x: Tensor
    h: Tensor | None = None
    y: Tensor | None = None
    y2: Tensor | None = None
    stats: Tensor | None = None


def saves(call: FFNCall) -> Saves:
    parallel = bool(call.flags & Flag.PARALLEL)
    y = call.has_ln or bool(call.flags & Flag.POST_BWD_USES_Y)
    return Saves(not parallel, y, y and parallel, call.has_ln)


def saved_like(call: FFNCall) -> list[Tensor]:
    """Uninitialized tensors of the shapes and dtypes `forward` saves."""
    x, tokens = call.x, call.tokens
    kept = saves(call)
    like = []
    for layer in range(call.layers):
        if layer > 0:
            like.append(x.new_empty((tokens, call.hidden)))
        widths = [call.inner] * kept.h + [call.hidden] * (kept.y + kept.y2)
        like += [padded(tokens, width, call.compute_dtype, x.device) for width in widths]
        if kept.stats:
            like.append(x.new_empty((tokens, 2), dtype=torch.float32))
    return like


def forward(call: FFNCall, save: bool, program: DeviceProgram, rows: Rows | None = None) -> tuple[Tensor, list[Tensor]]:
    """(out [T, H] contiguous in x.dtype, saved tensors, in the order of `saved_like`).

    Args:
        call: the call.
        save: whether backward will follow.
        program: the program on the device, of one tier or the other (`kernels.triton.specialize`).
        rows: the row kernels (`kernels.triton.rows`); None: this package's.
    """
    if call.tokens == 0:
        return call.x.new_empty(call.x.shape), saved_like(call) if save else []
    rows = rows or TritonRows()
    z, saved = call.x, []
    for layer in range(call.layers):
        if save and layer > 0:
            saved.append(z)
        out, kept = _forward_layer(call, layer, z, program, save, rows)
        if save:
            saved += [t for t in kept if t is not None]
        z = out
    return z, saved


def _forward_layer(
    call: FFNCall, layer: int, x: Tensor, program: DeviceProgram, save: bool, rows: Rows
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(layer's output, saved tensors in the order of `Saves`)."""
    kept = saves(call)
    first = _operand(call, x, program, Segment.PRE, Flag.PRE_IDENTITY)
    w1, w2 = (products.weight(call, w[layer]) for w in (call.w1, call.w2))
    b1, b2 = call.b1[layer], call.b2[layer]
    h, y2 = None, None
    if call.flags & Flag.PARALLEL:
        second = _operand(call, x, program, Segment.MID, Flag.MID_IDENTITY)
        y, _ = products.linear(call, first, w1, b1)
        y2, _ = products.linear(call, second, w2, b2)
    else:
        if call.flags & Flag.MID_IDENTITY:
            h, _ = products.linear(call, first, w1, b1)
            m = h
        else:
            m, h = products.linear(call, first, w1, b1, x=x, program=program, save=save)
        y, _ = products.linear(call, Operand(m, m.shape[1]), w2, b2)
    width = call.hidden
    out, stats = rows.forward(call, layer, x, y[:, :width], None if y2 is None else y2[:, :width], program, save)
    return out, (h, y if kept.y else None, y2 if kept.y2 else None, stats)


def _operand(call: FFNCall, x: Tensor, program: DeviceProgram, segment: Segment, identity: Flag) -> Operand:
    """A product's left operand: x itself where that is what the segment gives, else one elementwise pass."""
    if call.flags & identity and x.dtype == call.compute_dtype:
        return Operand(x, call.hidden)
    out = pre_forward(call, x, program, segment)
    return Operand(out, out.shape[1])


def backward(
    call: FFNCall,
    grad_out: Tensor,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    program: DeviceProgram,
    rows: Rows | None = None,
) -> list[Tensor]:
    """Gradients for the inputs with `needs[i]`, in the order x, then `call.parameters`; see `forward`."""
    inputs = [call.x, *call.parameters]
    if call.tokens == 0 or not any(needs):
        return [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t, n in zip(inputs, needs, strict=True) if n]
    rows = rows or TritonRows()
    layers = _saved_layers(call, saved)
    gradients: list[Tensor | None] = [None] * len(inputs)
    g: Tensor | None = grad_out
    for layer in reversed(range(call.layers)):
        wanted = [needs[k] for k in range(1 + layer, len(needs), call.layers)]
        wanted += [False] * (6 - len(wanted))
        deeper = needs[0] or any(needs[1 + k] for k in range(len(inputs) - 1) if k % call.layers < layer)
        if g is None or not (deeper or any(wanted)):
            break
        g, own = _LayerBackward(call, layer, layers[layer], program, rows, wanted, deeper).run(g)
        for k, gradient in enumerate(own[: len(call.parameters) // call.layers]):
            gradients[1 + k * call.layers + layer] = gradient
    gradients[0] = g
    return [t for t, n in zip(gradients, needs, strict=True) if n and t is not None]


def _saved_layers(call: FFNCall, saved: Sequence[Tensor]) -> list[_Saved]:
    rest = iter(saved)
    kept = saves(call)
    layers = []
    for layer in range(call.layers):
        x = call.x if layer == 0 else next(rest)
        layers.append(_Saved(x, *(next(rest) if k else None for k in kept)))
    return layers


class _LayerBackward:
    """Backward of one layer.

    Args:
        wanted: whether the gradients of w1, b1, w2, b2, ln_weight, ln_bias are.
        deeper: whether the gradient of the layer's input is.
    """

    def __init__(
        self, call: FFNCall, layer: int, saved: _Saved, program: DeviceProgram, rows: Rows, wanted: Sequence[bool],
        deeper: bool,
    ) -> None:  # fmt: skip
        self.call, self.layer, self.saved, self.program, self.rows = call, layer, saved, program, rows
        self.w1, self.b1, self.w2, self.b2, self.ln_weight, self.ln_bias = wanted
        self.deeper = deeper
        self.dx: Tensor | None = None

    def run(self, grad_out: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """(gradient of the layer's input in x.dtype or None, those of w1, b1, w2, b2, ln_weight, ln_bias)."""
        call, saved, width = self.call, self.saved, self.call.hidden
        y, y2 = (None if t is None else t[:, :width] for t in (saved.y, saved.y2))
        needs = Needs(self.b1, self.b2, self.ln_weight, self.ln_bias)
        dy, dy2, self.dx, dgamma, dbeta, db_y, db_y2 = self.rows.backward(
            call, self.layer, grad_out, saved.x, y, y2, saved.stats, self.program, needs
        )
        if call.flags & Flag.PARALLEL:
            assert dy2 is not None
            second = self.deeper
            _, dw1 = self._input_branch(dy, self.w1, Segment.PRE, Flag.PRE_IDENTITY, call.w1[self.layer], last=False)
            dx, dw2 = self._input_branch(dy2, self.w2, Segment.MID, Flag.MID_IDENTITY, call.w2[self.layer], last=second)
            return dx, [dw1, db_y, dw2, db_y2, dgamma, dbeta]
        dw2, db1, dh = self._mid(dy)
        dx, dw1 = None, None
        if dh is not None:
            weight = call.w1[self.layer]
            dx, dw1 = self._input_branch(dh, self.w1, Segment.PRE, Flag.PRE_IDENTITY, weight, last=self.deeper)
        return dx, [dw1, db1, dw2, db_y, dgamma, dbeta]

    def _mid(self, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dw2, db1, dh) of the serial form; adds mid's share to dx."""
        call, h = self.call, self.saved.h
        assert h is not None
        identity = bool(call.flags & Flag.MID_IDENTITY)
        m: Tensor | None = h
        dh, db1 = None, None
        if self.deeper or self.w1 or self.b1 or (self.w2 and not identity):
            uses_x = bool(call.flags & Flag.MID_USES_X)
            into = self._partial() if uses_x and self.deeper else None
            m, dh, db1 = products.linear_bwd(
                call, Operand(dy, call.hidden), products.weight(call, call.w2[self.layer]), call.inner, self.program,
                Segment.MID, x=self.saved.x if uses_x else None, h=h, dx_in=into, dx_out=into,
                value=self.w2 and not identity, da=True, bias=call.b1[self.layer] if self.b1 else None,
            )  # fmt: skip
        dw2 = None
        if self.w2:
            right = h if identity or m is None else m
            dw2 = products.weight_grad(Operand(dy, call.hidden), Operand(right, right.shape[1]), call.w2[self.layer])
        return dw2, db1, dh

    def _input_branch(
        self, g: Tensor, weight_wanted: bool, segment: Segment, identity: Flag, weight: Tensor, *, last: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx, dw) of a product whose left operand is a segment of x; `g` is the gradient of the product.

        dx comes back, complete and in x.dtype, where `last`; else it is only added to.
        """
        call, x = self.call, self.saved.x
        plain = bool(call.flags & identity) and x.dtype == call.compute_dtype
        left, operand, dx = Operand(g, g.shape[1]), None, None
        if self.deeper:
            into = None
            if last:
                dx = into = torch.empty((call.tokens, call.hidden), dtype=x.dtype, device=x.device)
            else:
                into = self._partial()
            operand, _, _ = products.linear_bwd(
                call, left, products.weight(call, weight), call.hidden, self.program, segment, x=x,
                dx_in=self.dx, dx_out=into, value=weight_wanted and not plain,
            )  # fmt: skip
        if not weight_wanted:
            return dx, None
        if plain:
            return dx, products.weight_grad(left, Operand(x, call.hidden), weight)
        right = operand if operand is not None else pre_forward(call, x, self.program, segment)
        return dx, products.weight_grad(left, Operand(right, right.shape[1]), weight)

    def _partial(self) -> Tensor:
        """The float32 sum of what reached dx so far, made where there is none."""
        if self.dx is None:
            x = self.saved.x
            self.dx = torch.zeros((x.shape[0], x.shape[1]), dtype=torch.float32, device=x.device)
        return self.dx
