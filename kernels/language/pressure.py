"""Fitting a segment's operations into few registers by computing some values again.

Where sharing every common value keeps too many of them alive, a value is dropped and computed again at its next use:
the one that is cheap to compute and not needed for long (Belady's rule, weighted by cost). Input registers are never
lost, so anything can be computed again.

Rejected: spilling to memory. Programs have no memory, and a row of columns is cheaper to compute than to store.

Source: Belady, "A Study of Replacement Algorithms for a Virtual-Storage Computer", IBM Systems Journal 1966; Briggs,
Cooper and Torczon, "Rematerialization", PLDI 1992.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from kernels.language.graph import CHEAP, Operation, instruction
from kernels.language.program import (
    GRADIENT,
    MAX_INSTRUCTIONS,
    NONE,
    NUM_INPUTS,
    Instruction,
    SegmentCode,
    is_dual,
    is_gradient,
    is_pair,
    is_unary,
)

TRANSCENDENTAL = 8
"""Cost of an instruction with an exponential in it, in plain instructions."""

_GROWTH = 6
"""Give up when the code has this many times the operations: computing everything again is then no worse."""

_FAR = 64
"""Distance to the next use, in lengths of the segment, of a value that has none."""


class TooFewRegisters(Exception):
    """The operands of one instruction chain alone do not fit."""


def cost(instructions: Sequence[Instruction]) -> int:
    """Rough time of a segment, in plain instructions."""
    return sum(_weight(i.opcode) for i in instructions)


def fit(operations: Sequence[Operation], outputs: Sequence[int], limit: int) -> SegmentCode:
    """Code for `operations` (one result each, in a valid order) with at most `limit` temporaries.

    Raises:
        TooFewRegisters: it cannot be done this way, or only with very many instructions.
    """
    return _Fitter(operations, outputs, limit).run()


def _weight(opcode: int) -> int:
    if is_unary(opcode):
        return 1 if opcode in CHEAP else TRANSCENDENTAL
    if is_gradient(opcode):
        return 1 if opcode - GRADIENT in CHEAP else TRANSCENDENTAL
    return TRANSCENDENTAL if is_dual(opcode) or is_pair(opcode) else 1


class _Fitter:
    def __init__(self, operations: Sequence[Operation], outputs: Sequence[int], limit: int) -> None:
        self.operations = operations
        self.outputs = outputs
        self.producer = {op.results[0]: op for op in operations}
        self.weight = {op.results[0]: _weight(op.opcode) for op in operations}
        self.height = dict.fromkeys(range(NUM_INPUTS), 0)
        for op in operations:
            self.height[op.results[0]] = 1 + max(self.height[v] for v in op.args)
        self.uses: dict[int, list[int]] = {v: [] for v in self.producer}
        for index, op in enumerate(operations):
            for v in op.args:
                if v >= NUM_INPUTS:
                    self.uses[v].append(index)
        for v in outputs:
            if v >= NUM_INPUTS:
                self.uses[v].append(len(operations))
        self.longest = min(_GROWTH * len(operations), MAX_INSTRUCTIONS)
        self.free = list(range(NUM_INPUTS, NUM_INPUTS + limit))
        self.register = {v: v for v in range(NUM_INPUTS)}
        self.code: list[Instruction] = []

    def run(self) -> SegmentCode:
        for index, op in enumerate(self.operations):
            self._ensure(op.results[0], index, frozenset())
        pins: frozenset[int] = frozenset()
        for v in self.outputs:
            if v != NONE:
                self._ensure(v, len(self.operations), pins)
                pins |= {v}
        return SegmentCode(tuple(self.code), *(NONE if v == NONE else self.register[v] for v in self.outputs))

    def _ensure(self, value: int, index: int, pins: frozenset[int]) -> None:
        """Has `value` in a register while operation `index` is being worked on; `pins` are not dropped."""
        if value in self.register:
            return
        op = self.producer[value]
        own = frozenset(v for v in op.args if v in self.register)
        for v in sorted(op.args, key=self.height.__getitem__, reverse=True):
            self._ensure(v, index, pins | own)
            own |= {v}
        read = [self.register[v] for v in op.args]
        for v in set(op.args) - pins:
            if v >= NUM_INPUTS and self._next_use(v, index) is None:
                self._drop(v)
        self.register[value] = self._take(index, pins | own)
        self.code.append(instruction(op, read, [self.register[value]]))
        if len(self.code) > self.longest:
            raise TooFewRegisters

    def _next_use(self, value: int, index: int) -> int | None:
        """The next operation after `index` that reads `value`."""
        uses = self.uses[value]
        k = bisect_right(uses, index)
        return uses[k] if k < len(uses) else None

    def _drop(self, value: int) -> None:
        self.free.append(self.register.pop(value))

    def _take(self, index: int, pins: frozenset[int]) -> int:
        """A free register, made free if need be."""
        if not self.free:
            candidates = [v for v in self.register if v >= NUM_INPUTS and v not in pins]
            if not candidates:
                raise TooFewRegisters
            self._drop(max(candidates, key=lambda v: self._score(v, index)))
        lowest = min(self.free)
        self.free.remove(lowest)
        return lowest

    def _score(self, value: int, index: int) -> float:
        following = self._next_use(value, index)
        distance = _FAR * len(self.operations) if following is None else following - index
        return distance / self._cost(value)

    def _cost(self, value: int) -> int:
        """Cost of computing `value` again with what is in registers now, three levels deep."""
        total = self.weight[value]
        for v in self.producer[value].args:
            if v not in self.register:
                total += self.weight[v]
                for w in self.producer[v].args:
                    if w not in self.register:
                        total += 2 * self.weight[w]
        return total
