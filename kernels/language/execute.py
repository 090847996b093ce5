"""Executes a program's segments with PyTorch operations: the reference of the program *format*.

Chosen: one aten operation per instruction, gradients those of the operator table, so that kinks, ties, infinities and
NaN come out as eager PyTorch's do. Rejected: compiling a segment to Python source; this executor is
read more often than it is run.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kernels.language.operators import OPERATORS
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

_ROWS = {row.opcode: row for row in OPERATORS.values()}


def _gradient(opcode: int, a: Tensor, g: Tensor) -> Tensor:
    gradient = _ROWS[opcode].gradient
    assert gradient is not None
    return gradient(a, g)


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
        assert b is not None
        registers[i.dst] = _gradient(i.opcode - GRADIENT, a, b)
    elif is_dual(i.opcode):
        assert b is not None
        registers[i.dst], registers[i.c] = _gradient(i.opcode - DUAL, a, b), _ROWS[i.opcode - DUAL].forward(a)
    elif is_pair(i.opcode):
        slope = _gradient(i.opcode - PAIR, a, torch.ones_like(a))
        registers[i.dst], registers[i.c] = slope, _ROWS[i.opcode - PAIR].forward(a)
    else:
        raise AssertionError(f"opcode {i.opcode} passed validation")
