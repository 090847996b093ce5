"""Microcode: a program's segments as words of an accumulator machine, which a Triton kernel can interpret.

Triton has no indexable registers: a register number read from memory can only choose between named tiles by branches.
So the three-address instructions of `kernels.language.program` are translated, on the host and once per program, for a
machine with fewer choices per step. Its state is four input tiles, two working tiles `acc` and `v`, and slots. One word
is one step:

    bits 0..7    operation                     1. fetch:  v <- register (if any)
    bits 8..15   fetched register + 1, or 0    2. operation on acc and v
    bits 16..23  slot written + 1, or 0        3. store:  slot <- acc, or v (if any)
    bit 24       the slot takes v, not acc

    registers   0 X, 1 A, 2 B, 3 G (as in a program), 4 the constant 1, 5 acc, 8 + k slot k

    0 MOVE        acc <- v                             7 MAX_FACTOR  acc <- acc < v ? 0 : acc == v ? 1/2 : 1
    1 ADD         acc <- acc + v                       8 SELECTED    acc <- acc == 0 ? 0 : acc * v
    2 MUL         acc <- acc * v                       16..47        acc <- f(acc)   (the program's opcode)
    3 MAX         acc <- max(acc, v)                   48..79        acc <- f'(v) * acc, v <- f(v)   (opcode + 32)
    4..6 SELECT   acc <- column < H ? acc : 0, 1, -inf   9 KEEP      nothing (a step that only stores)

Most values are used once, by the next step: they stay in acc. Released expressions need no slot or one.

Layout on the device (int32): nine entries of eight words, in the order of `kernels.language.program.Segment`: first
word (counted from the entry), number of steps, registers of value, dx, da, db (-1: absent), register acc holds at the
start, 0. Steps follow, and one unused word (the machine reads one ahead).

Rejected: interpreting the program's own words in Triton. Two operands and a destination of 20 registers each are chosen
by 60 selects per element and instruction, more than the work itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from kernels.language.execute import segments_of
from kernels.language.expression import ExpressionError
from kernels.language.operators import UNARY_OPCODES
from kernels.language.program import (
    DUAL,
    GRADIENT,
    MAX_GRAD,
    NONE,
    NUM_INPUTS,
    NUM_SEGMENTS,
    PAIR,
    SELECT,
    Instruction,
    SegmentCode,
    is_binary,
    is_dual,
    is_gradient,
    is_pair,
    is_unary,
    sources,
)

ENTRY_WORDS = 8
ONE, ACC, FIRST_SLOT = 4, 5, 8
MOVE, ADD, MUL, MAX, SELECTS, MAX_FACTOR, SELECTED, KEEP = 0, 1, 2, 3, 4, 7, 8, 9
FIRST_UNARY = UNARY_OPCODES.start
DERIVATIVE = len(UNARY_OPCODES)
"""Added to a unary operator's opcode: acc <- f'(v) * acc, v <- f(v)."""
SLOT_VARIANTS = (2, 6, 16)
"""Numbers of slots kernels are compiled for; a segment uses the first that is enough."""
_NOTHING = -1


@dataclass(frozen=True, slots=True)
class Step:
    """One word; `fetch` (a register) and `store` (a slot) are `None` where absent."""

    operation: int
    fetch: int | None = None
    store: int | None = None
    from_v: bool = False

    def word(self) -> int:
        fetch, store = (0 if f is None else f + 1 for f in (self.fetch, self.store))
        return self.operation | fetch << 8 | store << 16 | self.from_v << 24


@dataclass(frozen=True, slots=True)
class MicroSegment:
    """Steps, output registers (value, dx, da, db; -1 absent), the register acc starts with, and slots used."""

    steps: tuple[Step, ...]
    outputs: tuple[int, int, int, int]
    start: int
    slots: int


@lru_cache(maxsize=4096)
def translate(words: tuple[int, ...]) -> tuple[MicroSegment, ...]:
    """The nine segments of a validated program; cached."""
    return tuple(_Translator(code).run() for code in segments_of(words))


@lru_cache(maxsize=4096)
def encode(words: tuple[int, ...]) -> tuple[int, ...]:
    """The device words of a validated program; cached."""
    table: list[int] = []
    code: list[int] = []
    for segment in translate(words):
        first = ENTRY_WORDS * NUM_SEGMENTS + len(code) - len(table)
        table += [first, len(segment.steps), *segment.outputs, segment.start, 0]
        code += [step.word() for step in segment.steps]
    return (*table, *code, 0)


@lru_cache(maxsize=4096)
def slot_variants(words: tuple[int, ...]) -> tuple[int, ...]:
    """Per segment of a validated program the kernel variant (an element of `SLOT_VARIANTS`) that runs it; cached."""
    return tuple(next(v for v in SLOT_VARIANTS if v >= segment.slots) for segment in translate(words))


@dataclass
class _Operation:
    """An instruction over values (inputs are values 0..3) instead of registers."""

    opcode: int
    args: tuple[int, ...]
    results: tuple[int, ...]
    immediate: int = 0


@dataclass
class _Translator:
    code: SegmentCode
    steps: list[Step] = field(default_factory=list)
    home: dict[int, int] = field(default_factory=lambda: {r: r for r in range(NUM_INPUTS)})
    """Value -> register it can be fetched from."""
    free: list[int] = field(default_factory=list)
    slots: int = 0
    acc: int = _NOTHING
    v: int = _NOTHING

    def run(self) -> MicroSegment:
        operations, outputs = _values(self.code)
        last = {v: i for i, op in enumerate(operations) for v in op.args}
        for v in outputs:
            last[v] = len(operations)
        self.acc = start = _start(operations)
        for index, op in enumerate(operations):
            following = operations[index + 1] if index + 1 < len(operations) else None
            self._emit(op, index, last, following, [v for v in outputs if v != NONE])
        registers = [
            NONE if v == NONE else ACC if v == self.acc and v not in self.home else self.home[v] for v in outputs
        ]
        return MicroSegment(tuple(self.steps), tuple(registers), start, self.slots)  # type: ignore[arg-type]

    def _emit(
        self, op: _Operation, index: int, last: dict[int, int], following: _Operation | None, outputs: list[int]
    ) -> None:
        first, second = _roles(op, self.acc)
        if op.opcode == MAX_GRAD:
            a, b, g = op.args
            self._load(a)
            self.steps.append(Step(MAX_FACTOR, self._fetch(b)))
            self.v, first, second, operation = b, _NOTHING, g, SELECTED
            self.acc = _NOTHING
        else:
            operation = _operation(op)
            if is_pair(op.opcode):
                self.steps.append(Step(MOVE, ONE))
                self.v = _NOTHING
            else:
                self._load(first)
        fetch = None if second is None else self._fetch(second)
        for v in {*op.args} & self.home.keys():
            if v >= NUM_INPUTS and last[v] == index:
                self.free.append(self.home.pop(v))
        if second is not None:
            self.v = second
        self.acc = op.results[0]
        stored = None
        if not self._stays(self.acc, index, last, following, outputs):
            stored = self._slot(self.acc, index, last)
        stored_v = None
        if len(op.results) == 2:
            self.v = op.results[1]
            stored_v = self._slot(self.v, index, last)
        elif operation >= FIRST_UNARY + DERIVATIVE:
            self.v = _NOTHING  # f(v), which nobody asked for
        if stored is None and stored_v is not None:
            self.steps.append(Step(operation, fetch, stored_v, from_v=True))
        else:
            self.steps.append(Step(operation, fetch, stored))
            if stored_v is not None:
                self.steps.append(Step(KEEP, None, stored_v, from_v=True))

    def _load(self, value: int) -> None:
        """Brings `value` into acc."""
        if self.acc != value:
            self.steps.append(Step(MOVE, self._fetch(value)))
            self.acc = self.v = value

    def _fetch(self, value: int) -> int | None:
        """The register to fetch `value` into v from; None where v holds it."""
        if self.v == value:
            return None
        return self.home.get(value, ACC if self.acc == value else None)

    def _slot(self, value: int, index: int, last: dict[int, int]) -> int | None:
        if last.get(value, index) <= index:
            return None  # never read
        if not self.free:
            self.free.append(FIRST_SLOT + self.slots)
            self.slots += 1
        self.free.sort()
        self.home[value] = self.free.pop(0)
        return self.home[value] - FIRST_SLOT

    def _stays(
        self, value: int, index: int, last: dict[int, int], following: _Operation | None, outputs: list[int]
    ) -> bool:
        """Whether `value`, now in acc, is needed nowhere but in acc: by the next operation, or as the last output."""
        if following is None:
            return True
        if last.get(value, index) > index + 1 or value in outputs or value not in following.args:
            return False
        first, second = _roles(following, value)
        return first == value and following.opcode != MAX_GRAD and (second != value or following.args == (value, value))


def _values(code: SegmentCode) -> tuple[list[_Operation], tuple[int, ...]]:
    """(operations over single-assignment values, output values)."""
    current = {r: r for r in range(NUM_INPUTS)}
    fresh = NUM_INPUTS
    operations = []
    for i in code.instructions:
        args = tuple(current[r] for r in sources(i))
        destinations = (i.dst, i.c) if is_dual(i.opcode) or is_pair(i.opcode) else (i.dst,)
        results = tuple(range(fresh, fresh + len(destinations)))
        fresh += len(destinations)
        current.update(zip(destinations, results, strict=True))
        operations.append(_Operation(i.opcode, args, results, _immediate(i)))
    return operations, tuple(NONE if r == NONE else current[r] for r in code.outputs)


def _immediate(i: Instruction) -> int:
    return i.b if i.opcode == SELECT else 0


def _start(operations: Sequence[_Operation]) -> int:
    """The input acc had best hold at the start."""
    if operations:
        first, _ = _roles(operations[0], _NOTHING)
        return first if 0 <= first < NUM_INPUTS else 0
    return 0


def _roles(op: _Operation, acc: int) -> tuple[int, int | None]:
    """(value wanted in acc, value wanted in v or None); commutative operators take what acc holds."""
    if is_unary(op.opcode) or op.opcode == SELECT:
        return op.args[0], None
    if is_pair(op.opcode):
        return _NOTHING, op.args[0]
    if is_gradient(op.opcode) or is_dual(op.opcode):
        return op.args[1], op.args[0]
    a, b = op.args[:2]
    return (b, a) if is_binary(op.opcode) and acc == b else (a, b)


def _operation(op: _Operation) -> int:
    """The machine's number of an operation. Raises `ExpressionError` for one that is not in the operator table."""
    if op.opcode in (ADD, MUL, MAX) or is_unary(op.opcode):
        return op.opcode
    if op.opcode == SELECT:
        return SELECTS + op.immediate
    for offset in (GRADIENT, DUAL, PAIR):
        if is_unary(op.opcode - offset):
            return op.opcode - offset + DERIVATIVE
    raise ExpressionError(f"opcode {op.opcode} has no operation in Triton's microcode")


def run_steps(segment: MicroSegment, inputs: Sequence[object], operations: dict[int, object]) -> list[object]:
    """Runs a segment with Python callables: {operation: f(acc, v) -> (acc, v)}; for checks of the translation.

    Args:
        inputs: X, A, B, G and the constant 1.

    Returns:
        value, dx, da, db; None where absent.
    """
    registers = dict(enumerate(inputs))
    registers[ACC], v = registers[segment.start], None
    for step in segment.steps:
        if step.fetch is not None:
            v = registers[step.fetch]
        if step.operation == MOVE:
            registers[ACC] = v
        elif step.operation != KEEP:
            registers[ACC], v = operations[step.operation](registers[ACC], v)  # type: ignore[operator]
        if step.store is not None:
            registers[FIRST_SLOT + step.store] = v if step.from_v else registers[ACC]
    return [None if r == NONE else registers[r] for r in segment.outputs]
