"""The program: an FFN expression as one small int32 tensor that every backend interprets.

A program is *data*. It does not depend on the sizes H and d, only on the expression and the width policy, so one
program serves every shape its width rule allows, and a never-seen expression compiles nothing.

The computation it describes (T rows; x [T, H], w1 [d, H], w2 [H, d]; all elementwise math in float32, or in float64
where x is float64; only matrix-product operands are rounded to the compute dtype):

    serial form                                     parallel form (always d == H)
      p = pre(x)              [T, H]                  p1 = pre(x), p2 = mid(x)      [T, H] both
      h = p @ w1.T + b1       [T, d]                  y1 = p1 @ w1.T + b1           [T, H]
      m = mid(x, h)           [T, d]                  y2 = p2 @ w2.T + b2           [T, H]
      y = m @ w2.T + b2       [T, H]                  o  = post(x, y1, y2)          [T, H]
      o = post(x, y)          [T, H]

    out = LayerNorm(x + dropout(o))   or, for a bare expression, out = o

Binary layout, version 1 (little-endian int32 words; all offsets count words from the start of the tensor)
----------------------------------------------------------------------------------------------------------
Header, words 0..15:

    0 magic      0x314E4646, the bytes "FFN1"          4 policy      0 truncate, 1 pad (for information)
    1 version    1                                      5 width rule  0 any d, 1 needs d <= H, 2 needs d >= H,
    2 length     words in the whole program                           3 needs d == H
    3 form       0 serial, 1 parallel                   6 flags       see `Flag`
    7 temporaries: the most any segment uses (<= 16)    8 instructions: the most any segment has
    9..15 zero

Segment table, words 16..87: nine entries of eight words, in the order of `Segment`

    pre mid post   pre_bwd mid_bwd post_bwd   pre_bwdv mid_bwdv post_bwdv

    +0 offset    word of the first instruction (a multiple of 4)      +4 value  register of the forward value
    +1 count     number of instructions (0 is common)                 +5 dx     register of the gradient w.r.t. x
    +2 temps     temporaries used                                     +6 da     ... w.r.t. register A
    +3 inputs    bit r set: input register r is read, by an           +7 db     ... w.r.t. register B
                 instruction or as an output                          (each a register, or -1: absent / zero)

`bwd` segments give gradients only (value = -1); `bwdv` segments give the same gradients and the recomputed forward
value (p, m or o: the operand of a weight gradient's product, or LayerNorm's input), sharing what the two have in
common. A backend runs whichever of the two it needs at a place. Forward segments have dx = da = db = -1.

Instructions follow from word 88, four words each: `opcode | c << 8`, `dst`, `a`, `b`.

Registers are numbered 0..19. 0..3 are inputs and never written, 4..19 are temporaries, each written before it is
read; a temporary may be reused, and `dst` may equal a source (operands are read before the result is written):

    0 X   x                                          2 B   y2 in post of the parallel form
    1 A   h in mid, y in post (y1 when parallel)     3 G   the incoming gradient, of the segment's value

An output may be an input register: identity pre is `count 0, value 0`; post_bwd of `add(x, y)` is `dx 3, da 3`.

Opcodes (names and numbers of operators come from `kernels.language.operators`):

    1..15    binary:  dst = op(a, b)                                   1 add, 2 mul, 3 max (NaN if either is NaN)
    16..47   unary:   dst = f(a)                                       (b = 0)
    48       select:  dst = column < H ? a : imm[b]                    imm = {0: 0.0, 1: 1.0, 2: -inf}
    49       maxgrad: dst = a < b ? 0 : a == b ? c / 2 : c             gradient c of max(a, b) for a; NaN passes c
    80..111  unary gradient (operator + 64):  dst = f'(a) * b          b is a gradient register
    144..175 unary dual (operator + 128):     dst = f'(a) * b, c = f(a)   two results, dst != c
    176..207 unary pair (operator + 160):     dst = f'(a), c = f(a)       two results, dst != c; b = 0

Gradients follow PyTorch's autograd exactly, also at kinks, infinities and NaN (they select where a factor 0 would
turn inf into NaN): relu: a <= 0 ? 0 : b; relu2: a <= 0 ? 0 : a b + a b; leaky_relu: a > 0 ? b : 0.01 b;
elu: a <= 0 ? b exp(a) : b; the smooth ones are f'(a) * b with f' from the operator table. A
pair is emitted for an f that costs a transcendental, where f(a) is needed to compute the gradient that f'(a)
multiplies; elu'(a) is a <= 0 ? exp(a) : 1.

Version 1 stands for the layout and the meaning of the opcodes there are. New operators append opcodes and keep it:
older programs mean the same, and an older reader refuses an opcode it does not know (`kernels.language.validation`).

Widths. Under `truncate` a mixed operator is evaluated over the narrower columns, so `mid` runs over d columns and
reads the first d of x (d <= H by rule). Under `pad` with d > H, x has no columns H..d-1: a backend supplies any value
there (0, say); `select` puts the operator's identity in its place, and the x gradient of those columns is dropped.
Where d <= H, `select` is the identity. For d < H, mid's x gradient adds to the first d columns of dx only.

Gradient flow of the serial form, given do (= dout, or LayerNorm's input gradient through the dropout mask):

    dy, dx += post_bwd(x, y, do);  dw2 = dy.T @ m;  db2 = sum(dy);  dm = dy @ w2
    dh, dx += mid_bwd(x, h, dm);   dw1 = dh.T @ p;  db1 = sum(dh);  dp = dh @ w1
    dx += pre_bwd(x, dp);          with LayerNorm, dx += LayerNorm's input gradient (the residual)

and of the parallel form:

    dy1, dy2, dx += post_bwd(x, y1, y2, do);  dw1 = dy1.T @ p1;  db1 = sum(dy1);  dw2 = dy2.T @ p2;  db2 = sum(dy2)
    dx += pre_bwd(x, dy1 @ w1) + mid_bwd(x, dy2 @ w2)

Chosen: separate gradient segments with fused `f'(a) * b` and dual instructions. Rejected: one instruction per
mathematical step of the derivative, which triples the passes over a tile and cannot reproduce autograd's
selections; and writing sizes into the program, which makes a program per shape.
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
