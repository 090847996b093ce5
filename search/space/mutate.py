"""Mutations of one expression: small valid steps from a parent.

Four operators, drawn with equal odds until one gives a valid child of another canonical form:

    replace_subtree   a random node's subtree becomes a random one holding the same weights, of similar height
    replace_operator  an activation becomes another activation, a binary operator another binary operator
    insert            a random node is wrapped in an activation or in a binary operator with a small side branch
    delete            an activation or binary operator is replaced by (one of) its operands

The rules decide about every child, so no operator has to know them all; where no try succeeds (tiny spaces), a child
is drawn fresh, which is subtree replacement at the root. Rejected: crossover. One wb1 and one wb2 per expression leave
few places where two parents fit together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from kernels.language.canonical import canonicalize
from kernels.language.expression import Expression, apply
from kernels.language.widths import weight_order
from search.space.generate import WB1, WB2, ExpressionGenerator
from search.space.rules import check, is_activation

_TRIES = 32
_SIDE_BRANCH_HEIGHT = 2

Path = tuple[int, ...]
T = TypeVar("T")


def mutate_expression(
    parent: Expression, generator: ExpressionGenerator, rng: np.random.Generator
) -> Expression | None:
    """A valid expression one step from `parent` with another canonical form; None if none was found.

    The parent itself need not be valid in the generator's space.
    """
    form = canonicalize(parent)
    for attempt in range(2 * _TRIES):
        if attempt < _TRIES:
            child = _OPERATORS[int(rng.integers(len(_OPERATORS)))](parent, generator, rng)
        else:
            child = generator.sample(rng)
        if child is not None and canonicalize(child) != form and check(child, generator.rules) is None:
            return child
    return None


def replace_subtree(parent: Expression, generator: ExpressionGenerator, rng: np.random.Generator) -> Expression | None:
    """`parent` with one random subtree replaced by a random tree that holds the same weights."""
    path, node = _random_node(parent, rng)
    room = generator.rules.max_height - len(path)
    subtree = generator.subtree(rng, _weights(node), room, near=node.height)
    return None if subtree is None else _replace(parent, path, subtree)


def replace_operator(parent: Expression, generator: ExpressionGenerator, rng: np.random.Generator) -> Expression | None:
    """`parent` with one operator exchanged for another of the same arity."""
    found = [(path, node) for path, node in _nodes(parent) if node.args and node.weight is None]
    if not found:
        return None
    path, node = found[int(rng.integers(len(found)))]
    names = generator.rules.activations if is_activation(node) else generator.rules.binaries
    others = [name for name in names if name != node.op]
    return _replace(parent, path, apply(_choice(rng, others), *node.args)) if others else None


def insert(parent: Expression, generator: ExpressionGenerator, rng: np.random.Generator) -> Expression | None:
    """`parent` with one random node wrapped in an activation, or in a binary operator with a weightless branch."""
    path, node = _random_node(parent, rng)
    names = (*generator.rules.activations, *generator.rules.binaries)
    if not names:
        return None
    name = _choice(rng, names)
    if name in generator.rules.activations:
        return _replace(parent, path, apply(name, node))
    branch = generator.subtree(rng, 0, _SIDE_BRANCH_HEIGHT)
    if branch is None:
        return None
    operands = (node, branch) if rng.random() < 0.5 else (branch, node)
    return _replace(parent, path, apply(name, *operands))


def delete(parent: Expression, generator: ExpressionGenerator, rng: np.random.Generator) -> Expression | None:
    """`parent` with one activation or binary operator replaced by one of its operands."""
    found = [(path, node) for path, node in _nodes(parent) if node.args and node.weight is None]
    if not found:
        return None
    path, node = found[int(rng.integers(len(found)))]
    kept = [a for a in node.args if _weights(a) == _weights(node)]
    return _replace(parent, path, _choice(rng, kept)) if kept else None


_OPERATORS = (replace_subtree, replace_operator, insert, delete)


def _nodes(expr: Expression, path: Path = ()) -> Iterator[tuple[Path, Expression]]:
    yield path, expr
    for index, operand in enumerate(expr.args):
        yield from _nodes(operand, (*path, index))


def _random_node(expr: Expression, rng: np.random.Generator) -> tuple[Path, Expression]:
    found = list(_nodes(expr))
    return found[int(rng.integers(len(found)))]


def _replace(expr: Expression, path: Path, new: Expression) -> Expression:
    if not path:
        return new
    operands = list(expr.args)
    operands[path[0]] = _replace(operands[path[0]], path[1:], new)
    return Expression(expr.op, tuple(operands), expr.weight)


def _weights(expr: Expression) -> int:
    order = weight_order(expr)
    return (WB1 if "wb1" in order else 0) | (WB2 if "wb2" in order else 0)


def _choice(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]
