"""Grouped FFNs: several stacks, each with its own input, widths, depth and expression, in one call.

    fused_ffn_grouped([x_1, ..., x_K], [member_1, ..., member_K]) -> [out_1, ..., out_K]

A member's result is `fused_ffn_stack` of its input. Where the CUDA backend is asked for by name and serves the members
that is one launch forward and three backward; anywhere else a loop over `fused_ffn_stack` (docs/decisions/0009).

    ffnas::grouped_fwd(Tensor[] x, Tensor[] parameters, Tensor[] programs, Tensor[] seeds, int[] layers, int[] flags,
                       float[] p_drop, float[] eps, bool save, ScalarType? compute_dtype) -> (Tensor[], Tensor[] saved)
    ffnas::grouped_bwd(Tensor[] grad_out, Tensor[] x, ..., Tensor[] saved, bool[] needs) -> Tensor[]

`parameters` holds w1 * n, b1 * n, w2 * n, b2 * n, ln_weight * n, ln_bias * n of each member in turn; `layers` n,
negative without LayerNorm; `seeds` one tensor for each member with p_drop > 0. Gradients: of all x, then parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels.call import FFNCall
from kernels.ffn.arguments import check_call
from kernels.ffn.kron import KronWeight, Weight, whole
from kernels.ffn.ops import ProgramLike, _program_of, _seed_tensor, autocast_dtype, fused_ffn_stack
from kernels.ffn.schemas import LIBRARY, check_program

_COMMON = (
    "Tensor[] x, Tensor[] parameters, Tensor[] programs, Tensor[] seeds, int[] layers, int[] flags, float[] p_drop,"
    " float[] eps"
)
LIBRARY.define(f"grouped_fwd({_COMMON}, bool save, ScalarType? compute_dtype) -> (Tensor[] out, Tensor[] saved)")
LIBRARY.define(
    f"grouped_bwd(Tensor[] grad_out, {_COMMON}, ScalarType? compute_dtype, Tensor[] saved, bool[] needs) -> Tensor[]"
)
grouped_fwd = torch.ops.ffnas.grouped_fwd.default
grouped_bwd = torch.ops.ffnas.grouped_bwd.default


@dataclass(frozen=True)
class GroupMember:
    """One stack of n FFNs with one expression; arguments as for `fused_ffn_stack`.

    Attributes:
        w1, b1, w2, b2: n tensors each, [d, H], [d], [H, d], [H]; may be strided views (last stride 1). Weights may be
            `kernels.ffn.kron.KronWeight`s.
        program: expression text, a `kernels.Expression` or a lowered `kernels.Program`.
        ln_weight, ln_bias: n tensors each, [H]; empty for bare expressions.
        policy, p_drop, seed, eps: as for `fused_ffn`.
    """

    w1: Sequence[Weight]
    b1: Sequence[Tensor]
    w2: Sequence[Weight]
    b2: Sequence[Tensor]
    program: ProgramLike
    ln_weight: Sequence[Tensor] = field(default=())
    ln_bias: Sequence[Tensor] = field(default=())
    policy: str = "truncate"
    p_drop: float = 0.0
    seed: int | Tensor | None = None
    eps: float = 1e-12

    @property
    def parameters(self) -> list[Weight]:
        """All parameters, group by group."""
        return [*self.w1, *self.b1, *self.w2, *self.b2, *self.ln_weight, *self.ln_bias]

    @property
    def is_factored(self) -> bool:
        """Whether a weight is given by Kronecker factors."""
        return any(isinstance(w, KronWeight) for w in (*self.w1, *self.w2))


class _Constants(NamedTuple):
    """What the op is given besides tensors."""

    layers: list[int]
    flags: list[int]
    p_drop: list[float]
    eps: list[float]


def fused_ffn_grouped(inputs: Sequence[Tensor], members: Sequence[GroupMember]) -> list[Tensor]:
    """Each member's stack applied to its input.

    Args:
        inputs: K tensors [..., H_k], floating, on one device.
        members: K stacks.

    Returns:
        K tensors of the inputs' shapes and dtypes. Differentiable (once) in inputs and parameters.

    Raises:
        ExpressionError: a program is no expression, or not valid at its member's widths.
        ValueError: numbers of inputs and members differ, or a tensor has a wrong shape, dtype, device or stride.
    """
    if len(inputs) != len(members):
        raise ValueError(f"there are {len(inputs)} inputs and {len(members)} members: one input per member is needed")
    if not members:
        return []
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return [_alone(x, m) for x, m in zip(inputs, members, strict=True)]
    if any(m.is_factored for m in members):
        if inputs[0].device.type == "cpu" and dispatch.choice_number() == 0:
            return [_alone(x, m) for x, m in zip(inputs, members, strict=True)]
        members = [replace(m, w1=[whole(w) for w in m.w1], w2=[whole(w) for w in m.w2]) for m in members]
    dtype = autocast_dtype(inputs[0])
    rows = [_as_rows(x, dtype) for x in inputs]
    calls = [_call(x, m, dtype) for x, m in zip(rows, members, strict=True)]
    if not _in_one_launch(calls):
        return [_alone(x, m, call.seed) for x, m, call in zip(inputs, members, calls, strict=True)]
    constants, tensors = _flatten(calls)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors.x, *tensors.parameters))
    outs, _ = grouped_fwd(*tensors, *constants, save, dtype)
    return [out.view(x.shape) for out, x in zip(outs, inputs, strict=True)]


def _alone(x: Tensor, m: GroupMember, seed: Tensor | None = None) -> Tensor:
    drawn = m.seed if seed is None else seed
    groups = (m.w1, m.b1, m.w2, m.b2, m.ln_weight, m.ln_bias)
    return fused_ffn_stack(x, *groups, m.program, policy=m.policy, p_drop=m.p_drop, seed=drawn, eps=m.eps)


def _as_rows(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x as [T, H] with last stride 1, in a dtype that products in `dtype` take."""
    if x.dim() == 0:
        raise ValueError("inputs must have at least one dimension, got a scalar")
    if dtype is not None and x.dtype not in (torch.float32, dtype):
        x = x.to(dtype)
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _call(x: Tensor, m: GroupMember, dtype: torch.dtype | None) -> FFNCall:
    """The checked call of one member."""
    program, flags = _program_of(m.program, m.policy)
    seed = _seed_tensor(x, m.seed) if m.p_drop != 0.0 else None
    w1, w2 = ([whole(w) for w in group] for group in (m.w1, m.w2))
    groups = (w1, m.b1, w2, m.b2, m.ln_weight, m.ln_bias)
    call = FFNCall(x, *groups, program, int(flags), float(m.p_drop), seed, float(m.eps), dtype or x.dtype)
    check_call(call)
    check_program(call)
    return call


