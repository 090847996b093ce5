"""Schemas of `ffnas::ffn_fwd` and `ffnas::ffn_bwd`, what they run, and the shapes a trace sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.call import Backend, FFNCall
from kernels.ffn.arguments import check_call
from kernels.language.expression import ExpressionError
from kernels.language.program import WidthRule
from kernels.language.validation import checked_header

_COMMON = (
    "Tensor x, Tensor[] w1, Tensor[] b1, Tensor[] w2, Tensor[] b2, Tensor[] ln_weight, Tensor[] ln_bias,"
    " Tensor program, int flags, float p_drop, Tensor? seed, float eps"
)
LIBRARY = torch.library.Library("ffnas", "FRAGMENT")
LIBRARY.define(f"ffn_fwd({_COMMON}, bool save, ScalarType? compute_dtype=None) -> (Tensor out, Tensor[] saved)")
LIBRARY.define(
    f"ffn_bwd(Tensor grad_out, {_COMMON}, ScalarType? compute_dtype, Tensor[] saved, bool[] needs) -> Tensor[]"
)
ffn_fwd = torch.ops.ffnas.ffn_fwd.default
ffn_bwd = torch.ops.ffnas.ffn_bwd.default

Tensors = Sequence[Tensor]
SAVE = 12
"""Position of `save` among the arguments of `ffn_fwd`."""
_FLAGS = 8
"""Position of `flags`."""
_FLAG_BITS = 24
"""Bits of `flags` that are the program's; a traced call carries `trace_tag` above them."""
_TRACED, _CHOICE_BITS = 8, 4


def make_call(
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


def _backend_of(call: FFNCall, flags: int) -> Backend:
    tag = flags >> _FLAG_BITS
    choice = tag & (_TRACED - 1) if tag & _TRACED else None
    return dispatch.select(call.x.device.type, lambda backend: backend.supports(call), choice=choice)


# what torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, which takes seconds
trace_tag._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_program(call: FFNCall) -> None:
    header = checked_header(call.program)
    if header[6] != call.flags:
        raise ExpressionError(f"flags={call.flags} are not those of the program ({header[6]})")
    if header[5] and not WidthRule(header[5]).allows(call.hidden, call.inner):
        rule = WidthRule(header[5]).describe()
        raise ExpressionError(f"the program needs {rule}, but x has H={call.hidden} and w1 has d={call.inner}")


def forward_kernel(*args: Any) -> tuple[Tensor, list[Tensor]]:
    *common, save, compute_dtype = with_default(args)
    call = make_call(*[*common, compute_dtype])
    check_program(call)
    backend = _backend_of(call, common[_FLAGS])
    out, saved = backend.forward(call, save)
    return out, ([_tag(call, backend), *saved] if save else [])


def forward_fake(*args: Any) -> tuple[Tensor, list[Tensor]]:
    *common, save, compute_dtype = with_default(args)
    call = make_call(*[*common, compute_dtype])
    out = call.x.new_empty(call.x.shape)
    if not save:
        return out, []
    backend = _backend_of(call, common[_FLAGS])
    return out, [_tag(call, backend), *backend.saved_like(call)]


def with_default(args: Sequence[Any]) -> Sequence[Any]:
    """The dispatcher drops a trailing argument that equals its default."""
    return args if len(args) == 14 else (*args, None)


def _tag(call: FFNCall, backend: Backend) -> Tensor:
    return call.x.new_empty((dispatch.number(backend), 0))


def backward_kernel(grad_out: Tensor, *args: Any, overwrite: bool = False) -> list[Tensor]:
    *common, compute_dtype, saved, needs = args
    call = make_call(*[*common, compute_dtype])
    check_program(call)
    _check_backward(call, grad_out, saved, needs)
    backend = dispatch.by_number(saved[0].shape[0])
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    return backend.backward(call, grad_out, saved[1:], needs, overwrite=overwrite)


def backward_fake(grad_out: Tensor, *args: Any) -> list[Tensor]:
    *common, compute_dtype, saved, needs = args
    call = make_call(*[*common, compute_dtype])
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
