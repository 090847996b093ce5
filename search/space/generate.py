"""Random valid expressions, by a counting grammar: nothing is drawn that would have to be thrown away.

A tree's class is (height, weights inside, width, kind of root): weights as a bit set (1 = wb1, 2 = wb2), width as one
of the few width vectors over all inner widths, kind one of leaf, activation, linear, binary. The table counts the trees
of every class exactly, so a production is drawn only where a valid tree exists.

`sample` draws the height uniformly, then grows a tree of exactly that height from the root down. At each node the kind
is drawn with weight (activation 1, linear 2, binary 1) times 1 + log2 of the trees behind it, then the operator
uniformly; of a binary node's operands one has the full remaining height, the other height h with weight 2^-h. One tree
in five is "full": all leaves at one depth. Each valid expression can be drawn. Why these weights: docs/decisions/0023.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

import numpy as np

from engine.errors import UserError
from kernels.language.expression import Expression, X, apply, linear
from search.space.rules import Rules

LEAF_KIND, ACTIVATION, LINEAR_KIND, BINARY = range(4)
_KIND_WEIGHT = {LEAF_KIND: 1.0, ACTIVATION: 1.0, LINEAR_KIND: 2.0, BINARY: 1.0}
_FULL_PROBABILITY = 0.2
WB1, WB2, BOTH = 1, 2, 3

_Class = tuple[int, int, int]
"""(height, weights, width index)."""


@dataclass(frozen=True, slots=True)
class _Production:
    """One way to make a tree of a class: kind of the root, number of trees, classes of the operands.

    `side` is 2^-h of the lower operand of a binary root; `name` the weight of a linear root.
    """

    kind: int
    count: int
    side: float = 1.0
    operands: tuple[_Class, ...] = ()
    name: str = ""


class _Grammar:
    """Counts and productions; `full` keeps only trees whose leaves all lie at one depth."""

    def __init__(self, rules: Rules, full: bool) -> None:
        self.rules, self.full = rules, full
        combine = min if rules.policy == "truncate" else max
        hidden = (rules.hidden,) * len(rules.inners)
        inner = tuple(rules.inners)
        mixed = tuple(combine(pair) for pair in zip(hidden, inner, strict=True))
        self.widths = list(dict.fromkeys((hidden, inner, mixed)))
        self.hidden, self.inner = self.widths.index(hidden), self.widths.index(inner)
        self._combined = {
            (a, b): self.widths.index(tuple(combine(p) for p in zip(va, vb, strict=True)))
            for a, va in enumerate(self.widths)
            for b, vb in enumerate(self.widths)
        }
        self._counts: dict[tuple[_Class, int], int] = {}
        self._table: dict[_Class, list[_Production]] = {}
        for height in range(rules.max_height + 1):
            for weights in range(4):
                for width in range(len(self.widths)):
                    self._fill((height, weights, width))

    def count(self, cls: _Class, *, without: int | None = None) -> int:
        """Number of trees of a class, those with a root of kind `without` left out."""
        return sum(self._counts.get((cls, kind), 0) for kind in range(4) if kind != without)

    def _fill(self, cls: _Class) -> None:
        found = [*self._leaf(cls), *self._activations(cls), *self._linears(cls), *self._binaries(cls)]
        self._table[cls] = found
        for production in found:
            key = (cls, production.kind)
            self._counts[key] = self._counts.get(key, 0) + production.count

    def _leaf(self, cls: _Class) -> list[_Production]:
        return [_Production(LEAF_KIND, 1)] if cls == (0, 0, self.hidden) else []

    def _activations(self, cls: _Class) -> list[_Production]:
        height, weights, width = cls
        if height == 0 or not self.rules.activations:
            return []
        below = (height - 1, weights, width)
        count = self.count(below, without=ACTIVATION) * len(self.rules.activations)
        return [_Production(ACTIVATION, count, operands=(below,))] if count else []

    def _linears(self, cls: _Class) -> list[_Production]:
        height, weights, width = cls
        if height == 0:
            return []
        found = []
        # wb1 over wb2 would put wb2 first in the text, so wb1 stands only over weightless trees.
        if weights == WB1 and width == self.inner:
            found.append(((height - 1, 0, self.hidden), "wb1"))
        if weights & WB2 and width == self.hidden:
            found.append(((height - 1, weights - WB2, self.inner), "wb2"))
        counted = [(below, name, self.count(below, without=LINEAR_KIND)) for below, name in found]
        return [
            _Production(LINEAR_KIND, count, operands=(below,), name=name) for below, name, count in counted if count
        ]

    def _binaries(self, cls: _Class) -> list[_Production]:
        height, weights, width = cls
        if height == 0 or not self.rules.binaries:
            return []
        found = []
        for left_height, right_height in self._heights(height):
            side = 2.0 ** -min(left_height, right_height)
            for left_weights in (w for w in range(4) if w & weights == w):
                right_weights = weights - left_weights
                if left_weights == WB2 and right_weights == WB1:
                    continue  # wb2 would stand first in the text
                for (a, b), combined in self._combined.items():
                    if combined != width:
                        continue
                    left, right = (left_height, left_weights, a), (right_height, right_weights, b)
                    pairs = self.count(left) * self.count(right) - (self.count(left) if left == right else 0)
                    if pairs:
                        found.append(_Production(BINARY, pairs * len(self.rules.binaries), side, (left, right)))
        return found

    def _heights(self, height: int) -> list[tuple[int, int]]:
        top = height - 1
        if self.full:
            return [(top, top)]
        return [*((top, h) for h in range(top)), *((h, top) for h in range(top)), (top, top)]

    @cache  # noqa: B019 -- a grammar lives as long as its space
    def _choices(self, cls: _Class, without: int | None) -> tuple[list[_Production], list[float]]:
        """Productions of a class with their cumulative probabilities: kind first, then within the kind."""
        usable = [p for p in self._table[cls] if p.kind != without]
        inside = [p.side * _richness(p.count) for p in usable]
        total: dict[int, float] = {}
        for production, weight in zip(usable, inside, strict=True):
            total[production.kind] = total.get(production.kind, 0.0) + weight
        kinds = {kind: _KIND_WEIGHT[kind] * _richness(self._counts[cls, kind]) for kind in total}
        weights = (kinds[p.kind] * weight / total[p.kind] for p, weight in zip(usable, inside, strict=True))
        return usable, list(accumulate(weights))

    def tree(self, rng: np.random.Generator, cls: _Class, without: int | None = None) -> Expression:
        """A random tree of a class that `count` says is not empty, its root not of kind `without`."""
        usable, cumulative = self._choices(cls, without)
        production = usable[min(bisect_right(cumulative, rng.random() * cumulative[-1]), len(usable) - 1)]
        if production.kind == LEAF_KIND:
            return X
        if production.kind == ACTIVATION:
            return apply(_pick(rng, self.rules.activations), self.tree(rng, production.operands[0], ACTIVATION))
        if production.kind == LINEAR_KIND:
            return linear(self.tree(rng, production.operands[0], LINEAR_KIND), production.name)
        left, right = production.operands
        while True:
            operands = self.tree(rng, left), self.tree(rng, right)
            if operands[0] != operands[1]:  # the counts say that a distinct pair exists
                return apply(_pick(rng, self.rules.binaries), *operands)


class ExpressionGenerator:
    """Draws valid expressions and valid parts of them for one set of rules.

    Raises:
        UserError: no expression obeys the rules.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._grow = _Grammar(rules, full=False)
        self.heights = tuple(h for h in range(rules.min_height, rules.max_height + 1) if self.count(h))
        if not self.heights:
            raise UserError(
                f"heights: no valid expression of height {rules.min_height}..{rules.max_height} exists with operators"
                f" {', '.join((*rules.activations, *rules.binaries)) or '(none)'}; allow more operators or heights"
            )

    @cached_property
    def _full(self) -> _Grammar:
        return _Grammar(self.rules, full=True)

    def count(self, height: int) -> int:
        """Exact number of valid expressions (distinct trees) of this height."""
        return self._grow.count((height, BOTH, self._grow.hidden))

    def sample(self, rng: np.random.Generator, height: int | None = None) -> Expression:
        """A random valid expression, of the given height if one is given; the distribution is in the module's text.

        Raises:
            ValueError: no valid expression has this height.
        """
        chosen = self.heights[int(rng.integers(len(self.heights)))] if height is None else height
        if chosen not in self.heights:
            raise ValueError(f"no valid expression of height {chosen}: there are some of {self.heights}")
        cls = (chosen, BOTH, self._grow.hidden)
        full = rng.random() < _FULL_PROBABILITY and self._full.count(cls) > 0
        return (self._full if full else self._grow).tree(rng, cls)

    def subtree(self, rng: np.random.Generator, weights: int, max_height: int, near: int = 0) -> Expression | None:
        """A random tree holding these weights (bit set), at most `max_height` high, of heights near `near`.

        Any width may come out; the caller checks the whole. None if no such tree exists.
        """
        options = [
            ((height, weights, width), 2.0 ** -abs(height - near))
            for height in range(min(max_height, self.rules.max_height) + 1)
            for width in range(len(self._grow.widths))
            if self._grow.count((height, weights, width))
        ]
        if not options:
            return None
        cumulative = list(accumulate(weight for _, weight in options))
        index = min(bisect_right(cumulative, rng.random() * cumulative[-1]), len(options) - 1)
        return self._grow.tree(rng, options[index][0])


def _richness(count: int) -> float:
    return 1.0 + math.log2(count)


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.random() * len(names))]
