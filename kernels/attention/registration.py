"""The `torch.library` operators under `kernels.attention.ops`.

    ffnas::attention_fwd(Tensor q, Tensor k, Tensor v, Tensor mask, float scale, float p_drop, Tensor? seed,
                         Tensor? q_t, Tensor? k_t, float scale_t) -> (Tensor context, Tensor lse, Tensor loss)
    ffnas::attention_bwd(Tensor grad_context, Tensor grad_loss, Tensor q, ... float scale_t) -> (Tensor, Tensor, Tensor)

Saved for backward: the inputs, context and log-sum-exp. Registered as the losses are (`kernels.losses.registration`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import tensor_ops
from kernels.losses.registration import empty_scalar, library, once_differentiable, register, register_autograd
from kernels.reference import losses as losses_reference
from kernels.reference.losses import gradient_like

_ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor mask, {} float scale, float p_drop, Tensor? seed, Tensor? q_t, Tensor? k_t,"
    " float scale_t"
)


library.define(f"attention_fwd({_ATTENTION.format('')}) -> (Tensor, Tensor, Tensor)")
library.define(
    f"attention_bwd(Tensor grad_context, Tensor grad_loss, {_ATTENTION.format('Tensor context, Tensor lse,')})"
    " -> (Tensor, Tensor, Tensor)"
)
attention_fwd = torch.ops.ffnas.attention_fwd.default


attention_bwd = torch.ops.ffnas.attention_bwd.default


def _attention_fwd(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Any) -> Any:
    teacher = [t for t in rest[3:5] if t is not None]
    return tensor_ops([q, k, v, *teacher], "attention").attention_forward(q, k, v, mask, *rest)


def _attention_fwd_fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Any) -> Any:
    batch, heads, length, width = q.shape
    given = [q, k, v, *(t for t in rest[3:5] if t is not None)]
    lse = q.new_empty((batch, heads, length), dtype=losses_reference.widest(*given))
    return q.new_empty((batch, length, heads, width)), lse, empty_scalar(given)


def _attention_bwd(grad_context: Tensor, grad_loss: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    teacher = [t for t in rest[6:8] if t is not None]
    ops = tensor_ops([q, k, v, *teacher], "attention")
    return ops.attention_backward(grad_context, grad_loss, q, k, v, *rest)


def _attention_bwd_fake(grad_context: Tensor, grad_loss: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    return gradient_like(q), gradient_like(k), gradient_like(v)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, mask, scale, p_drop, seed, q_t, k_t, scale_t = inputs
    context, lse, _ = output
    ctx.save_for_backward(q, k, v, mask, context, lse, seed, q_t, k_t)
    ctx.constants = (scale, p_drop, scale_t)


def _attention_backward(ctx: Any, grad_context: Tensor, _: Any, grad_loss: Tensor) -> tuple[Any, ...]:
    q, k, v, mask, context, lse, seed, q_t, k_t = ctx.saved_tensors
    scale, p_drop, scale_t = ctx.constants
    grads = attention_bwd(grad_context, grad_loss, q, k, v, mask, context, lse, scale, p_drop, seed, q_t, k_t, scale_t)
    return (*once_differentiable(grads), *[None] * 7)


register("attention_fwd", _attention_fwd, _attention_fwd_fake)
register("attention_bwd", _attention_bwd, _attention_bwd_fake)
register_autograd("attention_fwd", _attention_setup, _attention_backward)
