"""The `torch.library` operators under `kernels.ops`: schemas, kernels, fake kernels, autograd, autocast and vmap rules.

    ffnas::ffn_fwd(Tensor x, Tensor[] w1, Tensor[] b1, Tensor[] w2, Tensor[] b2, Tensor[] ln_weight, Tensor[] ln_bias,
                   Tensor program, int flags, float p_drop, Tensor? seed, float eps, bool save,
                   ScalarType? compute_dtype=None) -> (Tensor out, Tensor[] saved)
    ffnas::ffn_bwd(Tensor grad_out, Tensor x, Tensor[] w1, ... ln_bias, Tensor program, int flags, float p_drop,
                   Tensor? seed, float eps, ScalarType? compute_dtype, Tensor[] saved, bool[] needs) -> Tensor[]

One call is a stack of n >= 1 FFNs that share a program (`kernels.backends.base` has shapes and meaning); x is [T, H].
`program` is the int32 tensor of `kernels.program` and `flags` its header word 6, so that tracing, which cannot read
tensors, knows what is saved. `seed` is a tensor for the same reason: it is data, not part of a compiled graph. `needs`
marks the wanted gradients in the order x, w1 * n, ..., ln_bias * n, and only those come back.

`saved` holds what backward cannot recompute cheaply; the backend decides what. Its first tensor has no elements: its
shape is [number of the backend, 0], so that backward runs where forward ran, also in a traced graph.

Both operators are functional. Autocast sets the dtype of the matrix products, as it does for `nn.Linear`; x, parameters
and LayerNorm stay as they are. Second derivatives are refused with an error. vmap runs its samples one by one.

Chosen: `Library.define`/`impl` and an `autograd.Function` over flat arguments. Rejected: `torch.library.custom_op`
(10.5 us a call against 2.9) and `register_autograd` (flattens tensor lists as pytrees on every call, and does not work
under `torch.func.grad`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dispatch, saved_memory
from kernels.arguments import check_call
from kernels.backends.base import FFNCall
from kernels.expression import ExpressionError
from kernels.plain import is_plain
from kernels.program import WidthRule
from kernels.validation import checked_header

_COMMON = (
    "Tensor x, Tensor[] w1, Tensor[] b1, Tensor[] w2, Tensor[] b2, Tensor[] ln_weight, Tensor[] ln_bias,"
    " Tensor program, int flags, float p_drop, Tensor? seed, float eps"
)
_library = torch.library.Library("ffnas", "FRAGMENT")
_library.define(f"ffn_fwd({_COMMON}, bool save, ScalarType? compute_dtype=None) -> (Tensor out, Tensor[] saved)")
_library.define(
    f"ffn_bwd(Tensor grad_out, {_COMMON}, ScalarType? compute_dtype, Tensor[] saved, bool[] needs) -> Tensor[]"
)
ffn_fwd = torch.ops.ffnas.ffn_fwd.default
ffn_bwd = torch.ops.ffnas.ffn_bwd.default

Tensors = Sequence[Tensor]
_AUTOCAST_DEVICES = ("cpu", "cuda")
_SAVE = 12
"""Position of `save` among the arguments of `ffn_fwd`."""
_FLAGS = 8
"""Position of `flags`."""
_FLAG_BITS = 24
"""Bits of `flags` that are the program's; a traced call carries `trace_tag` above them."""
_TRACED, _CHOICE_BITS = 8, 4


