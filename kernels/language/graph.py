"""Value graphs of one segment, and their scheduling onto registers; the middle of `kernels.language.lowering`.

A value is an integer: 0..3 are the input registers, higher ones are results of operations. Segments are small (a few to
a few hundred operations), so every pass here is a plain walk.

Rejected: `torch.fx`. It has the graph but none of the passes, and costs milliseconds per expression.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kernels.language.expression import ExpressionError
from kernels.language.operators import OPERATORS
from kernels.language.program import (
    DUAL,
    GRADIENT,
    MAX_GRAD,
    MAX_INSTRUCTIONS,
    NONE,
    NUM_INPUTS,
    PAIR,
    SELECT,
    G,
    Instruction,
    SegmentCode,
    is_binary,
    is_gradient,
)

ADD, MUL, MAX = (OPERATORS[name].opcode for name in ("add", "mul", "max"))
CHEAP = frozenset(row.opcode for row in OPERATORS.values() if row.cheap)
"""Activations without a transcendental: computing value and derivative together saves nothing."""

MAX_OPERATIONS = 4 * MAX_INSTRUCTIONS


@dataclass(slots=True, eq=False)
class Operation:
    """`results = opcode(args)`; `immediate` is the select instruction's."""

    opcode: int
    args: tuple[int, ...]
    results: tuple[int, ...]
    immediate: int = 0


class Graph:
    """Operations in a valid order of evaluation. With `share`, equal operations become one value."""

    def __init__(self, share: bool) -> None:
        self.share = share
        self.operations: list[Operation] = []
        self.fresh = NUM_INPUTS
        self._known: dict[tuple[int, tuple[int, ...], int], int] = {}

    def add(self, opcode: int, *args: int, immediate: int = 0) -> int:
        """The value of `opcode(args)`; raises `ExpressionError` when the segment grows out of all proportion."""
        if is_binary(opcode) and self.share:
            args = tuple(sorted(args))  # add, mul and max commute exactly
        key = (opcode, args, immediate)
        known = self._known.get(key) if self.share else None
        if known is not None:
            return known
        if len(self.operations) >= MAX_OPERATIONS:
            raise ExpressionError(f"the expression lowers to more than {MAX_INSTRUCTIONS} instructions in one segment")
        value, self.fresh = self.fresh, self.fresh + 1
        self._known[key] = value
        self.operations.append(Operation(opcode, args, (value,), immediate))
        return value


def live_operations(operations: Sequence[Operation], outputs: Iterable[int]) -> list[Operation]:
    """The operations that some output needs, in the same order."""
    wanted = set(outputs)
    live = []
    for op in reversed(operations):
        if wanted.intersection(op.results):
            wanted.update(op.args)
            live.append(op)
    return live[::-1]


def merge_derivatives(operations: list[Operation], fresh: int) -> list[Operation]:
    """f(a) and f'(a) * g become one dual operation, or a pair and a product where g depends on f(a).

    `fresh` is a value number above all in use. The result is in a valid order of evaluation.
    """
    gradients = [op for op in operations if is_gradient(op.opcode) and op.opcode - GRADIENT not in CHEAP]
    for gradient in gradients:
        opcode = gradient.opcode - GRADIENT
        a, g = gradient.args
        value = next((op for op in operations if op.opcode == opcode and op.args == (a,)), None)
        if value is None:
            continue
        rest = [op for op in operations if op is not value and op is not gradient]
        if _reaches(operations, value, gradient):
            pair = Operation(opcode + PAIR, (a,), (fresh, value.results[0]))
            rest += [pair, Operation(MUL, (fresh, g), gradient.results)]
            fresh += 1
        else:
            rest.append(Operation(opcode + DUAL, (a, g), (gradient.results[0], value.results[0])))
        operations = _ordered(rest)
    return operations


def _reaches(operations: Sequence[Operation], source: Operation, target: Operation) -> bool:
    """Whether `target` needs, directly or not, a result of `source`; `operations` are in evaluation order."""
    tainted = set(source.results)
    for op in operations:
        if tainted.intersection(op.args):
            if op is target:
                return True
            tainted.update(op.results)
    return False


def _ordered(operations: Sequence[Operation]) -> list[Operation]:
    """A valid order of evaluation of an acyclic set of operations."""
    producer = {r: op for op in operations for r in op.results}
    done: set[int] = set()
    order: list[Operation] = []
    for start in operations:
        stack = [start]
        while stack:
            op = stack[-1]
            if id(op) in done:
                stack.pop()
                continue
            missing = [producer[v] for v in op.args if v in producer and id(producer[v]) not in done]
            if missing:
                stack.extend(missing)
                continue
            done.add(id(op))
            order.append(op)
            stack.pop()
    return order


_FEW_REGISTERS = 2
"""Temporaries that are few enough not to look for another order: a segment has up to three input tiles besides."""


