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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels.arguments import check_call
from kernels.backends.base import FFNCall
from kernels.expression import ExpressionError
from kernels.program import Flag, WidthRule
from kernels.validation import checked_words

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


def _make_call(
    x: Tensor, w1: Tensors, b1: Tensors, w2: Tensors, b2: Tensors, ln_weight: Tensors, ln_bias: Tensors,
    program: Tensor, flags: int, p_drop: float, seed: Tensor | None, eps: float, compute_dtype: torch.dtype | None,
) -> FFNCall:  # fmt: skip
    """The checked call; x is copied if its last dimension is not contiguous."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    dtype = x.dtype if compute_dtype is None else compute_dtype
    call = FFNCall(x, w1, b1, w2, b2, ln_weight, ln_bias, program, Flag(flags), p_drop, seed, eps, dtype)
    check_call(call)
    return call


def _check_program(call: FFNCall) -> None:
    words = checked_words(call.program)
    if words[6] != call.flags:
        raise ExpressionError(f"flags={int(call.flags)} are not those of the program ({words[6]})")
    if not WidthRule(words[5]).allows(call.hidden, call.inner):
        rule = WidthRule(words[5]).describe()
        raise ExpressionError(f"the program needs {rule}, but x has H={call.hidden} and w1 has d={call.inner}")


def _forward(*args: Any) -> tuple[Tensor, list[Tensor]]:
    *common, save, compute_dtype = _with_default(args)
    call = _make_call(*common, compute_dtype)
    _check_program(call)
    backend = dispatch.select(call)
    out, saved = backend.forward(call, save)
    return out, ([_tag(call, backend), *saved] if save else [])


def _forward_fake(*args: Any) -> tuple[Tensor, list[Tensor]]:
    *common, save, compute_dtype = _with_default(args)
    call = _make_call(*common, compute_dtype)
    out = call.x.new_empty(call.x.shape)
    if not save:
        return out, []
    backend = dispatch.select(call)
    return out, [_tag(call, backend), *backend.saved_like(call)]


def _with_default(args: Sequence[Any]) -> Sequence[Any]:
    """The dispatcher drops a trailing argument that equals its default."""
    return args if len(args) == 14 else (*args, None)


def _tag(call: FFNCall, backend: dispatch.Backend) -> Tensor:
    return call.x.new_empty((dispatch.number(backend), 0))


def _backward(grad_out: Tensor, *args: Any) -> list[Tensor]:
    *common, compute_dtype, saved, needs = args
    call = _make_call(*common, compute_dtype)
    _check_program(call)
    _check_backward(call, grad_out, saved, needs)
    backend = dispatch.by_number(saved[0].shape[0])
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    return backend.backward(call, grad_out, saved[1:], needs)


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
    if not saved:
        raise ValueError("saved is empty: the forward pass was called with save=False")
    like = dispatch.by_number(saved[0].shape[0]).saved_like(call) if saved[0].shape[0] < len(dispatch.BACKENDS) else ()
    given = [(t.shape, t.dtype, t.device) for t in saved[1:]]
    if given != [(t.shape, t.dtype, t.device) for t in like]:
        raise ValueError("saved does not belong to this call: its shapes, dtypes or devices are not those it saves")


class _Constants(NamedTuple):
    """What `_FFN` is given besides tensors."""

    layers: int
    flags: int
    p_drop: float
    eps: float
    save: bool
    compute_dtype: torch.dtype | None


class _FFN(torch.autograd.Function):
    """Autograd over flat arguments: (constants, x, program, seed, *parameters) -> (out, *saved)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(constants: _Constants, x: Tensor, program: Tensor, seed: Tensor | None, *parameters: Tensor) -> Any:
        c = constants
        with torch._C._AutoDispatchBelowAutograd():
            out, saved = ffn_fwd(
                x, *_groups(parameters, c.layers), program, c.flags, c.p_drop, seed, c.eps, c.save, c.compute_dtype
            )
        return (out, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.constants, x, program, seed, *parameters = inputs
        ctx.has_seed = seed is not None
        ctx.num_parameters = len(parameters)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, program, *([seed] if ctx.has_seed else []), *parameters, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> Any:
        c, head = ctx.constants, 2 + ctx.has_seed
        if not c.save:
            raise RuntimeError("backward through ffnas::ffn_fwd needs a forward pass with save=True")
        needed = [ctx.needs_input_grad[1], *ctx.needs_input_grad[4:]]
        if grad_out is None or not any(needed):
            return (None,) * (4 + ctx.num_parameters)
        x, program, *rest = ctx.saved_tensors
        seed = rest.pop(0) if ctx.has_seed else None
        parameters, saved = rest[: ctx.num_parameters], rest[ctx.num_parameters :]
        assert len(ctx.saved_tensors) == head + ctx.num_parameters + len(saved)
        gradients = iter(
            ffn_bwd(
                grad_out, x, *_groups(parameters, c.layers), program, c.flags, c.p_drop, seed, c.eps,
                c.compute_dtype, saved, needed,
            )
        )  # fmt: skip
        dx, *dparameters = [next(gradients) if need else None for need in needed]
        return None, dx, None, None, *dparameters


def _groups(parameters: Tensors, layers: int) -> list[Tensors]:
    """Flat parameters as six lists (w1, b1, w2, b2, ln_weight, ln_bias), the last two empty for bare expressions."""
    groups = [list(parameters[k : k + layers]) for k in range(0, len(parameters), layers)]
    return [*groups, *[[] for _ in range(6 - len(groups))]]


def _forward_autograd(keyset: Any, *args: Any) -> tuple[Tensor, list[Tensor]]:
    args = tuple(_with_default(args))
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        with torch._C._AutoDispatchBelowAutograd():
            return ffn_fwd.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    x, *groups = args[:7]
    program, flags, p_drop, seed, eps, save, compute_dtype = args[7:]
    constants = _Constants(len(groups[0]), flags, p_drop, eps, save, compute_dtype)
    out, *saved = _FFN.apply(constants, x, program, seed, *(t for group in groups for t in group))
    return out, saved


def _backward_autograd(keyset: Any, *args: Any) -> list[Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        raise NotImplementedError(
            "ffnas::ffn_bwd has no second derivative: use kernels.reference.ffn where double backward is needed"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return ffn_bwd.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _register_autocast(device: str) -> None:
    key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device))

    def cast(*args: Any) -> tuple[Tensor, list[Tensor]]:
        args = tuple(_with_default(args))
        x, compute_dtype = args[0], args[-1]
        if compute_dtype is None and x.dtype != torch.float64:
            compute_dtype = torch.get_autocast_dtype(device)
            if x.dtype not in (torch.float32, compute_dtype):
                x = x.to(compute_dtype)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return ffn_fwd(x, *args[1:-1], compute_dtype)

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


for _key in ("CPU", "CUDA"):
    _library.impl("ffn_fwd", _forward, _key)
    _library.impl("ffn_bwd", _backward, _key)
_library.impl("ffn_fwd", _forward_autograd, "Autograd", with_keyset=True)
_library.impl("ffn_bwd", _backward_autograd, "Autograd", with_keyset=True)
for _device in ("cpu", "cuda"):
    _register_autocast(_device)
torch.library.register_fake("ffnas::ffn_fwd", _forward_fake, lib=_library)
torch.library.register_fake("ffnas::ffn_bwd", _backward_fake, lib=_library)
torch.library.register_vmap("ffnas::ffn_fwd", _forward_vmap, lib=_library)
torch.library.register_vmap("ffnas::ffn_bwd", _backward_vmap, lib=_library)
