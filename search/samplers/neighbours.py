"""The neighbourhood of an architecture: everything one step away, in a fixed order.

A step gives one layer another (stack, ratio), or makes one edit at one node of one layer's expression: another
operator of the same arity, another kind of linear, an activation wrapped around it, or the node replaced by one of its
operands. What all layers share, a step changes in all of them. Where the
budget leaves a layer no other (stack, ratio) alone, exchanging those of two layers is a step too.

Rejected: steps by one stack or one ratio at a time. Cost and score are not smooth in them, and a layer has few choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations
from typing import Protocol

from engine.architecture.architecture import Architecture, LayerSpec
from kernels.language.expression import Expression, apply
from kernels.language.operators import LINEAR
from kernels.language.widths import weight_order
from search.space.rules import is_activation


class Bounded(Protocol):
    """What the neighbourhood asks of a space (`search.space.SearchSpace`).

    Attributes:
        stacks, ratios: what a layer may have.
        activations, binaries: operators of expressions.
        linears: kinds of linear (`linear`, `kron`).
        fixed_expressions: one per layer where only (stack, ratio) is searched, else None.
        fixed_shapes: one (stack, ratio) per layer where only expressions are searched, else None.
    """

    stacks: tuple[int, ...]
    ratios: tuple[Fraction, ...]
    activations: tuple[str, ...]
    binaries: tuple[str, ...]
    linears: tuple[str, ...]
    fixed_expressions: tuple[Expression, ...] | None
    fixed_shapes: tuple[tuple[int, Fraction], ...] | None

    @property
    def shares_expressions(self) -> bool:
        """Whether all layers have the same expression."""
        ...

    @property
    def shares_shapes(self) -> bool:
        """Whether all layers have the same stack and ratio."""
        ...

    def contains(self, arch: Architecture) -> bool:
        """Whether `arch` lies in the space."""
        ...


def neighbours(space: Bounded, arch: Architecture) -> Iterator[Architecture]:
    """Every architecture of `space` one step from `arch`; some may compute the same function."""
    if space.fixed_shapes is None:
        yield from filter(space.contains, _other_shapes(space, arch))
    if space.fixed_expressions is None:
        yield from filter(space.contains, _other_expressions(space, arch))


def edits(
    expr: Expression, activations: tuple[str, ...], binaries: tuple[str, ...], linears: tuple[str, ...] = (LINEAR,)
) -> Iterator[Expression]:
    """Every expression one edit from `expr`, valid or not."""
    yield from _edits_at_root(expr, activations, binaries, linears)
    for index, operand in enumerate(expr.args):
        for edited in edits(operand, activations, binaries, linears):
            operands = (*expr.args[:index], edited, *expr.args[index + 1 :])
            yield Expression(expr.op, operands, expr.weight)


def _edits_at_root(
    expr: Expression, activations: tuple[str, ...], binaries: tuple[str, ...], linears: tuple[str, ...]
) -> Iterator[Expression]:
    if expr.weight is not None:
        yield from (Expression(name, expr.args, expr.weight) for name in linears if name != expr.op)
    elif expr.args:
        same_arity = activations if is_activation(expr) else binaries
        yield from (apply(name, *expr.args) for name in same_arity if name != expr.op)
        yield from (a for a in expr.args if weight_order(a) == weight_order(expr))
    if not is_activation(expr):
        yield from (apply(name, expr) for name in activations)


def _other_shapes(space: Bounded, arch: Architecture) -> Iterator[Architecture]:
    for changed in _changed_together(arch, space.shares_shapes):
        own = arch.layers[changed[0]]
        for stack in space.stacks:
            for ratio in space.ratios:
                if (stack, ratio) != (own.stack, own.ratio):
                    yield _with(arch, {i: LayerSpec(arch.layers[i].expression, stack, ratio) for i in changed})
    for i, j in combinations(range(len(arch.layers)), 2):
        first, second = arch.layers[i], arch.layers[j]
        if (first.stack, first.ratio) != (second.stack, second.ratio):
            swapped = {
                i: LayerSpec(first.expression, second.stack, second.ratio),
                j: LayerSpec(second.expression, first.stack, first.ratio),
            }
            yield _with(arch, swapped)


def _other_expressions(space: Bounded, arch: Architecture) -> Iterator[Architecture]:
    for changed in _changed_together(arch, space.shares_expressions):
        own = arch.layers[changed[0]].expression
        for edited in edits(own, space.activations, space.binaries, space.linears):
            yield _with(arch, {i: LayerSpec(edited, arch.layers[i].stack, arch.layers[i].ratio) for i in changed})


def _changed_together(arch: Architecture, shared: bool) -> list[list[int]]:
    layers = range(len(arch.layers))
    return [list(layers)] if shared else [[i] for i in layers]


def _with(arch: Architecture, changes: dict[int, LayerSpec]) -> Architecture:
    return Architecture(tuple(changes.get(i, layer) for i, layer in enumerate(arch.layers)))