def schedule(operations: list[Operation], outputs: Sequence[int], reorder: bool) -> SegmentCode:
    """Orders operations and assigns registers; `outputs` are values (or `NONE`) in the order value, dx, da, db.

    With `reorder` the order that takes the fewest registers is chosen among the given and two others; the others are
    not tried where the given one takes so few that it cannot matter.
    """
    uses = _use_counts(operations, outputs)
    best, fewest = operations, _registers_needed(operations, uses)
    for other in (late_order, greedy_order) if reorder else ():
        if fewest <= _FEW_REGISTERS:
            break
        order = other(operations, outputs)
        needed = _registers_needed(order, uses)
        if needed < fewest:
            best, fewest = order, needed
    return _allocate(best, uses, outputs)


def late_order(operations: Sequence[Operation], outputs: Sequence[int]) -> list[Operation]:
    """Gradients in the given order, and every other value just before the first gradient that needs it."""
    late = {G}
    gradients, rest = [], []
    for op in operations:
        if late.intersection(op.args):
            late.update(op.results)
            gradients.append(op)
        else:
            rest.append(op)
    return _ordered([*gradients, *rest])


def greedy_order(operations: Sequence[Operation], outputs: Sequence[int]) -> list[Operation]:
    """At every step the ready operation that adds the fewest live values; ties go to the given order."""
    uses = _use_counts(operations, outputs)
    missing = [sum(1 for v in set(op.args) if v >= NUM_INPUTS) for op in operations]
    readers: dict[int, list[int]] = {}
    for n, op in enumerate(operations):
        for v in set(op.args):
            readers.setdefault(v, []).append(n)
    ready = [n for n, count in enumerate(missing) if count == 0]
    order: list[Operation] = []
    while ready:
        n = min(ready, key=lambda n: (_growth(operations[n], uses), n))
        ready.remove(n)
        op = operations[n]
        order.append(op)
        for v in op.args:
            uses[v] -= 1
        for v in op.results:
            for reader in readers.get(v, ()):
                missing[reader] -= 1
                if missing[reader] == 0:
                    ready.append(reader)
    return order


def _growth(op: Operation, uses: dict[int, int]) -> int:
    """How many more values are live after `op` than before."""
    a = op.args
    if len(a) == 1:
        freed = int(a[0] >= NUM_INPUTS and uses[a[0]] == 1)
    else:
        freed = sum(v >= NUM_INPUTS and uses[v] == a.count(v) for v in set(a))
    return len(op.results) - freed


def _use_counts(operations: Sequence[Operation], outputs: Sequence[int]) -> dict[int, int]:
    uses = dict.fromkeys([*range(NUM_INPUTS), *(r for op in operations for r in op.results)], 0)
    for v in [*(v for op in operations for v in op.args), *(v for v in outputs if v != NONE)]:
        uses[v] += 1
    return uses


def _registers_needed(operations: Sequence[Operation], uses: dict[int, int]) -> int:
    """How many temporaries `_allocate` would take: the most values that are live at a time."""
    uses = uses.copy()
    live = most = 0
    for op in operations:
        for v in op.args:
            uses[v] -= 1
            if uses[v] == 0 and v >= NUM_INPUTS:
                live -= 1
        live += len(op.results)
        most = max(most, live)
    return most


def _allocate(operations: Sequence[Operation], uses: dict[int, int], outputs: Sequence[int]) -> SegmentCode:
    """Linear scan: the lowest free temporary for each result; an operand's register is free once it was last read."""
    uses = uses.copy()
    register = {v: v for v in range(NUM_INPUTS)}
    register[NONE] = NONE
    free: list[int] = []
    top = NUM_INPUTS
    instructions = []
    for op in operations:
        read = [register[v] for v in op.args]
        for v in op.args:
            uses[v] -= 1
            if uses[v] == 0 and v >= NUM_INPUTS:
                free.append(register[v])
        for r in op.results:
            if free:
                register[r] = min(free)
                free.remove(register[r])
            else:
                register[r], top = top, top + 1
        instructions.append(instruction(op, read, [register[r] for r in op.results]))
    return SegmentCode(tuple(instructions), *(register[v] for v in outputs))


def instruction(op: Operation, read: Sequence[int], written: Sequence[int]) -> Instruction:
    """The instruction of an operation whose operands and results are in these registers."""
    a, b, c = (*read, 0, 0)[:3]
    if op.opcode == SELECT:
        return Instruction(op.opcode, written[0], a, op.immediate)
    if op.opcode == MAX_GRAD:
        return Instruction(op.opcode, written[0], a, b, c)
    if len(written) == 2:
        return Instruction(op.opcode, written[0], a, b, written[1])
    return Instruction(op.opcode, written[0], a, b)
