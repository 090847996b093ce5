"""The `torch.library` operators under `kernels.losses` and `kernels.attention`.

    ffnas::score_mse(Tensor[] q_s, Tensor[] k_s, Tensor[] q_t, Tensor[] k_t, Tensor mask, float scale_s, float scale_t,
                     str method, int tile, bool gradients) -> (Tensor loss, Tensor[] gradients)
    ffnas::hidden_mse(Tensor[] h_s, Tensor[] fit, Tensor[] h_t, Tensor mask, bool[] needs,
                      ScalarType? compute_dtype) -> (Tensor loss, Tensor[] gradients)
    ffnas::soft_cross_entropy(Tensor student, Tensor teacher, float temperature, bool gradient) -> (Tensor, Tensor[])
    ffnas::attention_fwd(Tensor q, Tensor k, Tensor v, Tensor mask, float scale, float p_drop, Tensor? seed,
                         Tensor? q_t, Tensor? k_t, float scale_t) -> (Tensor context, Tensor lse, Tensor loss)
    ffnas::attention_bwd(Tensor grad_context, Tensor grad_loss, Tensor q, ... float scale_t) -> (Tensor, Tensor, Tensor)

A loss returns its gradients beside its value (`kernels.losses_reference`); backward multiplies them by the incoming
factor. Attention saves its inputs, context and log-sum-exp. Teachers get no gradient. Second derivatives are refused.
What an operator returns does not depend on the backend, so a traced graph may run on any.

Autocast sets the dtype of `hidden_mse`'s projection and leaves the others alone: their inputs are taken as they are.

Chosen: `Library.define`/`impl` with `register_autograd`. Rejected: autograd written by hand as in
`kernels.library_autograd`; these are called once a step or once a layer, where its microseconds do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import attention_reference, dispatch, losses_reference
from kernels.losses_reference import gradient_like

_ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor mask, {} float scale, float p_drop, Tensor? seed, Tensor? q_t, Tensor? k_t,"
    " float scale_t"
)
_library = torch.library.Library("ffnas", "FRAGMENT")
_library.define(
    "score_mse(Tensor[] q_s, Tensor[] k_s, Tensor[] q_t, Tensor[] k_t, Tensor mask, float scale_s, float scale_t,"
    " str method, int tile, bool gradients) -> (Tensor, Tensor[])"
)
_library.define(
    "hidden_mse(Tensor[] h_s, Tensor[] fit, Tensor[] h_t, Tensor mask, bool[] needs, ScalarType? compute_dtype)"
    " -> (Tensor, Tensor[])"
)
_library.define(
    "soft_cross_entropy(Tensor student, Tensor teacher, float temperature, bool gradient) -> (Tensor, Tensor[])"
)
_library.define(f"attention_fwd({_ATTENTION.format('')}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"attention_bwd(Tensor grad_context, Tensor grad_loss, {_ATTENTION.format('Tensor context, Tensor lse,')})"
    " -> (Tensor, Tensor, Tensor)"
)
score_mse = torch.ops.ffnas.score_mse.default
hidden_mse = torch.ops.ffnas.hidden_mse.default
soft_cross_entropy = torch.ops.ffnas.soft_cross_entropy.default
attention_fwd = torch.ops.ffnas.attention_fwd.default
attention_bwd = torch.ops.ffnas.attention_bwd.default

Tensors = Sequence[Tensor]

_SERVED_BY = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
"""Backends with losses and attention, in order, per device type; `reference` alone elsewhere."""


def backend_for(tensors: Tensors, what: str) -> Any:
    """The object whose methods serve a call with these tensors; honours `use_backend` and FFNAS_BACKEND.

    Raises:
        BackendError: a strictly demanded backend cannot serve the call.
    """
    forced, strict = dispatch._choice()
    order = _SERVED_BY.get(tensors[0].device.type, ("reference",))
    if forced is not None:
        order = (forced, *(n for n in order if n != forced))
    for name in order:
        if name == "reference":
            return _REFERENCE
        found, reason = _losses_of(name, tensors)
        if reason is None:
            return found
        if strict and name == forced:
            raise dispatch.BackendError(f"backend {name!r} cannot serve {what}: {reason}")
        dispatch._warn_once(name, reason)
    return _REFERENCE


def has_kernels(*tensors: Tensor) -> bool:
    """Whether a backend other than the reference can be loaded that serves these tensors, whatever is forced."""
    names = _SERVED_BY.get(tensors[0].device.type, ())
    return any(_losses_of(name, tensors)[1] is None for name in names if name != "reference")


def _losses_of(name: str, tensors: Tensors) -> tuple[Any, str | None]:
    """The backend's losses, or why they cannot serve these tensors."""
    backend = dispatch.load_backend(name)
    if isinstance(backend, str):
        return None, backend
    losses = getattr(backend, "losses", None)
    if losses is None:
        return None, "it has no losses and no attention"
    return losses, losses.supports(tensors)


