"""Attention with its score loss on Triton kernels: the launches of `kernels.triton.attention_kernels`.

The functions have the arguments and results of `kernels.reference.attention`; nothing waits for the device, memory is
only what PyTorch's allocator hands out, and so a call can be captured in a CUDA graph.

Block sizes are by reasoning, not yet measured on a device: as many rows as leave two accumulators and four score tiles
of a block in registers; queries in blocks of 64 read k and v once per 64 rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.reference.losses import gradient_like
from kernels.reference.philox import drop_threshold
from kernels.triton import attention_kernels as kernels
from kernels.triton.launch import interpreted, launch
from kernels.triton.loss_kernels import mask_shares_kernel, total_kernel
from kernels.triton.products import precision

LARGEST_HEAD = {2: 256, 4: 64}
"""By bytes of an element. Wider float32 heads need more than 255 registers a thread: 24 to 264 bytes spilled on sm_90
with blocks of 16 x 16 and 16 x 32."""


class Blocks(NamedTuple):
    """Rows of a block of queries and of keys, warps, pipeline stages, most registers of a thread (0: ptxas decides)."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = 0

    def constants(self) -> dict[str, int]:
        """As arguments of `kernels.triton.launch.launch`."""
        own = {"BM": self.queries, "BN": self.keys, "warps": self.warps, "stages": self.stages}
        return own if self.registers == 0 else {**own, "maxnreg": self.registers}


def padded_width(width: int) -> int:
    """Columns of a tile of heads: the next power of two, at least the 16 that products need."""
    return max(16, triton.next_power_of_2(width))


_BLOCKS = {
    ("forward", 16): (Blocks(64, 64, 4, 2), Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 2)),
    ("queries", 16): (Blocks(64, 64, 8, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 8, 1)),
    ("keys", 16): (Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 8, 1)),
    # left alone, ptxas aims at the next lower occupancy step (128 registers) and spills a few to get there
    ("forward", 32): (Blocks(16, 32, 8, 1, 255),),
    ("queries", 32): (Blocks(32, 32, 8, 1, 255),),
    ("keys", 32): (Blocks(16, 32, 8, 1, 255),),
}
"""(pass, bits of the dtype) -> for heads up to 64, 128 and 256 wide; of float32 up to 64 (`LARGEST_HEAD`)."""


def blocks(dtype: torch.dtype, width: int, which: str) -> Blocks:
    """Blocks of the forward pass, or of backward's launch for "queries" or "keys", for tiles `width` columns wide."""
    if interpreted(kernels.attention_fwd_kernel):
        return Blocks(32, 32, 1, 1)
    return _BLOCKS[which, 8 * dtype.itemsize][(width > 64) + (width > 128)]


