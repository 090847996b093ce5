"""Architectures: one (expression, stack, ratio) per layer, as a value and as text.

Text is the published code's form, one layer text per layer joined by `, `. The file is `engine.architecture.file`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from engine.architecture.shape import MAX_SIZE
from engine.errors import UserError
from kernels.bounded import EXPRESSIONS
from kernels.language.canonical import canonicalize
from kernels.language.expression import Expression, ExpressionError, parse_layers
from kernels.language.widths import check_policy, check_weights

MAX_STACK = 64
MAX_LAYERS = 256
MAX_RATIO_DENOMINATOR = 64


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What the search decides for one layer.

    Attributes:
        expression: FFN body; wb1 and wb2 once each. Widths are checked where the model's sizes are known.
        stack: n, FFNs after the attention block, 1..64.
        ratio: expansion ratio r = 1/k, k in 1..64.

    Raises:
        UserError: a field has the wrong type or range.
    """

    expression: Expression
    stack: int
    ratio: Fraction

    def __post_init__(self) -> None:
        if not isinstance(self.expression, Expression):
            raise UserError(f"expression: must be an Expression, got {type(self.expression).__name__}")
        try:
            check_weights(self.expression)
        except ExpressionError as error:
            raise UserError(f"expression: {error}") from error
        check_stack(self.stack)
        object.__setattr__(self, "ratio", parse_ratio(self.ratio))

    def __str__(self) -> str:
        return self.expression.text(self.stack, self.ratio)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One `LayerSpec` per layer, input side first. Immutable, hashable, compared by structure."""

    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise UserError(f"layers: an architecture has 1 to {MAX_LAYERS} layers, got {len(self.layers)}")
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, LayerSpec):
                raise UserError(f"layers[{index}]: must be a LayerSpec, got {type(layer).__name__}")

    def __str__(self) -> str:
        return ", ".join(self.texts())

    def __len__(self) -> int:
        return len(self.layers)

    def texts(self) -> list[str]:
        """Layer texts in the published form, e.g. `linear4_2(gelu(linear4_2(x,wb1)),wb2)`."""
        return [str(layer) for layer in self.layers]

    def key(self, policy: str = "truncate") -> str:
        """Canonical key: equal keys mean the same function, layer by layer, under this width policy."""
        check_policy(policy)
        keys = (_layer_key(s.expression, s.stack, s.ratio.denominator) for s in self.layers)
        return f"{policy}: " + ", ".join(keys)

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """Reads layer texts joined by commas, each carrying stack and ratio (`linear4_2(...)`).

        Raises:
            UserError: the text is not an expression list, or a layer lacks stack and ratio.
        """
        try:
            layers = parse_layers(text)
        except ExpressionError as error:
            raise UserError(f"architecture: {error}") from error
        specs = []
        for index, layer in enumerate(layers):
            if layer.stack is None or layer.ratio is None:
                raise UserError(
                    f"architecture: layer {index} has no stack and ratio; write linearN_K for stack N and ratio 1/K"
                )
            specs.append(named_errors(f"layers[{index}].", LayerSpec, layer.expression, layer.stack, layer.ratio))
        return cls(tuple(specs))


def uniform(expression: Expression, stack: int, ratio: Fraction, num_layers: int) -> Architecture:
    """The architecture with the same spec in each of `num_layers` layers."""
    return Architecture((LayerSpec(expression, stack, ratio),) * num_layers)


@lru_cache(maxsize=EXPRESSIONS)
def _layer_key(expression: Expression, stack: int, divisor: int) -> str:
    return canonicalize(expression).text(stack, Fraction(1, divisor))


def check_stack(stack: Any) -> int:
    """Returns `stack` if it is an integer from 1 to 64; raises `UserError` otherwise."""
    return checked_integer("stack", stack, 1, MAX_STACK)


def parse_ratio(value: Any) -> Fraction:
    """An expansion ratio 1/k, k in 1..64, from a Fraction, 1, 0.25, "1/4" or [1, 4]. Raises `UserError`."""
    ratio: Fraction | None = None
    if isinstance(value, Fraction):
        ratio = value
    elif isinstance(value, (list, tuple)):
        if len(value) == 2 and all(_is_int(v) and 1 <= v <= MAX_SIZE for v in value):
            ratio = Fraction(value[0], value[1])
    elif _is_int(value):
        ratio = Fraction(value)
    elif isinstance(value, float) and math.isfinite(value):
        near = Fraction(value).limit_denominator(MAX_RATIO_DENOMINATOR)
        ratio = near if abs(near - Fraction(value)) < Fraction(1, 1000) else None
    elif isinstance(value, str) and len(value) <= 32:
        numerator, _, denominator = value.partition("/")
        parts = (numerator.strip(), (denominator or "1").strip())
        if all(p.isascii() and p.isdigit() for p in parts) and int(parts[1]):
            ratio = Fraction(int(parts[0]), int(parts[1]))
        else:
            return parse_ratio(_float_of(value))
    if ratio is None or ratio.numerator != 1 or ratio.denominator > MAX_RATIO_DENOMINATOR:
        shown = f"{value}" if isinstance(value, Fraction) else f"{value!r:.60}"
        raise UserError(f"ratio: must be 1/k with k from 1 to {MAX_RATIO_DENOMINATOR}, got {shown}")
    return ratio


def _float_of(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"ratio: must be 1/k, such as 1/2, got {text!r:.60}") from error


def checked_integer(name: str, value: Any, low: int, high: int) -> int:
    """Returns `value` if it is an integer in this range; raises `UserError`, which names it, otherwise."""
    if not _is_int(value) or not low <= value <= high:
        shown = f"{value:.3g}" if isinstance(value, float) else shown_kind(value)
        raise UserError(f"{name}: must be an integer from {low} to {high}, got {shown}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown_kind(value: Any) -> str:
    """A value as an error message shows it: itself if short, its kind if a container, "a huge integer" if so."""
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    if _is_int(value) and value.bit_length() > 128:
        return "a huge integer"
    return f"{value!r:.60}"


def named_errors(prefix: str, make: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls `make`, putting `prefix` before the message of a `UserError`."""
    try:
        return make(*args, **kwargs)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from error
