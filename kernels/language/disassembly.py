"""A readable listing of a program, for debugging and for reading kernels beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.language.operators import OPERATORS
from kernels.language.program import (
    DUAL,
    GRADIENT,
    IMMEDIATES,
    MAX_GRAD,
    NONE,
    NUM_INPUTS,
    PAIR,
    POLICIES,
    SELECT,
    Form,
    Instruction,
    Segment,
    WidthRule,
    decode_segments,
    is_binary,
    is_dual,
    is_gradient,
    is_unary,
)
from kernels.language.validation import validate_program

_NAMES = {row.opcode: row.name for row in OPERATORS.values()}


def disassemble(program: torch.Tensor | Sequence[int]) -> str:
    """A readable listing, one line per instruction: `r4 = gelu(h)`. Raises `ExpressionError` on an invalid program."""
    words = validate_program(program if isinstance(program, torch.Tensor) else torch.tensor(program, dtype=torch.int32))
    form = Form(words[3])
    lines = [f"program v{words[1]} {form.name.lower()} policy={POLICIES[words[4]]} width={WidthRule(words[5]).name}"]
    for k, segment in zip(Segment, decode_segments(words), strict=True):
        outputs = zip(("value", "dx", "da", "db"), segment.outputs, strict=True)
        named = " ".join(f"{label}={_register(r, form, k)}" for label, r in outputs if r != NONE)
        lines.append(f"{k.name.lower()}: {named}")
        lines += [f"  {_format(i, form, k)}" for i in segment.instructions]
    return "\n".join(lines)


def _register(r: int, form: Form, k: Segment) -> str:
    if r >= NUM_INPUTS:
        return f"r{r}"
    second = "h" if k % 3 == 1 else ("y1" if form == Form.PARALLEL else "y")
    return ("x", second, "y2", "g")[r]


def _format(i: Instruction, form: Form, k: Segment) -> str:
    dst, a, b, c = (_register(r, form, k) for r in (i.dst, i.a, i.b, i.c))
    if is_unary(i.opcode):
        return f"{dst} = {_NAMES[i.opcode]}({a})"
    if is_binary(i.opcode):
        return f"{dst} = {_NAMES[i.opcode]}({a}, {b})"
    if i.opcode == SELECT:
        return f"{dst} = column < H ? {a} : {IMMEDIATES[i.b]}"
    if i.opcode == MAX_GRAD:
        return f"{dst} = maxgrad({a}, {b}; {c})"
    if is_gradient(i.opcode):
        return f"{dst} = {_NAMES[i.opcode - GRADIENT]}'({a}) * {b}"
    if is_dual(i.opcode):
        name = _NAMES[i.opcode - DUAL]
        return f"{dst}, {c} = {name}'({a}) * {b}, {name}({a})"
    name = _NAMES[i.opcode - PAIR]
    return f"{dst}, {c} = {name}'({a}), {name}({a})"
