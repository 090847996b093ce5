"""Expressions: the tree of operations that replaces the body of a feed-forward network (FFN).

Two text forms are read, the first is written:

    tanh(linear(gelu(linear(x,wb1)),wb2))            plain
    tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2))      the published code's form: stack n=4, ratio r=1/2 inside

    expression := "x" | linear "(" expression "," ("wb1" | "wb2") ")" | name "(" expression { "," expression } ")"
    linear     := ("linear" | "kron") [ digits "_" digits [ "/" digits ] ]
    layers     := layer { "," layer }
    layer      := ( expression | "none" ) [ "@" digits ]

`linear4_2` is stack 4, ratio 1/2; `linear4_3/8` stack 4, ratio 3/8. `none` is a layer without FFN, `@6` keeps the first
6 attention heads (none: `@0`). `kron(e,wb1)` is a linear with a Kronecker product as weight (`kernels.ffn.kron`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from kernels.language.operators import KRON, LEAF, LINEAR, LINEARS, OPERATORS, WEIGHTS

MAX_DEPTH = 64
"""Deepest nesting the parser accepts; the search space itself stops at height 7."""

MAX_TEXT = 65_536
"""Longest text (characters) the parser accepts."""

_TOKEN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:/[0-9]+)?|@[0-9]+|[(),]", re.ASCII)
_SHAPED = re.compile(r"(linear|kron)([1-9][0-9]{0,3})_([1-9][0-9]{0,3})(?:/([1-9][0-9]{0,3}))?")
_MOST_HEADS_DIGITS = 8
NO_FFN = "none"
"""What stands for the expression of a layer without FFN."""


class ExpressionError(ValueError):
    """A text is not an expression, or an expression is not valid where it is used."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A node of an expression tree; immutable, hashable, compared by structure.

    Attributes:
        op: `"x"`, `"linear"`, `"kron"` or a name in `kernels.language.operators.OPERATORS`.
        args: operand expressions, () for the leaf.
        weight: `"wb1"` or `"wb2"` for `linear` and `kron`, otherwise None.
    """

    op: str
    args: tuple[Expression, ...] = ()
    weight: str | None = None
    _hash: int = field(init=False, repr=False, compare=False)  # of the tree, once: expressions are keys of many caches

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.op, self.args, self.weight)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Expression], tuple[Any, ...]]:
        return Expression, (self.op, self.args, self.weight)  # the hash of a text is another in every process

    def __str__(self) -> str:
        return self.text()

    def text(self, stack: int | None = None, ratio: Fraction | None = None) -> str:
        """Text form; with `stack` and `ratio` the published code's form, which names k of 1/k, or any p/q.

        Raises:
            ExpressionError: only one of the two is given.
        """
        if (stack is None) != (ratio is None):
            raise ExpressionError("text() takes both stack and ratio, or neither")
        suffix = ""
        if stack is not None and ratio is not None:
            suffix = f"{stack}_{ratio.denominator if ratio.numerator == 1 else ratio}"
        return self._text(suffix)

    def _text(self, suffix: str) -> str:
        if self.op == LEAF:
            return LEAF
        operands = [a._text(suffix) for a in self.args]
        if self.weight is not None:
            return f"{self.op}{suffix}({operands[0]},{self.weight})"
        return f"{self.op}({','.join(operands)})"

    @property
    def height(self) -> int:
        """Edges on the longest path from this node to a leaf; the plain GELU FFN has height 3."""
        return 1 + max(a.height for a in self.args) if self.args else 0

    @property
    def size(self) -> int:
        """Number of nodes of the tree."""
        return 1 + sum(a.size for a in self.args)

    def walk(self) -> Iterator[Expression]:
        """All nodes, operands after the node that uses them (pre-order)."""
        yield self
        for a in self.args:
            yield from a.walk()


X = Expression(LEAF)
"""The leaf: the FFN's input."""


def linear(operand: Expression, weight: str, op: str = LINEAR) -> Expression:
    """`linear(operand, weight)`, or `kron(...)`, with `weight` one of `"wb1"`, `"wb2"`."""
    if weight not in WEIGHTS:
        raise ExpressionError(f"unknown weight {weight!r}: use wb1 or wb2")
    if op not in LINEARS:
        raise ExpressionError(f"unknown kind of linear {op!r}: use {' or '.join(LINEARS)}")
    return Expression(op, (operand,), weight)


def kron_weights(expr: Expression) -> frozenset[str]:
    """The weights of `expr` that are Kronecker products."""
    return frozenset(str(node.weight) for node in expr.walk() if node.op == KRON)


def with_kron(expr: Expression, weights: Collection[str]) -> Expression:
    """`expr` with these weights as Kronecker products and the others full; () makes all of them full."""
    op = expr.op if expr.weight is None else KRON if expr.weight in weights else LINEAR
    return Expression(op, tuple(with_kron(a, weights) for a in expr.args), expr.weight)


def apply(op: str, *operands: Expression) -> Expression:
    """`op(operands...)` for an operator of the table; raises `ExpressionError` on a wrong name or arity."""
    row = OPERATORS.get(op)
    if row is None:
        known = ", ".join([*LINEARS, *OPERATORS])
        raise ExpressionError(f"unknown operator {op!r}: known operators are {known}")
    if len(operands) != row.arity:
        raise ExpressionError(f"operator {op!r} takes {row.arity} operand(s), got {len(operands)}")
    return Expression(op, tuple(operands))


GELU_FFN = linear(apply("gelu", linear(X, "wb1")), "wb2")
"""The hand-designed FFN: `linear(gelu(linear(x,wb1)),wb2)`."""


