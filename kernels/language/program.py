"""The program: an FFN expression as one small int32 tensor that every backend interprets.

`kernels.language.lowering` makes it, `kernels.language.validation` checks one that comes from elsewhere, a backend runs
its segments. A program holds neither H nor d, so one serves every shape that its width rule allows, and an expression
nobody has seen before compiles nothing.

docs/program.md is the format: header, segments, registers, opcodes, and what forward and backward do with them. Numbers
here and there are the same; the C++ header is generated from these (`kernels.generate_header`). Why it is so:
docs/decisions/0001.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kernels.language.expression import Expression, ExpressionError
from kernels.language.operators import OPERATORS

if TYPE_CHECKING:
    import torch

MAGIC = 0x314E4646
VERSION = 1
HEADER_WORDS = 16
SEGMENT_WORDS = 8
NUM_SEGMENTS = 9
INSTRUCTION_WORDS = 4
FIRST_INSTRUCTION = HEADER_WORDS + SEGMENT_WORDS * NUM_SEGMENTS
MAX_INSTRUCTIONS = 4096
"""Most instructions one segment may have."""

X, A, B, G = 0, 1, 2, 3
NUM_INPUTS = 4
MAX_TEMPORARIES = 16
NUM_REGISTERS = NUM_INPUTS + MAX_TEMPORARIES
NONE = -1

SELECT = 48
MAX_GRAD = 49
GRADIENT = 64
"""Added to a unary operator's opcode: `dst = f'(a) * b`."""
DUAL = 128
"""Added to a unary operator's opcode: `dst = f'(a) * b` and `c = f(a)`."""
PAIR = 160
"""Added to a unary operator's opcode: `dst = f'(a)` and `c = f(a)`."""
IMMEDIATES = (0.0, 1.0, float("-inf"))
POLICIES = ("truncate", "pad")


class Form(enum.IntEnum):
    SERIAL = 0
    PARALLEL = 1


class WidthRule(enum.IntEnum):
    """Which intermediate widths d a program allows, given the hidden width H."""

    ANY = 0
    AT_MOST_HIDDEN = 1
    AT_LEAST_HIDDEN = 2
    EQUAL_HIDDEN = 3

    def allows(self, hidden: int, inner: int) -> bool:
        if self is WidthRule.ANY:
            return True
        if self is WidthRule.AT_MOST_HIDDEN:
            return inner <= hidden
        return inner >= hidden if self is WidthRule.AT_LEAST_HIDDEN else inner == hidden

    def describe(self) -> str:
        """The rule as text: "any d", "d <= H", "d >= H" or "d == H"."""
        return ("any d", "d <= H", "d >= H", "d == H")[self]


class Flag(enum.IntFlag):
    """What a backend may take a shortcut on. `MID_*` speak of `pre2` in the parallel form."""

    PARALLEL = 1
    PRE_IDENTITY = 2  # the first product reads x itself
    MID_IDENTITY = 4
    POST_IDENTITY = 8
    MID_SINGLE = 16  # mid is one unary instruction on its own input (register A; X when parallel)
    POST_SINGLE = 32  # post is one unary instruction on register A
    MID_USES_X = 64  # serial: mid reads x, hence contributes to dx
    POST_USES_X = 128  # post reads x, hence contributes to dx
    MID_BWD_USES_H = 256  # serial: the gradient of mid reads h (x when parallel)
    POST_BWD_USES_Y = 512  # the gradient of post reads y, y1 or y2
    MID_SELECT = 1024  # mid contains select instructions
    PRE_BWD_USES_X = 2048
    POST_BWD_USES_X = 4096  # the gradient of post reads x


class Segment(enum.IntEnum):
    PRE = 0
    MID = 1
    POST = 2
    PRE_BWD = 3
    MID_BWD = 4
    POST_BWD = 5
    PRE_BWDV = 6
    MID_BWDV = 7
    POST_BWDV = 8


class Instruction(NamedTuple):
    opcode: int
    dst: int
    a: int
    b: int = 0
    c: int = 0


@dataclass(frozen=True, slots=True)
class SegmentCode:
    """One segment: its instructions and output registers (`NONE` where absent)."""

    instructions: tuple[Instruction, ...] = ()
    value: int = NONE
    dx: int = NONE
    da: int = NONE
    db: int = NONE

    @property
    def outputs(self) -> tuple[int, int, int, int]:
        return self.value, self.dx, self.da, self.db

    @property
    def temporaries(self) -> int:
        """Number of temporaries used (highest written register + 1)."""
        written = [r for i in self.instructions for r in destinations(i)]
        return max(written, default=NUM_INPUTS - 1) - NUM_INPUTS + 1

    @property
    def inputs(self) -> int:
        """Bit r set: input register r is read, by an instruction or as an output."""
        read = {r for i in self.instructions for r in sources(i)} | {r for r in self.outputs if r != NONE}
        return sum(1 << r for r in read if r < NUM_INPUTS)


@dataclass(frozen=True, slots=True)
class Program:
    """A lowered expression. Compared and hashed by content.

    Attributes:
        tensor: int32 [length], contiguous, on the CPU; the serialized program. Never written to.
        digest: 16 bytes that stand for the words.
        flags: header word 6, for decisions that must not read the tensor (fake kernels, dispatch).
        rule: which widths it may run at.
        expression: the (canonical) expression it was lowered from; None when decoded from a bare tensor.
        policy: "truncate" or "pad".
    """

    tensor: torch.Tensor = field(compare=False, repr=False)
    digest: bytes = field(repr=False)
    flags: Flag
    rule: WidthRule
    policy: str
    expression: Expression | None = field(default=None, compare=False)

    @property
    def words(self) -> tuple[int, ...]:
        """The program as Python ints."""
        return tuple(self.tensor.tolist())

    def check_widths(self, hidden: int, inner: int) -> None:
        """Raises `ExpressionError` unless the program may run with hidden width H and intermediate width d."""
        if not self.rule.allows(hidden, inner):
            what = f"expression {self.expression}" if self.expression is not None else "the program"
            raise ExpressionError(
                f"{what} needs {self.rule.describe()} under policy {self.policy!r}, got H={hidden} and d={inner}"
            )


