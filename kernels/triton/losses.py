"""The KD losses on Triton kernels (`kernels.triton.loss_kernels`); functions as in `kernels.reference.losses`.

score_mse: one launch for the loss and the gradients of all layers' queries, one for those of their keys. `auto` takes
the tiled form, and for long sequences (`_gram_pays`) tries the Gram form first: three launches more, the first of which
decides head by head on the device whether its error is proven to be at most 1e-3, and leaves the other heads to the
tiled kernels. So nothing is read by the host.

hidden_mse: a product with the difference as its epilogue, whose result feeds the products of both gradients. It exists
for at most `CHUNK` tokens of one layer at a time, never for all. One launch adds all layers' sums.

Rejected: one kernel for difference and state gradient. Its accumulator is H_s columns wide, 35000 floats for 64 tokens,
and it reads the whole projection twice for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.reference.losses import GRAM_MAX_RELATIVE_ERROR, gradient_like
from kernels.triton import attention, loss_kernels, tuning
from kernels.triton.attention import padded_width, readable, same_dtype, shares, total
from kernels.triton.gemm import ffn_weight_grad_kernel
from kernels.triton.launch import interpreted, launch
from kernels.triton.layout import alignment, padded
from kernels.triton.products import precision, readable_width

CHUNK = 8192
"""Tokens whose difference exists at a time in `hidden_mse`: 12 MB in bfloat16 at H_t = 768."""

LARGEST_GRAM_HEAD = 64
"""Grams of 64 x 64 float64 are what a program's registers hold."""

_PROVEN, _TAKE_IT = GRAM_MAX_RELATIVE_ERROR, -1.0
"""Limits of the Gram form's error; see `score_gram_kernel`."""

_GROUP = 2048
"""Tokens whose part of the projection's gradient is summed by one program."""

Tensors = Sequence[Tensor]


def _gram_pays(length: int, d_s: int, d_t: int, dtype: torch.dtype) -> bool:
    """Whether `auto` tries the Gram form, O(S d²) in float64 against O(S² d) in the inputs' dtype.

    By the rates of an H100 (float64 to float32 to bfloat16 about 1 : 1 : 15, without and with tensor cores); not yet
    measured on a device.
    """
    widest = max(d_s, d_t)
    return widest <= LARGEST_GRAM_HEAD and length > (3 if dtype == torch.float32 else 24) * (d_s + d_t)