def shares(mask: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """1 / (pairs of real tokens in all heads) and 1 / (real tokens), float32 [1] on the device."""
    out = torch.empty(2, dtype=torch.float32, device=mask.device)
    batch, length = mask.shape
    columns = min(1024, max(16, triton.next_power_of_2(max(1, length))))
    launch(
        mask_shares_kernel, (1,), mask.view(torch.uint8), out, batch, length, heads,
        ROWS=max(1, 4096 // columns), COLUMNS=columns, warps=4, stages=1,
    )  # fmt: skip
    return out[:1], out[1:]


def total(parts: Tensor, share: Tensor, factor: float = 1.0) -> Tensor:
    """factor * share * sum of all parts, float32 scalar."""
    out = torch.empty((), dtype=torch.float32, device=parts.device)
    launch(total_kernel, (1,), parts, share, out, parts.numel(), factor, BLOCK=1024, warps=4, stages=1)
    return out


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, p_drop: float, seed: Tensor | None,
    q_t: Tensor | None, k_t: Tensor | None, scale_t: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """context [B, S, heads, d], lse float32 [B, heads, S], loss (0 without a teacher)."""
    batch, heads, length, width = q.shape
    context = q.new_empty((batch, length, heads, width))
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    if not q.numel():
        return context, lse, torch.zeros((), dtype=torch.float32, device=q.device)
    heads_in = _Heads(q, k, v, mask, q_t, k_t)
    c = blocks(heads_in.dtype, heads_in.widest, "forward")
    grid = (-(-length // c.queries), batch * heads)
    parts = None if q_t is None else q.new_empty(grid[::-1], dtype=torch.float32)
    launch(
        kernels.attention_fwd_kernel, grid,
        *heads_in.tensors, seed, context, lse, parts, *heads_in.strides, *_strides(context.transpose(1, 2)),
        heads, length, *_dropout(p_drop, scale, scale_t),
        **heads_in.constants(p_drop), **c.constants(),
    )  # fmt: skip
    if parts is None:
        return context, lse, torch.zeros((), dtype=torch.float32, device=q.device)
    return context, lse, total(parts, shares(heads_in.mask, heads)[0])


def backward(
    grad_context: Tensor, grad_loss: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, context: Tensor,
    lse: Tensor, scale: float, p_drop: float, seed: Tensor | None, q_t: Tensor | None, k_t: Tensor | None,
    scale_t: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in their dtypes and layouts."""
    grads = [gradient_like(x) for x in (q, k, v)]
    if not q.numel():
        return grads[0], grads[1], grads[2]
    batch, heads, length, _ = q.shape
    heads_in = _Heads(q, k, v, mask, q_t, k_t)
    grad = readable(grad_context.to(heads_in.q.dtype)).transpose(1, 2)
    delta = torch.empty_like(lse)
    own = grad_loss.to(torch.float32)
    share = own if q_t is None else shares(heads_in.mask, heads)[0]
    settings = (heads, length, *_dropout(p_drop, scale, scale_t))
    constants = heads_in.constants(p_drop)
    constants["LOSS_APART"] = q_t is not None and heads_in.q.dtype == torch.float16
    c = blocks(heads_in.dtype, heads_in.widest, "queries")
    launch(
        kernels.attention_bwd_q_kernel, (-(-length // c.queries), batch * heads),
        grad, *heads_in.tensors, seed, context, lse, delta, own, share, grads[0],
        *_strides(grad), *heads_in.strides, *_strides(context.transpose(1, 2)), *_strides(grads[0]), *settings,
        **constants, **c.constants(),
    )  # fmt: skip
    c = blocks(heads_in.dtype, heads_in.widest, "keys")
    launch(
        kernels.attention_bwd_kv_kernel, (-(-length // c.keys), batch * heads),
        grad, *heads_in.tensors, seed, lse, delta, own, share, grads[1], grads[2],
        *_strides(grad), *heads_in.strides, *_strides(grads[1]), *_strides(grads[2]), *settings,
        **constants, **c.constants(),
    )  # fmt: skip
    return grads[0], grads[1], grads[2]


class _Heads:
    """The operands of a call, readable in place where their last dimension is contiguous."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, q_t: Tensor | None, k_t: Tensor | None
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = same_dtype(q, k, v)
        self.mask = mask.contiguous()
        self.teacher = (None, None) if q_t is None or k_t is None else same_dtype(q_t, k_t)
        self.d, self.d_t = q.shape[3], 1 if q_t is None else q_t.shape[3]
        teacher = self.q.dtype if self.teacher[0] is None else self.teacher[0].dtype
        self.dtype = torch.float32 if torch.float32 in (self.q.dtype, teacher) else self.q.dtype
        self.widest = max(padded_width(self.d), padded_width(self.d_t))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Queries, keys and values, those of the teacher, and the mask, as kernels take them."""
        return (self.q, self.k, self.v, *self.teacher, self.mask.view(torch.uint8))

    @property
    def strides(self) -> list[int]:
        return [s for x in (self.q, self.k, self.v, *self.teacher) for s in _strides(x)]

    def constants(self, p_drop: float) -> dict[str, Any]:
        return {
            "D": self.d, "D_T": self.d_t, "BD": padded_width(self.d), "BD_T": padded_width(self.d_t),
            "LOSS": self.teacher[0] is not None, "DROPOUT": drop_threshold(p_drop) > 0,
            "PRECISION": precision(self.dtype),
        }  # fmt: skip


def same_dtype(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the widest of their dtypes, last dimension contiguous."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return [readable(t.to(dtype)) for t in tensors]


def readable(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of samples, heads and rows."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def _dropout(p: float, scale: float, scale_t: float) -> tuple[int, float, float, float]:
    """(limit, scale, scale_t, dropout's scale): words above limit + 2^31 are kept."""
    return max(drop_threshold(p) - 1, 0) - 2**31, scale, scale_t, 0.0 if p >= 1.0 else 1.0 / (1.0 - p)