def is_unary(opcode: int) -> bool:
    return opcode in _UNARY_OPCODES


def is_binary(opcode: int) -> bool:
    return opcode in _BINARY_OPCODES


def is_gradient(opcode: int) -> bool:
    return opcode - GRADIENT in _UNARY_OPCODES


def is_dual(opcode: int) -> bool:
    return opcode - DUAL in _UNARY_OPCODES


def is_pair(opcode: int) -> bool:
    return opcode - PAIR in _UNARY_OPCODES


_UNARY_OPCODES = {row.opcode: row for row in OPERATORS.values() if row.arity == 1}
_BINARY_OPCODES = {row.opcode: row for row in OPERATORS.values() if row.arity == 2}


def sources(i: Instruction) -> tuple[int, ...]:
    """Registers an instruction reads. Raises `ExpressionError` on an unknown opcode."""
    if is_unary(i.opcode) or is_pair(i.opcode) or i.opcode == SELECT:
        return (i.a,)
    if is_binary(i.opcode) or is_gradient(i.opcode) or is_dual(i.opcode):
        return i.a, i.b
    if i.opcode == MAX_GRAD:
        return i.a, i.b, i.c
    raise ExpressionError(f"unknown opcode {i.opcode} in a program")


def destinations(i: Instruction) -> tuple[int, ...]:
    """Registers an instruction writes."""
    return (i.dst, i.c) if is_dual(i.opcode) or is_pair(i.opcode) else (i.dst,)


def encode(segments: Sequence[SegmentCode], form: Form, policy: str, rule: WidthRule, flags: Flag) -> tuple[int, ...]:
    """Serializes nine segments (order of `Segment`) to the words of the layout above."""
    code: list[int] = []
    table: list[int] = []
    temporaries = 0
    for s in segments:
        own = s.temporaries
        temporaries = max(temporaries, own)
        table += [FIRST_INSTRUCTION + len(code), len(s.instructions), own, s.inputs, *s.outputs]
        for i in s.instructions:
            code += [i.opcode | i.c << 8, i.dst, i.a, i.b]
    longest = max(len(s.instructions) for s in segments)
    length = FIRST_INSTRUCTION + len(code)
    header = [MAGIC, VERSION, length, form, POLICIES.index(policy), rule, int(flags), temporaries, longest]
    header += [0] * (HEADER_WORDS - len(header))
    return tuple(int(w) for w in [*header, *table, *code])


def decode_segments(words: Sequence[int]) -> list[SegmentCode]:
    """The nine segments of validated words."""
    segments = []
    for k in range(NUM_SEGMENTS):
        offset, count, _, _, value, dx, da, db = segment_entry(words, k)
        instructions = tuple(unpack(words, offset + INSTRUCTION_WORDS * n) for n in range(count))
        segments.append(SegmentCode(instructions, value, dx, da, db))
    return segments


def segment_entry(words: Sequence[int], k: int) -> Sequence[int]:
    """The eight words of segment `k` in the segment table."""
    start = HEADER_WORDS + SEGMENT_WORDS * k
    return words[start : start + SEGMENT_WORDS]


def unpack(words: Sequence[int], at: int) -> Instruction:
    """The instruction whose first word is `words[at]`."""
    head, dst, a, b = words[at : at + INSTRUCTION_WORDS]
    return Instruction(head & 0xFF, dst, a, b, head >> 8)


def derive_flags(segments: Sequence[SegmentCode], form: Form) -> Flag:
    """The flags that follow from the nine segments."""
    parallel = form == Form.PARALLEL
    pre, mid, post = segments[:3]
    mid_input = X if parallel else A
    facts = {
        Flag.PARALLEL: parallel,
        Flag.PRE_IDENTITY: pre.value == X,
        Flag.MID_IDENTITY: mid.value == mid_input,
        Flag.POST_IDENTITY: post.value == A,
        Flag.MID_SINGLE: _is_single_unary(mid, mid_input),
        Flag.POST_SINGLE: _is_single_unary(post, A),
        Flag.MID_USES_X: not parallel and _reads(mid, X),
        Flag.POST_USES_X: _reads(post, X),
        Flag.MID_BWD_USES_H: _reads(segments[Segment.MID_BWD], mid_input),
        Flag.POST_BWD_USES_Y: _reads(segments[Segment.POST_BWD], A) or _reads(segments[Segment.POST_BWD], B),
        Flag.MID_SELECT: any(i.opcode == SELECT for i in mid.instructions),
        Flag.PRE_BWD_USES_X: _reads(segments[Segment.PRE_BWD], X),
        Flag.POST_BWD_USES_X: _reads(segments[Segment.POST_BWD], X),
    }
    return Flag(sum(flag for flag, holds in facts.items() if holds))


def _reads(segment: SegmentCode, register: int) -> bool:
    return bool(segment.inputs >> register & 1)


def _is_single_unary(segment: SegmentCode, register: int) -> bool:
    if len(segment.instructions) != 1:
        return False
    (only,) = segment.instructions
    return is_unary(only.opcode) and only.a == register and segment.value == only.dst
