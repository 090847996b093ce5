"""Architectures: one (expression, stack, ratio, heads) per layer, as a value and as text.

Text is the published code's form, one layer text per layer joined by `, `; what that form lacks is written beside it:

    linear2_3/8(gelu(linear2_3/8(x,wb1)),wb2)   a ratio that is not 1/k
    none                                        attention alone, no FFN
    linear1_2(gelu(linear1_2(x,wb1)),wb2)@6     the first 6 heads alone; none at all, no attention block: @0
    none@0                                      neither: the layer is left out

The file is `engine.architecture.file`'s.
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
from kernels.language.expression import GELU_FFN, Expression, ExpressionError, layer_text, parse_layers
from kernels.language.widths import check_policy, check_weights

MAX_STACK = 64
MAX_LAYERS = 256
MAX_RATIO_DENOMINATOR = 64


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What the search decides for one layer.

    Attributes:
        expression: FFN body; wb1 and wb2 once each. Widths are checked where the model's sizes are known.
        stack: n, FFNs after the attention block, 0..64. Without FFNs expression and ratio say nothing, and are set to
            `GELU_FFN` and 1.
        ratio: expansion ratio r = p/q in (0, 1], q at most 64.
        heads: how many of the model's attention heads the layer keeps, the leading ones; None for all; 0 for no
            attention block.

    Raises:
        UserError: a field has the wrong type or range.
    """

    expression: Expression
    stack: int
    ratio: Fraction
    heads: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.expression, Expression):
            raise UserError(f"expression: must be an Expression, got {type(self.expression).__name__}")
        try:
            check_weights(self.expression)
        except ExpressionError as error:
            raise UserError(f"expression: {error}") from error
        checked_integer("stack", self.stack, 0, MAX_STACK)
        if self.heads is not None:
            checked_integer("heads", self.heads, 0, MAX_SIZE)
        object.__setattr__(self, "ratio", parse_ratio(self.ratio))
        if self.stack == 0:
            object.__setattr__(self, "expression", GELU_FFN)
            object.__setattr__(self, "ratio", Fraction(1))

    def __str__(self) -> str:
        return layer_text(self.expression, self.stack, self.ratio, self.heads)

    @property
    def skipped(self) -> bool:
        """Whether nothing of the layer is left, neither attention block nor FFN."""
        return self.stack == 0 and self.heads == 0


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
        keys = (_layer_key(s.expression, s.stack, s.ratio, s.heads) for s in self.layers)
        return f"{policy}: " + ", ".join(keys)

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """Reads layer texts joined by commas, each carrying stack and ratio (`linear4_2(...)`), or `none`.

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
            made = (layer.expression, layer.stack, layer.ratio, layer.heads)
            specs.append(named_errors(f"layers[{index}].", LayerSpec, *made))
        return cls(tuple(specs))


def uniform(expression: Expression, stack: int, ratio: Fraction, num_layers: int) -> Architecture:
    """The architecture with the same spec in each of `num_layers` layers."""
    return Architecture((LayerSpec(expression, stack, ratio),) * num_layers)


@lru_cache(maxsize=EXPRESSIONS)
def _layer_key(expression: Expression, stack: int, ratio: Fraction, heads: int | None) -> str:
    return layer_text(canonicalize(expression), stack, ratio, heads)


def check_stack(stack: Any) -> int:
    """Returns `stack` if it is an integer from 1 to 64; raises `UserError` otherwise."""
    return checked_integer("stack", stack, 1, MAX_STACK)


def parse_ratio(value: Any) -> Fraction:
    """A ratio p/q in (0, 1], q at most 64, from a Fraction, 1, 0.375, "3/8" or [3, 8]. Raises `UserError`."""
    ratio = _fraction_of(value)
    if ratio is None or not 0 < ratio <= 1 or ratio.denominator > MAX_RATIO_DENOMINATOR:
        shown = _shown_ratio(value)
        raise UserError(f"ratio: must be p/q in (0, 1] with q from 1 to {MAX_RATIO_DENOMINATOR}, got {shown}")
    return ratio


def parse_unit_ratio(value: Any) -> Fraction:
    """An expansion ratio of the form 1/k, k in 1..64, as a search space has them. Raises `UserError`."""
    ratio = _fraction_of(value)
    if ratio is None or ratio.numerator != 1 or ratio.denominator > MAX_RATIO_DENOMINATOR:
        shown = _shown_ratio(value)
        raise UserError(f"ratio: must be 1/k with k from 1 to {MAX_RATIO_DENOMINATOR}, got {shown}")
    return ratio


def _fraction_of(value: Any) -> Fraction | None:
    """The fraction that `value` stands for; None where it stands for none."""
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
            ratio = _decimal(value)
    return ratio


def _decimal(text: str) -> Fraction | None:
    try:
        return _fraction_of(float(text))
    except ValueError:
        return None


def _shown_ratio(value: Any) -> str:
    return f"{value}" if isinstance(value, Fraction) else f"{value!r:.60}"


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


SKIP = LayerSpec(GELU_FFN, 0, Fraction(1), 0)
"""A layer that is left out."""