def _in_one_launch(calls: Sequence[FFNCall]) -> bool:
    """Whether a backend is asked for by name that serves all of them together: no measurement makes one the default."""
    if dispatch.choice_number() == 0:
        return False
    backend = dispatch.select(calls[0].x.device.type, lambda b: b.supports(calls[0]))
    return backend.supports_group(calls) is None


class _Tensors(NamedTuple):
    """The op's tensor arguments."""

    x: list[Tensor]
    parameters: list[Tensor]
    programs: list[Tensor]
    seeds: list[Tensor]


def _flatten(calls: Sequence[FFNCall]) -> tuple[_Constants, _Tensors]:
    layers = [call.layers if call.has_ln else -call.layers for call in calls]
    constants = _Constants(layers, [c.flags for c in calls], [c.p_drop for c in calls], [c.eps for c in calls])
    parameters = [t for call in calls for t in call.parameters]
    seeds = [call.seed for call in calls if call.seed is not None]
    return constants, _Tensors([c.x for c in calls], parameters, [c.program for c in calls], seeds)


def _calls(
    x: Sequence[Tensor], parameters: Sequence[Tensor], programs: Sequence[Tensor], seeds: Sequence[Tensor],
    layers: Sequence[int], flags: Sequence[int], p_drop: Sequence[float], eps: Sequence[float],
    compute_dtype: torch.dtype | None,
) -> list[FFNCall]:  # fmt: skip
    """The checked calls of the op's arguments."""
    rest, left, calls = iter(parameters), iter(seeds), []
    if any(len(group) != len(x) for group in (programs, layers, flags, p_drop, eps)):
        raise ValueError("programs, layers, flags, p_drop and eps must have one entry per input")
    if len(parameters) != sum(_parameter_count(n) for n in layers) or len(seeds) != sum(p != 0.0 for p in p_drop):
        raise ValueError("the numbers of parameters and seeds do not fit layers and p_drop")
    for k, rows in enumerate(x):
        n = abs(layers[k])
        groups = [[next(rest) for _ in range(n)] for _ in range(_parameter_count(layers[k]) // n)]
        w1, b1, w2, b2, gamma, beta = [*groups, [], []][:6]
        seed = next(left) if p_drop[k] != 0.0 else None
        dtype = compute_dtype or rows.dtype
        call = FFNCall(
            rows, w1, b1, w2, b2, gamma, beta, programs[k], flags[k], p_drop[k], seed, eps[k], dtype
        )  # fmt: skip
        check_call(call)
        calls.append(call)
    return calls


def _parameter_count(layers: int) -> int:
    return 6 * layers if layers > 0 else -4 * layers


def _kernels() -> Any:
    from kernels.cuda import grouped  # deferred: it opens or builds a library

    return grouped


def _forward(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    *common, save, compute_dtype = args
    calls = _calls(*[*common, compute_dtype])
    for call in calls:
        check_program(call)
    outs, saved = _kernels().forward(calls, save)
    return outs, [t for own in saved for t in own]


def _forward_fake(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    *common, save, compute_dtype = args
    calls = _calls(*[*common, compute_dtype])
    outs = [call.x.new_empty(call.x.shape) for call in calls]
    return outs, [t for call in calls for t in _kernels().saved_like(call)] if save else []


def _backward(grad_out: list[Tensor], *args: Any) -> list[Tensor]:
    *common, compute_dtype, saved, needs = args
    calls = _calls(*[*common, compute_dtype])
    for call in calls:
        check_program(call)
    grad_out = [g if g.stride(-1) == 1 else g.contiguous() for g in grad_out]
    counts = [len(_kernels().saved_like(call)) for call in calls]
    ends = list(accumulate(counts))
    own = [saved[end - count : end] for count, end in zip(counts, ends, strict=True)]
    parameter_needs, wanted = iter(needs[len(calls) :]), []
    for k, call in enumerate(calls):
        wanted.append([needs[k], *(next(parameter_needs) for _ in call.parameters)])
    gradients = _kernels().backward(calls, grad_out, own, wanted)
    flat = [g[0] for g in gradients] + [t for g in gradients for t in g[1:]]
    return [g for g in flat if g is not None]


def _backward_fake(grad_out: list[Tensor], *args: Any) -> list[Tensor]:
    x, parameters, *_, needs = args
    return [t.new_empty(t.shape) for t, need in zip([*x, *parameters], needs, strict=True) if need]


class _GroupedFFN(torch.autograd.Function):
    """(counts, constants, save, compute dtype, *x, *parameters, *programs, *seeds) -> (*out, *saved)."""

    @staticmethod
    def forward(
        ctx: Any, counts: tuple[int, ...], c: _Constants, save: bool, dtype: torch.dtype | None, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(True)
        with torch._C._AutoDispatchBelowAutograd():
            outs, saved = grouped_fwd(*_split(flat, counts), *c, save, dtype)
        ctx.counts, ctx.constants, ctx.dtype, ctx.save = counts, c, dtype, save
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*flat, *saved)
        return (*outs, *saved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.save:
            raise RuntimeError("backward through ffnas::grouped_fwd needs a forward pass with save=True")
        members, parameters = ctx.counts[:2]
        flat = ctx.saved_tensors[: sum(ctx.counts)]
        saved = list(ctx.saved_tensors[sum(ctx.counts) :])
        needs = list(ctx.needs_input_grad[4 : 4 + members + parameters])
        with torch._C._AutoDispatchBelowAutograd():
            gradients = iter(
                grouped_bwd(list(grads[:members]), *_split(flat, ctx.counts), *ctx.constants, ctx.dtype, saved, needs)
            )
        own = [next(gradients) if need else None for need in needs]
        return None, None, None, None, *own, *([None] * sum(ctx.counts[2:]))


def _split(flat: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(flat)
    return [[next(rest) for _ in range(count)] for count in counts]


def _forward_autograd(keyset: Any, *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    x, parameters, programs, seeds, *constants, save, dtype = args
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*x, *parameters)):
        with torch._C._AutoDispatchBelowAutograd():
            return grouped_fwd.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    groups = (x, parameters, programs, seeds)
    counts = tuple(len(group) for group in groups)
    flat = [t for group in groups for t in group]
    result = _GroupedFFN.apply(counts, _Constants(*constants), save, dtype, *flat)
    return list(result[: len(x)]), list(result[len(x) :])


LIBRARY.impl("grouped_fwd", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("grouped_bwd", _backward, "CompositeExplicitAutograd")
LIBRARY.impl("grouped_fwd", _forward_autograd, "Autograd", with_keyset=True)
torch.library.register_fake("ffnas::grouped_fwd", _forward_fake, lib=LIBRARY)
torch.library.register_fake("ffnas::grouped_bwd", _backward_fake, lib=LIBRARY)