def _make_call(
    x: Tensor, w1: Tensors, b1: Tensors, w2: Tensors, b2: Tensors, ln_weight: Tensors, ln_bias: Tensors,
    program: Tensor, flags: int, p_drop: float, seed: Tensor | None, eps: float, compute_dtype: torch.dtype | None,
) -> FFNCall:  # fmt: skip
    """The checked call; x is copied if its last dimension is not contiguous."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    dtype = x.dtype if compute_dtype is None else compute_dtype
    flags &= (1 << _FLAG_BITS) - 1
    call = FFNCall(x, w1, b1, w2, b2, ln_weight, ln_bias, program, flags, p_drop, seed, eps, dtype)
    check_call(call)
    return call


def trace_tag() -> int:
    """Bits for a traced call's `flags`: the backend forced while tracing, and a number for the layout of what is saved.

    How many tensors a graph saves depends on the backend, so a graph keeps the backend it was traced with. PyTorch
    keeps compiled graphs on disk by their code: it must differ where the backends, or the layouts they save, do.
    """
    return ((dispatch.fingerprint() << _CHOICE_BITS) | _TRACED | dispatch.choice_number()) << _FLAG_BITS


def _backend_of(call: FFNCall, flags: int) -> dispatch.Backend:
    tag = flags >> _FLAG_BITS
    return dispatch.select(call, tag & (_TRACED - 1) if tag & _TRACED else None)


# what torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, which takes seconds
trace_tag._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_program(call: FFNCall) -> None:
    header = checked_header(call.program)
    if header[6] != call.flags:
        raise ExpressionError(f"flags={call.flags} are not those of the program ({header[6]})")
    if header[5] and not WidthRule(header[5]).allows(call.hidden, call.inner):
        rule = WidthRule(header[5]).describe()
        raise ExpressionError(f"the program needs {rule}, but x has H={call.hidden} and w1 has d={call.inner}")


def _forward(*args: Any) -> tuple[Tensor, list[Tensor]]:
    *common, save, compute_dtype = _with_default(args)
    call = _make_call(*common, compute_dtype)
    _check_program(call)
    backend = _backend_of(call, common[_FLAGS])
    out, saved = backend.forward(call, save)
    return out, ([_tag(call, backend), *saved] if save else [])


def _forward_fake(*args: Any) -> tuple[Tensor, list[Tensor]]:
    *common, save, compute_dtype = _with_default(args)
    call = _make_call(*common, compute_dtype)
    out = call.x.new_empty(call.x.shape)
    if not save:
        return out, []
    backend = _backend_of(call, common[_FLAGS])
    return out, [_tag(call, backend), *backend.saved_like(call)]


def _with_default(args: Sequence[Any]) -> Sequence[Any]:
    """The dispatcher drops a trailing argument that equals its default."""
    return args if len(args) == 14 else (*args, None)


def _tag(call: FFNCall, backend: dispatch.Backend) -> Tensor:
    return call.x.new_empty((dispatch.number(backend), 0))


def _backward(grad_out: Tensor, *args: Any, overwrite: bool = False) -> list[Tensor]:
    *common, compute_dtype, saved, needs = args
    call = _make_call(*common, compute_dtype)
    _check_program(call)
    _check_backward(call, grad_out, saved, needs)
    backend = dispatch.by_number(saved[0].shape[0])
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    extra = {"overwrite": True} if overwrite and getattr(backend, "takes_saved", False) else {}
    return backend.backward(call, grad_out, saved[1:], needs, **extra)


def _backward_fake(grad_out: Tensor, *args: Any) -> list[Tensor]:
    *common, compute_dtype, saved, needs = args
    call = _make_call(*common, compute_dtype)
    _check_backward(call, grad_out, saved, needs)
    tensors = [call.x, *call.parameters]
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need]


def _check_backward(call: FFNCall, grad_out: Tensor, saved: Tensors, needs: Sequence[bool]) -> None:
    if grad_out.shape != call.x.shape or grad_out.dtype != call.x.dtype or grad_out.device != call.x.device:
        raise ValueError(
            f"grad_out is {grad_out.dtype} {tuple(grad_out.shape)} on {grad_out.device}, expected that of x:"
            f" {call.x.dtype} {tuple(call.x.shape)} on {call.x.device}"
        )
    if len(needs) != 1 + len(call.parameters):
        raise ValueError(f"needs has {len(needs)} entries, expected {1 + len(call.parameters)}")
    if not saved or saved[0].numel() or saved[0].shape[0] >= len(dispatch.BACKENDS):
        raise ValueError("saved must be what ffn_fwd returned with save=True")


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
    """`ffn_fwd(*args)[0]`: the same by a shorter way in eager mode, and the only way under `torch.func` transforms."""
    if torch.compiler.is_compiling():
        return ffn_fwd(*args)[0]
    args = tuple(_autocast_arguments(args[0].device.type, args))
    if torch._C._are_functorch_transforms_active():
        constants, inputs = _flatten(args, private=True)
        return _TransformableFFN.apply(constants, *inputs)[0]
    if args[_SAVE]:
        constants, inputs = _flatten(args, private=True)
        return _FFN.apply(constants, *inputs)[0]
    return _forward_below(*args)[0]


def _forward_below(*args: Any) -> tuple[Tensor, list[Tensor]]:
    """`ffn_fwd(*args)` below autograd and, like the operator, without autocast: `compute_dtype` says it all."""
    if is_plain((args[0], *(t for group in args[1:7] for t in group))):
        if args[-1] is None:
            return _forward(*args)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return _forward(*args)
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


def _forward_autograd(keyset: Any, *args: Any) -> tuple[Tensor, list[Tensor]]:
    args = tuple(_with_default(args))
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        with torch._C._AutoDispatchBelowAutograd():
            return ffn_fwd.redispatch(keyset & torch._C._after_autograd_keyset, *args)
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
            "ffnas::ffn_bwd has no second derivative: use kernels.reference.ffn where double backward is needed"
        )


def _call_backward(*args: Any, overwrite: bool) -> Sequence[Tensor]:
    """`ffn_bwd(*args)`, past the autograd rule unless a graph of the gradients is asked for.

    overwrite: nobody reads the saved tensors again; a plain call may write over them.
    """
    if torch.is_grad_enabled():
        return _OnceDifferentiable.apply(*_flatten_backward(args))
    if is_plain((*args[:2], *(t for group in args[2:8] for t in group))):
        return _backward(*args, overwrite=overwrite)
    with torch._C._AutoDispatchBelowAutograd():
        return ffn_bwd(*args)


def _flatten_backward(args: Sequence[Any]) -> list[Any]:
    """Arguments of `_OnceDifferentiable`: list lengths, then everything flat."""
    lengths = tuple(len(a) if isinstance(a, (list, tuple)) else None for a in args)
    return [lengths, *(v for a in args for v in (a if isinstance(a, (list, tuple)) else (a,)))]


def _backward_autograd(keyset: Any, *args: Any) -> list[Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return list(_OnceDifferentiable.apply(*_flatten_backward(args)))
    with torch._C._AutoDispatchBelowAutograd():
        return ffn_bwd.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autocast_arguments(device: str, args: Sequence[Any]) -> Sequence[Any]:
    """The arguments with autocast's dtype for the products, if autocast is on and none was given."""
    *rest, compute_dtype = _with_default(args)
    x = rest[0]
    open_choice = compute_dtype is None and x.dtype != torch.float64 and device in _AUTOCAST_DEVICES
    if open_choice and torch.is_autocast_enabled(device):
        compute_dtype = torch.get_autocast_dtype(device)
        if x.dtype not in (torch.float32, compute_dtype):
            rest[0] = x.to(compute_dtype)
    return *rest, compute_dtype


