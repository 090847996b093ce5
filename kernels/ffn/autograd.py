"""Gradients of `ffnas::ffn_fwd`, and the shorter way that eager calls take past PyTorch's dispatcher.

Chosen: `Library.define`/`impl` and an `autograd.Function` over flat arguments. Rejected: `torch.library.custom_op`
(10.5 us a call against 2.9) and `register_autograd` (flattens tensor lists as pytrees on every call, and does not work
under `torch.func.grad`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.ffn import saved_memory
from kernels.ffn.autocast import AUTOCAST_KEYS, autocast_arguments
from kernels.ffn.plain_calls import is_plain
from kernels.ffn.schemas import SAVE, Tensors, backward_kernel, ffn_bwd, ffn_fwd, forward_kernel, with_default


class _Constants(NamedTuple):
    """What the autograd functions are given besides tensors; `private`: no caller gets the saved tensors."""

    layers: int
    flags: int
    p_drop: float
    eps: float
    save: bool
    compute_dtype: torch.dtype | None
    private: bool


def _run_forward(
    c: _Constants, x: Tensor, program: Tensor, seed: Tensor | None, parameters: Tensors
) -> tuple[Tensor, ...]:
    """(out, *saved) from flat parameters."""
    groups = _groups(parameters, c.layers)
    out, saved = _forward_below(x, *groups, program, c.flags, c.p_drop, seed, c.eps, c.save, c.compute_dtype)
    return (out, *saved)


def _remember(ctx: Any, c: _Constants, inputs: Sequence[Tensor | None], output: tuple[Tensor, ...]) -> None:
    """Keeps what backward needs; `inputs` are x, program, seed and the parameters."""
    ctx.constants, ctx.num_inputs, ctx.private = c, len(inputs), c.private and saved_memory.is_unhooked()
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


def _run_backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients for (constants, x, program, seed, *parameters)."""
    c: _Constants = ctx.constants
    if not c.save:
        raise RuntimeError("backward through ffnas::ffn_fwd needs a forward pass with save=True")
    needed = [ctx.needs_input_grad[1], *ctx.needs_input_grad[4:]]
    if grad_out is None or not any(needed):
        return (None,) * (1 + ctx.num_inputs)
    tensors = ctx.saved_tensors
    x, program, seed, *parameters = tensors[: ctx.num_inputs]
    groups, saved = _groups(parameters, c.layers), list(tensors[ctx.num_inputs :])
    overwrite = ctx.private and saved_memory.is_freed()
    arguments = (x, *groups, program, c.flags, c.p_drop, seed, c.eps, c.compute_dtype, saved, needed)
    gradients = iter(_call_backward(grad_out, *arguments, overwrite=overwrite))
    dx, *dparameters = [next(gradients) if need else None for need in needed]
    return None, dx, None, None, *dparameters