def score_mse(
    q_s: Tensors, k_s: Tensors, q_t: Tensors, k_t: Tensors, mask: Tensor, scale_s: float, scale_t: float,
    method: str, tile: int, gradients: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Loss, and gradients for q_s, then k_s. Tiles have the kernels' own size; "dense" is tiled here."""
    del tile
    layers = len(q_s)
    grads = [gradient_like(x) for x in (*q_s, *k_s)] if gradients else []
    if not mask.numel() or not q_s[0].numel() or not q_t[0].numel():
        return torch.zeros((), dtype=torch.float32, device=mask.device), [g.zero_() for g in grads]
    dense = [same_dtype(*group) for group in (q_s, k_s, q_t, k_t)]
    own = same_dtype(*dense[0], *dense[1])
    teacher = same_dtype(*dense[2], *dense[3])
    sides = [own[:layers], own[layers:], teacher[:layers], teacher[layers:], grads[:layers], grads[layers:]]
    mask = mask.contiguous()
    share = shares(mask, q_s[0].shape[1])[0]
    losses = []
    for some in _alike(sides):
        losses += _score_layers(_Scores(*some), mask, share, scale_s, scale_t, method)
    return total(losses[0] if len(losses) == 1 else torch.cat(losses), share), grads


class _Scores(NamedTuple):
    """Layers of one shape and layout."""

    q: list[Tensor]
    k: list[Tensor]
    q_t: list[Tensor]
    k_t: list[Tensor]
    grad_q: list[Tensor]
    grad_k: list[Tensor]


def _alike(sides: list[list[Tensor]]) -> list[list[list[Tensor]]]:
    """`sides` for all layers at once where their strides agree, else layer by layer."""
    if all(x.stride() == side[0].stride() for side in sides for x in side):
        return [sides]
    return [[side[k : k + 1] for side in sides] for k in range(len(sides[0]))]


def _score_layers(s: _Scores, mask: Tensor, share: Tensor, scale_s: float, scale_t: float, method: str) -> list[Tensor]:
    """Launches for layers alike; the sums to be added, float32."""
    layers, (batch, heads, length, d_s), d_t = len(s.q), s.q[0].shape, s.q_t[0].shape[3]
    done, parts = None, []
    if method == "gram" or (method == "auto" and _gram_pays(length, d_s, d_t, s.q[0].dtype)):
        if max(d_s, d_t) > LARGEST_GRAM_HEAD:
            raise ValueError(f"the Gram form serves heads up to {LARGEST_GRAM_HEAD} wide here, got {d_s} and {d_t}")
        done = torch.empty((layers, batch * heads), dtype=torch.int32, device=mask.device)
        parts.append(_gram(s, mask, share, done, scale_s, scale_t, _TAKE_IT if method == "gram" else _PROVEN))
        if method == "gram":
            return parts
    dtype = torch.float32 if torch.float32 in (s.q[0].dtype, s.q_t[0].dtype) else s.q[0].dtype
    c = attention.blocks(dtype, max(padded_width(d_s), padded_width(d_t)), "forward")
    grid = (-(-length // c.queries), batch * heads, layers)
    sums = torch.empty(grid[::-1], dtype=torch.float32, device=mask.device)
    parts.append(sums.flatten())
    directions: list[tuple[Any, ...]] = [(s.q, s.k, s.q_t, s.k_t, s.grad_q, sums)]
    if s.grad_q:
        directions.append((s.k, s.q, s.k_t, s.q_t, s.grad_k, None))
    for own, other, own_t, other_t, grad, out in directions:
        launch(
            loss_kernels.score_mse_kernel, grid,
            tuple(own), tuple(other), tuple(own_t), tuple(other_t), tuple(grad or own), mask.view(torch.uint8), share,
            done, out, *_strides(own, other, own_t, other_t, grad or own), heads, length, scale_s, scale_t,
            LAYERS=layers, D=d_s, D_T=d_t, BD=padded_width(d_s), BD_T=padded_width(d_t), GRADIENT=bool(grad),
            PRECISION=precision(dtype), **c.constants(),
        )  # fmt: skip
    return parts


def _gram(
    s: _Scores, mask: Tensor, share: Tensor, done: Tensor, scale_s: float, scale_t: float, limit: float
) -> Tensor:
    layers, (batch, heads, length, d_s), d_t = len(s.q), s.q[0].shape, s.q_t[0].shape[3]
    width, tasks = max(padded_width(d_s), padded_width(d_t)), batch * heads
    parts = torch.empty((layers, tasks), dtype=torch.float32, device=mask.device)
    grams = parts.new_empty((layers, tasks, 4, width, width)) if s.grad_q else None
    sizes = {"LAYERS": layers, "D": d_s, "D_T": d_t, "BD": width, "stages": 1}
    small = interpreted(loss_kernels.score_gram_kernel)
    launch(
        loss_kernels.score_gram_kernel, (tasks, layers), *(tuple(x) for x in s[:4]), mask.view(torch.uint8), done,
        parts, grams, *_strides(*s[:4]), heads, length, scale_s, scale_t, limit, BK=64 if small else 16, warps=8,
        **sizes,
    )  # fmt: skip
    for own, own_t, grad, first in ((s.q, s.q_t, s.grad_q, 2), (s.k, s.k_t, s.grad_k, 0)) if s.grad_q else ():
        launch(
            loss_kernels.score_gram_grad_kernel, (-(-length // 16), tasks, layers),
            tuple(own), tuple(own_t), tuple(grad), grams, mask.view(torch.uint8), share, done,
            *_strides(own, own_t, grad), heads, length, scale_s, scale_t, first, BM=16, warps=4, **sizes,
        )  # fmt: skip
    return parts.flatten()


def _strides(*sides: list[Tensor]) -> list[int]:
    """Of samples, heads and rows, of each side."""
    return [n for side in sides for n in side[0].stride()[:3]]


def hidden_mse(
    h_s: Tensors, fit: Tensors, h_t: Tensors, mask: Tensor, needs: Sequence[bool], compute_dtype: torch.dtype | None
) -> tuple[Tensor, list[Tensor]]:
    """Loss, and the gradients that `needs` asks for: those of all h_s, the weight's, the bias's."""
    weight, bias = fit[0], fit[1] if len(fit) > 1 else None
    states_needed, weight_needed, bias_needed = needs[0], needs[1], bias is not None and needs[2]
    grads = [gradient_like(h) for h in h_s] if states_needed else []
    wanted = [p for p, n in zip((weight, bias), (weight_needed, bias_needed), strict=True) if n and p is not None]
    if not mask.numel() or not weight.numel():
        shared = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in wanted]
        return torch.zeros((), dtype=torch.float32, device=mask.device), [*(g.zero_() for g in grads), *shared]
    dtype = weight.dtype if compute_dtype is None else compute_dtype
    mask = mask.contiguous().flatten()
    share = shares(mask[None], 1)[1]
    work = _Hidden(weight, bias, dtype, share, (states_needed, weight_needed, bias_needed))
    for k, (h, t) in enumerate(zip(h_s, h_t, strict=True)):
        work.layer(h, t, mask, grads[k] if states_needed else None)
    shared = [work.weight_gradient()] if weight_needed else []
    shared += [work.bias_gradient()] if bias_needed else []
    return total(torch.cat(work.parts), share, 1.0 / weight.shape[0]), [*grads, *shared]


class _Hidden:
    """The launches of one call, layer by layer and chunk by chunk.

    Args:
        weight, bias: of the projection.
        dtype: of the products.
        share: 1 / real tokens.
        needs: gradients of the states, the weight, the bias.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, share: Tensor, needs: tuple[bool, bool, bool]
    ) -> None:
        self.like, self.bias_like = weight, bias
        self.weight, self.bias = readable(weight.to(dtype)), bias
        self.dtype, self.share = dtype, share
        self.states, self.weights, self.biases = needs
        self.factor = 2.0 / weight.shape[0]
        self.parts: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.weight_parts: list[Tensor] = []

    def layer(self, states: Tensor, teacher: Tensor, mask: Tensor, grad: Tensor | None) -> None:
        """One layer; `grad` [B, S, Hs] is written."""
        rows, wanted = readable(states.flatten(0, -2)), readable(teacher.flatten(0, -2))
        out = grad
        if grad is not None and not grad.is_contiguous():
            out = torch.empty_like(grad, memory_format=torch.contiguous_format)
        flat = None if out is None else out.view(rows.shape)
        for first in range(0, rows.shape[0], CHUNK):
            at = slice(first, first + CHUNK)
            own = rows[at].to(self.dtype)
            difference = self._difference(own, wanted[at], mask[at])
            if flat is not None and difference is not None:
                self._state_gradient(difference, flat[at])
            if self.weights and difference is not None:
                self._weight_parts(difference, own)
        if grad is not None and out is not None and out is not grad:
            grad.copy_(out)

    def _difference(self, states: Tensor, teacher: Tensor, mask: Tensor) -> Tensor | None:
        tokens, (columns, depth) = states.shape[0], self.weight.shape
        kept = padded(tokens, columns, self.dtype, states.device) if self.states or self.weights else None
        c = tuning.shipped(tuning.family("linear", self.dtype, 0, columns))
        grid = (-(-columns // c.columns), -(-tokens // c.rows))
        parts = torch.empty(grid[::-1], dtype=torch.float32, device=states.device)
        sums = torch.empty((grid[1], columns), dtype=torch.float32, device=states.device) if self.biases else None
        align_a = alignment([depth, states.stride(0)], [states])
        align_w, align_depth = alignment([self.weight.stride(0)], [self.weight]), alignment([depth], [self.weight])
        peel = align_depth < align_w and align_depth * self.weight.element_size() < 4
        if not peel:
            align_w = align_depth = min(align_w, align_depth)
        launch(
            loss_kernels.hidden_difference_kernel, grid,
            states, self.weight, self.bias, teacher, mask.view(torch.uint8), kept, sums, parts,
            states.stride(0) // align_a, depth // align_a, self.weight.stride(0) // align_w, depth // align_depth,
            teacher.stride(0), 0 if kept is None else kept.stride(0), tokens, columns,
            ALIGN_A=align_a, ALIGN_W=align_w, ALIGN_DEPTH=align_depth, PEEL=peel, PRECISION=precision(self.dtype),
            **c.constants(),
        )  # fmt: skip
        self.parts.append(parts.flatten())
        if sums is not None:
            self.sums.append(sums)
        return kept

    def _state_gradient(self, difference: Tensor, grad: Tensor) -> None:
        tokens, (depth, columns) = difference.shape[0], self.weight.shape
        c = tuning.shipped(tuning.family("linear_bwd", self.dtype, 0, columns))
        align_g = alignment([difference.stride(0)], [difference])
        width = readable_width(self.weight, columns)
        align_w = alignment([width, self.weight.stride(0)], [self.weight])
        launch(
            loss_kernels.hidden_state_grad_kernel, (-(-columns // c.columns), -(-tokens // c.rows)),
            difference, self.weight, self.share, grad, difference.stride(0) // align_g, difference.stride(0) // align_g,
            self.weight.stride(0) // align_w, width // align_w, grad.stride(0), tokens, depth, columns, self.factor,
            ALIGN_G=align_g, ALIGN_W=align_w, PRECISION=precision(self.dtype), **c.constants(),
        )  # fmt: skip

    def _weight_parts(self, difference: Tensor, states: Tensor) -> None:
        tokens, (rows, columns) = difference.shape[0], self.weight.shape
        c = tuning.shipped(tuning.family("weight_grad", self.dtype, 0, rows, columns))
        group = -(-min(_GROUP, tokens) // c.depth) * c.depth
        groups = -(-tokens // group)
        parts = torch.empty((groups, rows * columns), dtype=torch.float32, device=difference.device)
        align_left = alignment([difference.stride(0)], [difference])
        align_right = alignment([columns, states.stride(0)], [states])
        launch(
            ffn_weight_grad_kernel, (-(-columns // c.columns), -(-rows // c.rows), groups),
            difference, states, parts, difference.stride(0) // align_left, difference.stride(0) // align_left,
            states.stride(0) // align_right, columns // align_right, tokens, group, rows, columns,
            ALIGN_LEFT=align_left, ALIGN_RIGHT=align_right, PRECISION=precision(self.dtype), **c.constants(),
        )  # fmt: skip
        self.weight_parts.append(parts)

    def weight_gradient(self) -> Tensor:
        """[Ht, Hs] in the weight's dtype."""
        return self._added(self.weight_parts, self.like)

    def bias_gradient(self) -> Tensor:
        """[Ht] in the bias's dtype."""
        assert self.bias_like is not None
        return self._added(self.sums, self.bias_like)

    def _added(self, parts: list[Tensor], like: Tensor) -> Tensor:
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        launch(
            loss_kernels.scaled_sum_kernel, (-(-like.numel() // 256),), whole, self.share, out, like.numel(),
            whole.shape[0], self.factor, BLOCK=256, warps=2, stages=1,
        )  # fmt: skip
        return out


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: float, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    """Loss T² · mean over rows of -Σ p_t log p_s, and T (p_s - p_t) / rows; logits [..., C]."""
    grads = [torch.empty_like(student, memory_format=torch.contiguous_format)] if gradient else []
    if not student.numel():
        return torch.zeros((), dtype=torch.float32, device=student.device), grads
    classes = student.shape[-1]
    flat = [x.reshape(-1, classes).contiguous() for x in (student, teacher)]
    rows = flat[0].shape[0]
    block = min(1024, padded_width(classes))
    each = max(1, 1024 // block)
    programs = -(-rows // each)
    parts = torch.empty(programs, dtype=torch.float32, device=student.device)
    launch(
        loss_kernels.soft_cross_entropy_kernel, (programs,), *flat, grads[0] if gradient else None, parts, rows,
        classes, 1.0 / temperature, temperature / rows, ROWS=each, BLOCK=block, warps=4, stages=1,
    )  # fmt: skip
    one = torch.ones(1, dtype=torch.float32, device=student.device)
    return total(parts, one, temperature**2 / rows), grads