@dataclass(frozen=True, slots=True)
class ParsedLayer:
    """One layer text: the expression and, where the text carries them, stack n, ratio r and heads.

    A layer without FFN has stack 0, and `GELU_FFN` at ratio 1 in place of an expression.
    """

    expression: Expression
    stack: int | None = None
    ratio: Fraction | None = None
    heads: int | None = None

    def __str__(self) -> str:
        return layer_text(self.expression, self.stack, self.ratio, self.heads)


def layer_text(expr: Expression, stack: int | None, ratio: Fraction | None, heads: int | None) -> str:
    """A layer's text, as `parse_layers` reads it."""
    text = NO_FFN if stack == 0 else expr.text(stack, ratio)
    return text if heads is None else f"{text}@{heads}"


def parse_expression(text: str) -> Expression:
    """Parses one expression in either text form; a stack and ratio in the text are read and dropped.

    Raises:
        ExpressionError: the text is not an expression; the message names what was found and where.
    """
    layer = parse_layer(text)
    if layer.stack == 0 or layer.heads is not None:
        raise ExpressionError(f"expected an expression, without heads (@), found the layer {_shorten(text)!r}")
    return layer.expression


def parse_layer(text: str) -> ParsedLayer:
    """Parses one layer text, keeping the stack and ratio of the published form. Raises `ExpressionError`."""
    layers = parse_layers(text)
    if len(layers) != 1:
        raise ExpressionError(f"expected one expression, found {len(layers)} in {_shorten(text)!r}")
    return layers[0]


def parse_layers(text: str) -> list[ParsedLayer]:
    """Parses layer texts joined by commas. Raises `ExpressionError`."""
    if not isinstance(text, str):
        raise ExpressionError(f"an expression is text, got {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise ExpressionError(f"expression text of {len(text)} characters is longer than {MAX_TEXT}")
    parser = _Parser(text)
    layers = [parser.layer()]
    while parser.peek() == ",":
        parser.take()
        layers.append(parser.layer())
    if parser.peek() is not None:
        raise parser.error("',' or the end")
    return layers


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = self._tokenize(text)
        self.index = 0
        self.shape: tuple[int, Fraction] | None = None
        self.plain_linear = False

    @staticmethod
    def _tokenize(text: str) -> list[tuple[str, int]]:
        tokens: list[tuple[str, int]] = []
        position = 0
        while position < len(text):
            if text[position].isspace():
                position += 1
                continue
            match = _TOKEN.match(text, position)
            if match is None:
                raise ExpressionError(
                    f"unexpected character {text[position]!r} at position {position} in {_shorten(text)!r}"
                )
            tokens.append((match.group(), position))
            position = match.end()
        return tokens

    def peek(self) -> str | None:
        return self.tokens[self.index][0] if self.index < len(self.tokens) else None

    def take(self) -> str | None:
        token = self.peek()
        self.index += 1
        return token

    def error(self, expected: str) -> ExpressionError:
        if self.index < len(self.tokens):
            token, position = self.tokens[self.index]
            found = f"{_shorten(token, 40)!r} at position {position}"
        else:
            found = "the end"
        return ExpressionError(f"expected {expected}, found {found} in {_shorten(self.text)!r}")

    def expect(self, token: str) -> None:
        if self.peek() != token:
            raise self.error(repr(token))
        self.take()

    def layer(self) -> ParsedLayer:
        if self.peek() == NO_FFN:
            self.take()
            return ParsedLayer(GELU_FFN, 0, Fraction(1), self.heads())
        self.shape, self.plain_linear = None, False
        expression = self.expression(0)
        if self.shape is None:
            return ParsedLayer(expression, heads=self.heads())
        if self.plain_linear:
            raise ExpressionError(f"mixed linear forms in one layer: {_shorten(self.text)!r}")
        return ParsedLayer(expression, *self.shape, self.heads())

    def heads(self) -> int | None:
        token = self.peek()
        if token is None or not token.startswith("@"):
            return None
        if len(token) > 1 + _MOST_HEADS_DIGITS:
            raise self.error("@ and a number of heads")
        self.take()
        return int(token[1:])

    def expression(self, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise ExpressionError(f"expression nested deeper than {MAX_DEPTH}")
        name = self.peek()
        if name is None or name[0] in "(),@":
            raise self.error("an operator or x")
        if name == LEAF:
            self.take()
            return X
        match = _SHAPED.fullmatch(name)
        is_linear = name in LINEARS or match is not None
        if not is_linear and name not in OPERATORS:
            known = ", ".join([*LINEARS, *OPERATORS])
            raise ExpressionError(
                f"unknown operator {_shorten(name, 40)!r} at position {self.tokens[self.index][1]}:"
                f" known operators are {known}"
            )
        self.take()
        self.expect("(")
        operands = [self.expression(depth + 1)]
        if is_linear:
            self._note_shape(match)
            self.expect(",")
            weight = self.peek()
            if weight not in WEIGHTS:
                raise self.error("wb1 or wb2")
            self.take()
            self.expect(")")
            return linear(operands[0], weight, name if match is None else match.group(1))
        while self.peek() == ",":
            self.take()
            operands.append(self.expression(depth + 1))
        self.expect(")")
        return apply(name, *operands)

    def _note_shape(self, match: re.Match[str] | None) -> None:
        if match is None:
            self.plain_linear = True
            return
        stack, first, second = (int(v or 0) for v in match.group(2, 3, 4))
        shape = stack, Fraction(first, second) if second else Fraction(1, first)
        if self.shape is not None and shape != self.shape:
            raise ExpressionError(
                f"stack and ratio {self.shape[0]}, {self.shape[1]} and {match.group()} in one layer:"
                " stack and ratio must be the same"
            )
        self.shape = shape