class _FFN(torch.autograd.Function):
    """(constants, x, program, seed, *parameters) -> (out, *saved)."""

    @staticmethod
    def forward(ctx: Any, c: _Constants, *inputs: Any) -> tuple[Tensor, ...]:
        x, program, seed, *parameters = inputs
        output = _run_forward(c, x, program, seed, parameters)
        _remember(ctx, c, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _run_backward(ctx, grad_out)


class _TransformableFFN(torch.autograd.Function):
    """`_FFN` in the form `torch.func` needs; slower, since it binds its arguments by signature on every call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(c: _Constants, *inputs: Any) -> tuple[Tensor, ...]:
        x, program, seed, *parameters = inputs
        return _run_forward(c, x, program, seed, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _remember(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _run_backward(ctx, grad_out)


def call_forward(*args: Any) -> Tensor:
    """`ffn_fwd(*args)[0]`: by a shorter way in eager mode, and by the only way under `torch.func` transforms."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return ffn_fwd(*args)[0]  # `torch.jit.trace` records the operator; a Python function it could not save
    args = tuple(autocast_arguments(args[0].device.type, args))
    if torch._C._are_functorch_transforms_active():
        constants, inputs = _flatten(args, private=True)
        return _TransformableFFN.apply(constants, *inputs)[0]
    if args[SAVE]:
        constants, inputs = _flatten(args, private=True)
        return _FFN.apply(constants, *inputs)[0]
    return _forward_below(*args)[0]


def _forward_below(*args: Any) -> tuple[Tensor, list[Tensor]]:
    """`ffn_fwd(*args)` below autograd and, like the operator, without autocast: `compute_dtype` says it all."""
    if is_plain((args[0], *(t for group in args[1:7] for t in group))):
        if args[-1] is None:
            return forward_kernel(*args)
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
            return forward_kernel(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return ffn_fwd(*args)


def _flatten(args: Sequence[Any], private: bool = False) -> tuple[_Constants, list[Any]]:
    x, *groups = args[:7]
    program, flags, p_drop, seed, eps, save, compute_dtype = args[7:]
    constants = _Constants(len(groups[0]), flags, p_drop, eps, save, compute_dtype, private)
    return constants, [x, program, seed, *(t for group in groups for t in group)]


def _groups(parameters: Tensors, layers: int) -> list[Tensors]:
    """Flat parameters as six lists (w1, b1, w2, b2, ln_weight, ln_bias), the last two empty for bare expressions."""
    groups = [list(parameters[k : k + layers]) for k in range(0, len(parameters), layers)]
    return [*groups, *[[] for _ in range(6 - len(groups))]]


def forward_autograd(keyset: Any, *args: Any) -> tuple[Tensor, list[Tensor]]:
    args = tuple(with_default(args))
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        with torch._C._AutoDispatchBelowAutograd():
            return ffn_fwd.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    if not args[SAVE]:  # a graph traced by `torch.jit`, whose constants cannot say whether gradients will be wanted
        constants, inputs = _flatten((*args[:SAVE], True, *args[SAVE + 1 :]), private=True)
        return _FFN.apply(constants, *inputs)[0], []
    constants, inputs = _flatten(args)
    out, *saved = _FFN.apply(constants, *inputs)
    return out, saved


class _OnceDifferentiable(torch.autograd.Function):
    """`ffn_bwd` where a graph of it is asked for: runs, and refuses to be differentiated.

    Takes (number of tensors per list or None, *flattened arguments): graphs of gradients are also built by `torch.func`
    transforms, which never walk them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(lengths: tuple[int | None, ...], *flat: Any) -> tuple[Tensor, ...]:
        rest = iter(flat)
        args = [next(rest) if n is None else [next(rest) for _ in range(n)] for n in lengths]
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(ffn_bwd(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "ffnas::ffn_bwd has no second derivative: use kernels.reference.ffn.ffn where double backward is needed"
        )


def _call_backward(*args: Any, overwrite: bool) -> Sequence[Tensor]:
    """`ffn_bwd(*args)`, past the autograd rule unless a graph of the gradients is asked for.

    overwrite: nobody reads the saved tensors again; a plain call may write over them.
    """
    if torch.is_grad_enabled():
        return _OnceDifferentiable.apply(*_flatten_backward(args))
    if is_plain((*args[:2], *(t for group in args[2:8] for t in group))):
        return backward_kernel(*args, overwrite=overwrite)
    with torch._C._AutoDispatchBelowAutograd():
        return ffn_bwd(*args)


def _flatten_backward(args: Sequence[Any]) -> list[Any]:
    """Arguments of `_OnceDifferentiable`: list lengths, then everything flat."""
    lengths = tuple(len(a) if isinstance(a, (list, tuple)) else None for a in args)
    return [lengths, *(v for a in args for v in (a if isinstance(a, (list, tuple)) else (a,)))]


def backward_autograd(keyset: Any, *args: Any) -> list[Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return list(_OnceDifferentiable.apply(*_flatten_backward(args)))
    with torch._C._AutoDispatchBelowAutograd():
        return ffn_bwd.redispatch(keyset & torch._C._after_autograd_keyset, *args)
