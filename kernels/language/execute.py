"""Executes a program's segments with PyTorch operations: the reference of the program *format*.

Chosen: one aten operation per instruction, gradients through aten's own backward functions, so that kinks, ties,
infinities and NaN come out as eager PyTorch's do. Rejected: compiling a segment to Python source; this executor is
read more often than it is run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from kernels.language.operators import ELU_ALPHA, LEAKY_RELU_SLOPE, OPERATORS, SOFTPLUS_THRESHOLD
from kernels.language.program import (
    DUAL,
    GRADIENT,
    IMMEDIATES,
    MAX_GRAD,
    NONE,
    PAIR,
    SELECT,
    Instruction,
    Segment,
    SegmentCode,
    decode_segments,
    is_dual,
    is_gradient,
    is_pair,
)

_aten = torch.ops.aten

_ROWS = {row.opcode: row for row in OPERATORS.values()}

_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda a, g: _aten.gelu_backward(g, a, approximate="tanh"),
    "gelu_erf": lambda a, g: _aten.gelu_backward(g, a),
    "sigmoid": lambda a, g: _aten.sigmoid_backward(g, torch.sigmoid(a)),
    "tanh": lambda a, g: _aten.tanh_backward(g, torch.tanh(a)),
    "relu": lambda a, g: _aten.threshold_backward(g, a, 0),
    "leaky_relu": lambda a, g: _aten.leaky_relu_backward(g, a, LEAKY_RELU_SLOPE, False),
    "elu": lambda a, g: _aten.elu_backward(g, ELU_ALPHA, 1, 1, False, a),
    "swish": lambda a, g: _aten.silu_backward(g, a),
    "relu2": lambda a, g: _aten.threshold_backward(g * a + g * a, a, 0),
    "softplus": lambda a, g: _aten.softplus_backward(g, a, 1, SOFTPLUS_THRESHOLD),
    "identity": lambda a, g: g,
}


@lru_cache(maxsize=1024)
def segments_of(words: tuple[int, ...]) -> tuple[SegmentCode, ...]:
    """Decoded segments of validated words; cached."""
    return tuple(decode_segments(words))


def run_segment(
    words: tuple[int, ...],
    segment: Segment,
    x: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    g: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Runs one segment and returns its outputs (value, dx, da, db); None where the segment has none.

    Args:
        words: a validated program.
        x: [T, H].
        a, b, g: the other input registers, [T, n] each with one common n: d in mid of the serial form, else H. x is cut
            or zero-extended to n columns, and dx comes back with n columns, of which those past H mean nothing.
    """
    code = segments_of(words)[segment]
    hidden = x.shape[-1]
    columns = next((t.shape[-1] for t in (a, b, g) if t is not None), hidden)
    if columns < hidden:
        x = x[..., :columns]
    elif columns > hidden:
        x = torch.nn.functional.pad(x, (0, columns - hidden))
    registers: dict[int, Tensor | None] = {0: x, 1: a, 2: b, 3: g}
    for i in code.instructions:
        _step(i, registers, hidden)
    value, dx, da, db = (None if r == NONE else registers[r] for r in code.outputs)
    return value, dx, da, db


def _step(i: Instruction, registers: dict[int, Tensor | None], hidden: int) -> None:
    a, b = registers[i.a], registers[i.b]
    assert a is not None
    row = _ROWS.get(i.opcode)
    if row is not None:
        registers[i.dst] = row.forward(a) if row.arity == 1 else row.forward(a, b)
    elif i.opcode == SELECT:
        inside = torch.arange(a.shape[-1], device=a.device) < hidden
        registers[i.dst] = torch.where(inside, a, torch.full_like(a, IMMEDIATES[i.b]))
    elif i.opcode == MAX_GRAD:
        g = registers[i.c]
        assert b is not None
        assert g is not None
        registers[i.dst] = torch.where(a == b, g / 2, g).masked_fill(a < b, 0)
    elif is_gradient(i.opcode):
        registers[i.dst] = _GRADIENTS[_ROWS[i.opcode - GRADIENT].name](a, b)
    elif is_dual(i.opcode):
        row = _ROWS[i.opcode - DUAL]
        registers[i.dst], registers[i.c] = _GRADIENTS[row.name](a, b), row.forward(a)
    elif is_pair(i.opcode):
        row = _ROWS[i.opcode - PAIR]
        registers[i.dst], registers[i.c] = _GRADIENTS[row.name](a, torch.ones_like(a)), row.forward(a)
    else:
        raise AssertionError(f"opcode {i.opcode} passed validation")
