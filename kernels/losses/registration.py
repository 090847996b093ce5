"""The `torch.library` operators under `kernels.losses.ops`.

    ffnas::score_mse(Tensor[] q_s, Tensor[] k_s, Tensor[] q_t, Tensor[] k_t, Tensor mask, float scale_s, float scale_t,
                     str method, int tile, bool gradients) -> (Tensor loss, Tensor[] gradients)
    ffnas::hidden_mse(Tensor[] h_s, Tensor[] fit, Tensor[] h_t, Tensor mask, bool[] needs,
                      ScalarType? compute_dtype) -> (Tensor loss, Tensor[] gradients)
    ffnas::soft_cross_entropy(Tensor student, Tensor teacher, float temperature, bool gradient) -> (Tensor, Tensor[])

A loss returns its gradients beside its value (`kernels.reference.losses`); backward multiplies them by the incoming
factor. Teachers get no gradient. Second derivatives are refused. What an operator returns does not depend on the
backend, so a traced graph may run on any.

Autocast sets the dtype of `hidden_mse`'s projection and leaves the others alone: their inputs are taken as they are.

Chosen: `Library.define`/`impl` with `register_autograd`. Rejected: autograd written by hand as in
`kernels.ffn.autograd`; these are called once a step or once a layer, where its microseconds do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import tensor_ops
from kernels.reference import losses as losses_reference
from kernels.reference.losses import gradient_like

library = torch.library.Library("ffnas", "FRAGMENT")
library.define(
    "score_mse(Tensor[] q_s, Tensor[] k_s, Tensor[] q_t, Tensor[] k_t, Tensor mask, float scale_s, float scale_t,"
    " str method, int tile, bool gradients) -> (Tensor, Tensor[])"
)
library.define(
    "hidden_mse(Tensor[] h_s, Tensor[] fit, Tensor[] h_t, Tensor mask, bool[] needs, ScalarType? compute_dtype)"
    " -> (Tensor, Tensor[])"
)
library.define(
    "soft_cross_entropy(Tensor student, Tensor teacher, float temperature, bool gradient) -> (Tensor, Tensor[])"
)
score_mse = torch.ops.ffnas.score_mse.default
hidden_mse = torch.ops.ffnas.hidden_mse.default
soft_cross_entropy = torch.ops.ffnas.soft_cross_entropy.default

Tensors = Sequence[Tensor]


def _score_mse(q_s: Tensors, k_s: Tensors, q_t: Tensors, k_t: Tensors, mask: Tensor, *rest: Any) -> Any:
    ops = tensor_ops([*q_s, *k_s, *q_t, *k_t], "the score loss")
    return ops.score_mse(q_s, k_s, q_t, k_t, mask, *rest)


def _score_mse_fake(q_s: Tensors, k_s: Tensors, q_t: Tensors, k_t: Tensors, mask: Tensor, *rest: Any) -> Any:
    grads = [gradient_like(x) for x in (*q_s, *k_s)] if rest[-1] else []
    return empty_scalar([*q_s, *k_s, *q_t, *k_t]), grads


def _hidden_mse(
    h_s: Tensors, fit: Tensors, h_t: Tensors, mask: Tensor, needs: Sequence[bool], dtype: torch.dtype | None
) -> Any:
    if fit and (dtype in (None, torch.float32, torch.bfloat16) or h_s[0].device.type == "cuda"):
        return tensor_ops([*h_s, *fit, *h_t], "the hidden-state loss").hidden_mse(h_s, fit, h_t, mask, needs, dtype)
    return losses_reference.hidden_mse(h_s, fit, h_t, mask, needs, dtype)


def _hidden_mse_fake(
    h_s: Tensors, fit: Tensors, h_t: Tensors, mask: Tensor, needs: Sequence[bool], dtype: torch.dtype | None
) -> Any:
    grads = [gradient_like(h) for h in h_s] if needs[0] else []
    wanted = [p for p, need in zip(fit, needs[1:], strict=False) if need]
    shared = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in wanted]
    projected = ([] if dtype is not None else fit) if fit else h_s
    return empty_scalar([*h_t, *projected]), [*grads, *shared]


def _soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float, gradient: bool) -> Any:
    ops = tensor_ops([student, teacher], "soft cross-entropy")
    return ops.soft_cross_entropy(student, teacher, temperature, gradient)


def _soft_cross_entropy_fake(student: Tensor, teacher: Tensor, temperature: float, gradient: bool) -> Any:
    grads = [torch.empty_like(student, memory_format=torch.contiguous_format)] if gradient else []
    return empty_scalar([student, teacher]), grads


def empty_scalar(tensors: Tensors) -> Tensor:
    """An uninitialized scalar of the dtype a loss of these tensors has."""
    return tensors[0].new_empty((), dtype=losses_reference.widest(*tensors))


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*output[1])
    ctx.layers = len(inputs[0])


class _OnceDifferentiable(torch.autograd.Function):
    """Gradients as they are; refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("ffnas losses and attention have no second derivative")


def once_differentiable(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, refusing to be differentiated where a graph of them is asked for."""
    return list(_OnceDifferentiable.apply(*gradients)) if torch.is_grad_enabled() else list(gradients)


def _scaled(ctx: Any, grad: Tensor | None) -> list[Tensor]:
    """The saved gradients times the incoming factor."""
    saved = ctx.saved_tensors
    if grad is None or not saved:
        return []
    return once_differentiable([g * grad for g in saved])  # a scalar tensor does not change a gradient's dtype


def _score_mse_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    scaled = _scaled(ctx, grad)
    nothing = [None] * ctx.layers
    pair = (scaled[: ctx.layers], scaled[ctx.layers :]) if scaled else (nothing, nothing)
    return (*pair, nothing, nothing, *[None] * 6)


def _hidden_mse_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    scaled = iter(_scaled(ctx, grad))
    needs_states, *needs_fit = ctx.needs
    states = [next(scaled, None) if needs_states else None for _ in range(ctx.layers)]
    fit = [next(scaled, None) if need else None for need in needs_fit][: ctx.fit]
    return states, fit, [None] * ctx.layers, None, None, None


def _hidden_mse_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*output[1])
    ctx.layers, ctx.fit, ctx.needs = len(inputs[0]), len(inputs[1]), inputs[4]


def _soft_cross_entropy_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    scaled = _scaled(ctx, grad)
    return scaled[0] if scaled else None, None, None, None


def register(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Gives a defined operator its kernel, for every device, and its fake kernel for traces."""
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffnas::{name}", fake, lib=library)


def register_autograd(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives a defined operator its backward pass."""
    torch.library.register_autograd(f"ffnas::{name}", backward, setup_context=setup, lib=library)


def _register_autocast(device: str) -> None:
    key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device))

    def cast(*args: Any) -> Any:
        dtype = args[5]
        if dtype is None and torch.is_autocast_enabled(device) and args[0][0].dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return hidden_mse(*args[:5], dtype)

    hidden_mse.py_impl(key)(cast)
    library.impl("hidden_mse", lambda _, *args: cast(*args), key.name, with_keyset=True)


register("score_mse", _score_mse, _score_mse_fake)
register("hidden_mse", _hidden_mse, _hidden_mse_fake)
register("soft_cross_entropy", _soft_cross_entropy, _soft_cross_entropy_fake)
register_autograd("score_mse", _save_gradients, _score_mse_backward)
register_autograd("hidden_mse", _hidden_mse_setup, _hidden_mse_backward)
register_autograd("soft_cross_entropy", _save_gradients, _soft_cross_entropy_backward)
for _device in ("cpu", "cuda"):
    _register_autocast(_device)