def _autocast_key(device: str) -> torch._C.DispatchKey:
    return getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device))


_AUTOCAST_KEYS = functools.reduce(operator.or_, (torch._C.DispatchKeySet(_autocast_key(d)) for d in _AUTOCAST_DEVICES))


def _register_autocast(device: str) -> None:
    key = _autocast_key(device)

    def cast(*args: Any) -> tuple[Tensor, list[Tensor]]:
        args = tuple(_autocast_arguments(device, args))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return ffn_fwd(*args)

    ffn_fwd.py_impl(key)(cast)
    _library.impl("ffn_fwd", lambda _, *args: cast(*args), key.name, with_keyset=True)


def _sample(value: Any, dim: Any, k: int) -> Any:
    """Sample `k` of a batched argument (tensor, list of tensors, or anything unbatched)."""
    if isinstance(value, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
        return [_sample(v, d, k) for v, d in zip(value, dims, strict=True)]
    return value.select(dim, k) if dim is not None and isinstance(value, Tensor) else value


def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    results = [ffn_fwd(*_sample(args, in_dims, k)) for k in range(info.batch_size)]
    saved = [torch.stack(column) for column in zip(*(s for _, s in results), strict=True)]
    return (torch.stack([out for out, _ in results]), saved), (0, [0] * len(saved))


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    results = [ffn_bwd(*_sample(args, in_dims, k)) for k in range(info.batch_size)]
    stacked = [torch.stack(column) for column in zip(*results, strict=True)]
    return stacked, [0] * len(stacked)


_library.impl("ffn_fwd", _forward, "CompositeExplicitAutograd")
_library.impl("ffn_bwd", _backward, "CompositeExplicitAutograd")
_library.impl("ffn_fwd", _forward_autograd, "Autograd", with_keyset=True)
_library.impl("ffn_bwd", _backward_autograd, "Autograd", with_keyset=True)
for _device in _AUTOCAST_DEVICES:
    _register_autocast(_device)
torch.library.register_fake("ffnas::ffn_fwd", _forward_fake, lib=_library)
torch.library.register_fake("ffnas::ffn_bwd", _backward_fake, lib=_library)
torch.library.register_vmap("ffnas::ffn_fwd", _forward_vmap, lib=_library)
torch.library.register_vmap("ffnas::ffn_bwd", _backward_vmap, lib=_library)
