"""Lowering: expression -> program (format: docs/program.md).

    1. split      the tree is cut at its two `linear` nodes into segments (serial or parallel form)
    2. values     each segment becomes a graph with shared subexpressions (value numbering, commutative operators too)
    3. gradients  reverse accumulation over that graph, one fused gradient instruction per operator
    4. merging    f(a) and f'(a) of one a become one dual or pair instruction (one transcendental instead of two)
    5. order      instructions are ordered for few live values, then registers are assigned by liveness

A segment that needs too many registers computes some values again (`kernels.language.pressure`), in the last resort
everything (Sethi-Ullman order, JACM 1970).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock

import torch

from kernels.language.expression import Expression, ExpressionError, parse_expression, with_kron
from kernels.language.graph import (
    ADD,
    MAX,
    MUL,
    Graph,
    Operation,
    greedy_order,
    late_order,
    live_operations,
    merge_derivatives,
    schedule,
)
from kernels.language.operators import LEAF, OPERATORS
from kernels.language.pressure import TooFewRegisters, cost, fit
from kernels.language.program import (
    GRADIENT,
    IMMEDIATES,
    MAX_GRAD,
    MAX_INSTRUCTIONS,
    MAX_TEMPORARIES,
    NONE,
    POLICIES,
    SELECT,
    A,
    B,
    Flag,
    Form,
    G,
    Program,
    Segment,
    SegmentCode,
    WidthRule,
    X,
    derive_flags,
    encode,
)
from kernels.language.program_store import store
from kernels.language.validation import mark_valid, validate_program
from kernels.language.widths import check_policy, check_weights

CACHE_SIZE = 1024
"""Programs kept by `lower`; the least recently used is dropped. A program takes about 1 KB."""

ENOUGH = 1.5
"""Recomputation that costs no more than this, times the cost with everything shared, is not improved upon."""


def lower(expression: str | Expression, policy: str = "truncate") -> Program:
    """The program of an expression; cached by text, so that a repeated call costs a dictionary look-up.

    Expressions with the same canonical form (`kernels.language.canonical`) share one program, and `kron` shares that of
    `linear`: what a weight is made of is the caller's business (`kernels.ffn.kron`).

    Raises:
        ExpressionError: not an expression; weights not used once each, wb1 first; no intermediate width d at which
            the widths fit under `policy`; or too large for the register file.
    """
    key = (expression, policy)
    with _lock:
        program = _cache.get(key)
        if program is not None:
            _cache.move_to_end(key)
            return program
    parsed = parse_expression(expression) if isinstance(expression, str) else expression
    if not isinstance(parsed, Expression):
        raise ExpressionError(
            f"program must be expression text, an Expression or a Program, not {type(parsed).__name__}"
        )
    check_policy(policy)
    check_weights(parsed)
    canonical = with_kron(_canonicalize(parsed), ())
    with _lock:
        program = _cache.get((canonical, policy))
    if program is None:
        program = _lower(canonical, policy)
    with _lock:
        for k in {key, (canonical, policy)}:
            _cache[k] = program
            _cache.move_to_end(k)
        while len(_cache) > CACHE_SIZE:
            _cache.popitem(last=False)
    return program


def load_program(tensor: torch.Tensor) -> Program:
    """A `Program` from its serialized tensor (int32), validated. Raises `ExpressionError` when it is not valid."""
    words = validate_program(tensor)
    return _program(words)


def _program(words: tuple[int, ...], expression: Expression | None = None) -> Program:
    tensor = store(words)
    mark_valid(tensor, words)
    digest = hashlib.blake2b(array("i", words), digest_size=16).digest()
    return Program(tensor, digest, Flag(words[6]), WidthRule(words[5]), POLICIES[words[4]], expression)


def clear_cache() -> None:
    """Forgets all cached programs."""
    with _lock:
        _cache.clear()


_cache: OrderedDict[tuple[str | Expression, str], Program] = OrderedDict()
_lock = Lock()


def _canonicalize(expression: Expression) -> Expression:
    from kernels.language.canonical import canonicalize

    return canonicalize(expression)


def _lower(expression: Expression, policy: str) -> Program:
    form, trees, rule = _split(expression, policy)
    forward, gradient, both = [], [], []
    for place, (tree, leaves) in enumerate(trees):
        select = policy == "pad" and form == Form.SERIAL and place == Segment.MID
        segment = _Segment(tree, leaves, select)
        forward.append(segment.compile(value=True, gradients=False))
        gradient.append(segment.compile(value=False, gradients=True))
        both.append(segment.compile(value=True, gradients=True))
    segments = [*forward, *gradient, *both]
    return _program(encode(segments, form, policy, rule, derive_flags(segments, form)), expression)


def _split(
    expression: Expression, policy: str
) -> tuple[Form, list[tuple[Expression, dict[Expression, int]]], WidthRule]:
    """Cuts at the linear nodes: (form, [(tree, leaf -> input register)] for pre, mid and post, width rule)."""
    nodes = {e.weight: e for e in expression.walk() if e.weight is not None}
    first, second = nodes["wb1"], nodes["wb2"]
    leaf = Expression(LEAF)
    pre = (first.args[0], {leaf: X})
    if any(e is first for e in second.walk()):
        mid = (second.args[0], {leaf: X, first: A})
        rule = WidthRule.ANY
        if _uses(*mid, X):
            rule = WidthRule.AT_MOST_HIDDEN if policy == "truncate" else WidthRule.AT_LEAST_HIDDEN
        return Form.SERIAL, [pre, mid, (expression, {leaf: X, second: A})], rule
    if any(e is second for e in first.walk()):
        raise ExpressionError(f"wb1 takes the value of wb2 in {expression}: wb1 must come first")
    branches = [pre, (second.args[0], {leaf: X}), (expression, {leaf: X, first: A, second: B})]
    return Form.PARALLEL, branches, WidthRule.EQUAL_HIDDEN


def _shorten(tree: Expression, limit: int = 100) -> str:
    text = str(tree)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _uses(tree: Expression, leaves: dict[Expression, int], register: int) -> bool:
    own = leaves.get(tree)
    return own == register if own is not None else any(_uses(a, leaves, register) for a in tree.args)


class _Segment:
    """One segment's tree, with its leaves bound to input registers.

    Args:
        tree: the segment's expression.
        leaves: subexpression -> input register.
        select: whether operands made of x alone must be padded where they meet a wider one (mid under `pad`).
    """

    def __init__(self, tree: Expression, leaves: dict[Expression, int], select: bool) -> None:
        self.tree = tree
        self.leaves = leaves
        self.select = select

    def compile(self, *, value: bool, gradients: bool) -> SegmentCode:
        """The segment's code: everything shared where that fits, else the cheapest that does."""
        operations, outputs, fresh = self._shared(value, gradients)
        merged = merge_derivatives(operations, fresh) if gradients else operations
        shared = schedule(merged, outputs, reorder=True)
        if shared.temporaries <= MAX_TEMPORARIES:
            return self._checked(shared)
        candidates: list[SegmentCode] = []
        for reorder in (late_order, greedy_order):
            if not candidates or cost(candidates[0].instructions) > ENOUGH * cost(shared.instructions):
                with suppress(TooFewRegisters):
                    candidates.append(fit(reorder(operations, outputs), outputs, MAX_TEMPORARIES))
        if not candidates:
            candidates = [self._recomputed(value, gradients)]
        return self._checked(min(candidates, key=lambda code: cost(code.instructions)))

    def _checked(self, code: SegmentCode) -> SegmentCode:
        if code.temporaries > MAX_TEMPORARIES:
            raise ExpressionError(
                f"{_shorten(self.tree)} needs {code.temporaries} registers, a program has {MAX_TEMPORARIES}"
            )
        if len(code.instructions) > MAX_INSTRUCTIONS:
            raise ExpressionError(f"{_shorten(self.tree)} needs more than {MAX_INSTRUCTIONS} instructions")
        return code

    def _shared(self, value: bool, gradients: bool) -> tuple[list[Operation], list[int], int]:
        """Operations with every common value shared, the output values, and an unused value number."""
        graph = Graph(share=True)
        root = self._value(graph, self.tree)
        outputs = [root if value else NONE, NONE, NONE, NONE]
        if gradients:
            outputs[1:] = _accumulate(graph, root)
        return live_operations(graph.operations, outputs), outputs, graph.fresh

    def _recomputed(self, value: bool, gradients: bool) -> SegmentCode:
        graph = Graph(share=False)
        outputs = [NONE, NONE, NONE, NONE]
        if gradients:
            sums: dict[int, int] = {}
            self._descend(graph, self.tree, G, sums)
            outputs[1:] = [sums.get(r, NONE) for r in (X, A, B)]
        if value:
            outputs[0] = self._value(graph, self.tree)
        return schedule(live_operations(graph.operations, outputs), outputs, reorder=False)

    def _value(self, graph: Graph, tree: Expression) -> int:
        register = self.leaves.get(tree)
        if register is not None:
            return register
        return graph.add(OPERATORS[tree.op].opcode, *self._operands(graph, tree))

    def _operands(self, graph: Graph, tree: Expression) -> list[int]:
        """Values of the operands, the higher one evaluated first (Sethi-Ullman)."""
        order = sorted(range(len(tree.args)), key=lambda k: -tree.args[k].height)
        values = {k: self._value(graph, tree.args[k]) for k in order}
        if self.select and len(tree.args) == 2:
            narrow = [not _uses(a, self.leaves, A) for a in tree.args]
            if narrow[0] != narrow[1]:
                k = narrow.index(True)
                immediate = IMMEDIATES.index(OPERATORS[tree.op].identity)
                values[k] = graph.add(SELECT, values[k], immediate=immediate)
        return [values[k] for k in range(len(tree.args))]

    def _descend(self, graph: Graph, tree: Expression, g: int, sums: dict[int, int]) -> None:
        """Adds the gradients of `tree`, given its gradient `g`, to `sums`; recomputes every value it needs."""
        register = self.leaves.get(tree)
        if register is not None:
            sums[register] = graph.add(ADD, sums[register], g) if register in sums else g
            return
        for k in range(len(tree.args)):
            operands = self._operands(graph, tree) if tree.op != "add" else []
            self._descend(graph, tree.args[k], _gradient(graph, OPERATORS[tree.op].opcode, operands, g, k), sums)


def _accumulate(graph: Graph, root: int) -> list[int]:
    """Reverse accumulation over a shared graph: gradients (or `NONE`) of registers X, A and B."""
    sums = {root: G}
    for op in reversed(list(graph.operations)):
        g = sums.get(op.results[0])
        if g is None:
            continue
        for k, v in enumerate(op.args):
            own = g if op.opcode == SELECT else _gradient(graph, op.opcode, op.args, g, k)
            sums[v] = graph.add(ADD, sums[v], own) if v in sums else own
    return [sums.get(r, NONE) for r in (X, A, B)]


def _gradient(graph: Graph, opcode: int, operands: Sequence[int], g: int, k: int) -> int:
    """The gradient of operand `k` of an operator, given the gradient `g` of its value."""
    if opcode == ADD:
        return g
    if opcode == MUL:
        return graph.add(MUL, g, operands[1 - k])
    if opcode == MAX:
        return graph.add(MAX_GRAD, operands[k], operands[1 - k], g)
    return graph.add(opcode + GRADIENT, operands[0], g)
