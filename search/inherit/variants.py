"""What a layer of the teacher may become, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product

from engine.architecture.architecture import SKIP, Architecture, LayerSpec
from engine.architecture.flops import count_flops
from engine.architecture.params import count_parameters
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from kernels.language.expression import Expression


@dataclass(frozen=True)
class Variants:
    """The choices of one run, the same for every layer.

    Attributes:
        shape: sizes of the teacher as one of our models.
        expression: its FFN's.
        specs: what a layer may be; the first is the teacher's own layer, the last leaves it out.
    """

    shape: ModelShape
    expression: Expression
    specs: tuple[LayerSpec, ...]

    @property
    def own(self) -> LayerSpec:
        """The teacher's own layer."""
        return self.specs[0]

    @property
    def whole(self) -> Architecture:
        """The teacher."""
        return Architecture((self.own,) * self.shape.num_layers)

    @property
    def alone(self) -> list[int]:
        """Variants that differ from the teacher's layer in one thing, which are scored."""
        return [k for k, spec in enumerate(self.specs) if k not in self.joint]

    @property
    def joint(self) -> dict[int, tuple[int, int]]:
        """Variants with fewer heads and a narrower FFN, and which variants have the one and the other alone."""
        number = {spec: k for k, spec in enumerate(self.specs)}
        pairs = {}
        for k, spec in enumerate(self.specs):
            heads, width = replace(spec, ratio=Fraction(1)), replace(spec, heads=None)
            if spec.stack and spec.heads is not None and spec.ratio != 1:
                pairs[k] = (number[heads], number[width])
        return pairs

    def layer(self, spec: LayerSpec) -> int:
        """Parameters of one layer: attention block and FFN."""
        one, nothing = (Architecture((s,)) for s in (spec, SKIP))
        single = replace(self.shape, num_layers=1)
        return count_parameters(one, single, fit_dense=False) - count_parameters(nothing, single, fit_dense=False)

    def encoder(self, architecture: Architecture) -> int:
        """Parameters of all layers."""
        return sum(self.layer(spec) for spec in architecture.layers)

    def total(self, architecture: Architecture) -> int:
        """Parameters of embeddings and all layers; pooler and head are not counted."""
        return count_parameters(architecture, self.shape, fit_dense=False)

    def layer_flops(self, spec: LayerSpec, length: int) -> int:
        """Operations of one layer on one sequence of `length` tokens."""
        one, nothing = (Architecture((s,)) for s in (spec, SKIP))
        single = replace(self.shape, num_layers=1)
        return count_flops(one, single, length) - count_flops(nothing, single, length)

    def rest_flops(self, length: int) -> int:
        """Operations of everything but the layers, on one sequence."""
        return count_flops(Architecture((SKIP,) * self.shape.num_layers), self.shape, length)


def variants(
    shape: ModelShape,
    expression: Expression,
    ratios: tuple[Fraction, ...],
    heads: tuple[Fraction, ...],
    others: tuple[Expression, ...] = (),
) -> Variants:
    """All variants of these FFN ratios and shares of heads, the layer without an FFN, and the skipped layer.

    Args:
        shape: of the teacher; knows its heads.
        expression: of the teacher's FFN.
        ratios: widths of the FFN as shares of the teacher's.
        heads: shares of the heads; each is rounded to a whole number of heads, at least one.
        others: further expressions, each at every ratio and with all heads.

    Raises:
        UserError: a share is not in (0, 1].
    """
    if shape.num_heads is None:
        raise ValueError("variants: the shape has no number of heads")
    for name, shares in (("ratios", ratios), ("heads", heads)):
        wrong = [share for share in shares if not 0 < share <= 1]
        if wrong:
            raise UserError(f"inherit.{name}: {wrong[0]} is out of range: shares lie in (0, 1]")
    widths = sorted({Fraction(1), *ratios}, reverse=True)
    counts = sorted({shape.num_heads, *(max(1, round(share * shape.num_heads)) for share in heads)}, reverse=True)
    named: list[int | None] = [None if count == shape.num_heads else count for count in counts]
    specs = [LayerSpec(expression, 1, ratio, count) for count, ratio in product(named, widths)]
    specs += [LayerSpec(other, 1, ratio) for other, ratio in product(others, widths) if other != expression]
    specs += [LayerSpec(expression, 0, Fraction(1)), SKIP]
    return Variants(shape, expression, tuple(dict.fromkeys(specs)))


def with_layer(architecture: Architecture, index: int, spec: LayerSpec) -> Architecture:
    """`architecture` with another layer `index`."""
    return replace(architecture, layers=(*architecture.layers[:index], spec, *architecture.layers[index + 1 :]))


def kept(architecture: Architecture) -> tuple[int, ...]:
    """Layers that are not left out."""
    return tuple(index for index, layer in enumerate(architecture.layers) if not layer.skipped)