class _Reference:
    score_mse = staticmethod(losses_reference.score_mse)
    hidden_mse = staticmethod(losses_reference.hidden_mse)
    soft_cross_entropy = staticmethod(losses_reference.soft_cross_entropy)
    attention_forward = staticmethod(attention_reference.forward)
    attention_backward = staticmethod(attention_reference.backward)

    @staticmethod
    def linear(
        x: Tensor, weights: Tensors, biases: Tensors, residual: Tensor | None, norm: Tensors, eps: float
    ) -> list[Tensor]:
        outs = [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        if residual is None:
            return outs
        return [torch.nn.functional.layer_norm(residual + outs[0], outs[0].shape[-1:], *norm, eps)]


_REFERENCE = _Reference()


def _score_mse(q_s: Tensors, k_s: Tensors, q_t: Tensors, k_t: Tensors, mask: Tensor, *rest: Any) -> Any:
    backend = backend_for([*q_s, *k_s, *q_t, *k_t], "the score loss")
    return backend.score_mse(q_s, k_s, q_t, k_t, mask, *rest)


def _score_mse_fake(q_s: Tensors, k_s: Tensors, q_t: Tensors, k_t: Tensors, mask: Tensor, *rest: Any) -> Any:
    grads = [gradient_like(x) for x in (*q_s, *k_s)] if rest[-1] else []
    return _scalar([*q_s, *k_s, *q_t, *k_t]), grads


def _hidden_mse(
    h_s: Tensors, fit: Tensors, h_t: Tensors, mask: Tensor, needs: Sequence[bool], dtype: torch.dtype | None
) -> Any:
    if fit and (dtype in (None, torch.float32, torch.bfloat16) or h_s[0].device.type == "cuda"):
        backend = backend_for([*h_s, *fit, *h_t], "the hidden-state loss")
    else:
        backend = _REFERENCE
    return backend.hidden_mse(h_s, fit, h_t, mask, needs, dtype)


def _hidden_mse_fake(
    h_s: Tensors, fit: Tensors, h_t: Tensors, mask: Tensor, needs: Sequence[bool], dtype: torch.dtype | None
) -> Any:
    grads = [gradient_like(h) for h in h_s] if needs[0] else []
    wanted = [p for p, need in zip(fit, needs[1:], strict=False) if need]
    shared = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in wanted]
    projected = ([] if dtype is not None else fit) if fit else h_s
    return _scalar([*h_t, *projected]), [*grads, *shared]


def _soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float, gradient: bool) -> Any:
    backend = backend_for([student, teacher], "soft cross-entropy")
    return backend.soft_cross_entropy(student, teacher, temperature, gradient)


def _soft_cross_entropy_fake(student: Tensor, teacher: Tensor, temperature: float, gradient: bool) -> Any:
    grads = [torch.empty_like(student, memory_format=torch.contiguous_format)] if gradient else []
    return _scalar([student, teacher]), grads


def _attention_fwd(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Any) -> Any:
    teacher = [t for t in rest[3:5] if t is not None]
    return backend_for([q, k, v, *teacher], "attention").attention_forward(q, k, v, mask, *rest)


def _attention_fwd_fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Any) -> Any:
    batch, heads, length, width = q.shape
    given = [q, k, v, *(t for t in rest[3:5] if t is not None)]
    lse = q.new_empty((batch, heads, length), dtype=losses_reference.widest(*given))
    return q.new_empty((batch, length, heads, width)), lse, _scalar(given)


def _attention_bwd(grad_context: Tensor, grad_loss: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    teacher = [t for t in rest[6:8] if t is not None]
    backend = backend_for([q, k, v, *teacher], "attention")
    return backend.attention_backward(grad_context, grad_loss, q, k, v, *rest)


def _attention_bwd_fake(grad_context: Tensor, grad_loss: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    return gradient_like(q), gradient_like(k), gradient_like(v)


def _scalar(tensors: Tensors) -> Tensor:
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


def _final(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, refusing to be differentiated where a graph of them is asked for."""
    return list(_OnceDifferentiable.apply(*gradients)) if torch.is_grad_enabled() else list(gradients)


def _scaled(ctx: Any, grad: Tensor | None) -> list[Tensor]:
    """The saved gradients times the incoming factor."""
    saved = ctx.saved_tensors
    if grad is None or not saved:
        return []
    return _final([g * grad for g in saved])  # a scalar tensor does not change a gradient's dtype


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


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, mask, scale, p_drop, seed, q_t, k_t, scale_t = inputs
    context, lse, _ = output
    ctx.save_for_backward(q, k, v, mask, context, lse, seed, q_t, k_t)
    ctx.constants = (scale, p_drop, scale_t)


def _attention_backward(ctx: Any, grad_context: Tensor, _: Any, grad_loss: Tensor) -> tuple[Any, ...]:
    q, k, v, mask, context, lse, seed, q_t, k_t = ctx.saved_tensors
    scale, p_drop, scale_t = ctx.constants
    grads = attention_bwd(grad_context, grad_loss, q, k, v, mask, context, lse, scale, p_drop, seed, q_t, k_t, scale_t)
    return (*_final(grads), *[None] * 7)


def _register(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffnas::{name}", fake, lib=_library)


def _register_autograd(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"ffnas::{name}", backward, setup_context=setup, lib=_library)


def _register_autocast(device: str) -> None:
    key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device))

    def cast(*args: Any) -> Any:
        dtype = args[5]
        if dtype is None and torch.is_autocast_enabled(device) and args[0][0].dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return hidden_mse(*args[:5], dtype)

    hidden_mse.py_impl(key)(cast)
    _library.impl("hidden_mse", lambda _, *args: cast(*args), key.name, with_keyset=True)


_register("score_mse", _score_mse, _score_mse_fake)
_register("hidden_mse", _hidden_mse, _hidden_mse_fake)
_register("soft_cross_entropy", _soft_cross_entropy, _soft_cross_entropy_fake)
_register("attention_fwd", _attention_fwd, _attention_fwd_fake)
_register("attention_bwd", _attention_bwd, _attention_bwd_fake)
_register_autograd("score_mse", _save_gradients, _score_mse_backward)
_register_autograd("hidden_mse", _hidden_mse_setup, _hidden_mse_backward)
_register_autograd("soft_cross_entropy", _save_gradients, _soft_cross_entropy_backward)
_register_autograd("attention_fwd", _attention_setup, _attention_backward)
for _device in ("cpu", "cuda"):
    _register_autocast(_device)
