"""Architectures as a fixed set of categories, for optimizers that know nothing else (`tpe`, `nsga2`).

Genes, per layer and only where the space leaves a choice:

    layer0.stack, layer0.ratio                   the layer's own
    layer0.root, layer0.mid, layer0.pre          operators at the root, under wb2 and under wb1
    layer0.height                                of the tree
    layer0.wb1, layer0.wb2                       kinds of linear, where the space has several

Genes to an architecture: (stack, ratio) as they are, and of a pool of expressions (draws and those of the best trials)
each layer gets the one that agrees with most of its genes; a mutation brings the result into the space if need be.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.architecture import parse_ratio as ratio_of
from kernels.bounded import EXPRESSIONS
from kernels.language.expression import Expression, with_kron
from kernels.language.operators import KRON, LEAF, WEIGHTS
from search.samplers.base import Space
from search.space.features import places
from search.space.rules import MAX_HEIGHT, MIN_HEIGHT

Genes = dict[str, str | int]
TREE_GENES = ("root", "mid", "pre", "height")
POOL_DRAWS = 12
"""Draws of the space whose expressions join the pool."""


def categories(space: Space, layers: int) -> dict[str, tuple[str | int, ...]]:
    """Every gene with its values."""
    operators = (*space.activations, *space.binaries, *space.linears, LEAF)
    heights = tuple(range(MIN_HEIGHT, MAX_HEIGHT + 1))
    result: dict[str, tuple[str | int, ...]] = {}
    for i in range(layers):
        if space.fixed_shapes is None:
            result[f"layer{i}.stack"] = tuple(space.stacks)
            result[f"layer{i}.ratio"] = tuple(str(r) for r in space.ratios)
        if space.fixed_expressions is None:
            result |= dict.fromkeys((f"layer{i}.{name}" for name in TREE_GENES[:3]), operators)
            result[f"layer{i}.height"] = heights
            if len(space.linears) > 1:
                result |= dict.fromkeys((f"layer{i}.{name}" for name in WEIGHTS), space.linears)
    return result


def genes(space: Space, arch: Architecture) -> Genes:
    """An architecture's genes."""
    result: Genes = {}
    for i, layer in enumerate(arch.layers):
        if space.fixed_shapes is None:
            result |= {f"layer{i}.stack": layer.stack, f"layer{i}.ratio": str(layer.ratio)}
        if space.fixed_expressions is None:
            tree = _tree_genes(layer.expression)
            result |= {f"layer{i}.{name}": value for name, value in zip(TREE_GENES, tree, strict=True)}
            if len(space.linears) > 1:
                result |= {f"layer{i}.{node.weight}": node.op for node in layer.expression.walk() if node.weight}
    return result


def express(
    space: Space, wanted: Genes, like: Architecture, best: Sequence[Architecture], rng: np.random.Generator
) -> Architecture:
    """An architecture with (nearly) these genes; it need not lie in the space.

    Args:
        space: where it is to lie.
        wanted: values of `categories`.
        like: gives what is fixed.
        best: architectures whose expressions join the pool, the preferred of equally good ones first.
        rng: draws the rest of the pool.
    """
    pool = [] if space.fixed_expressions is not None else [*best, *(space.sample(rng) for _ in range(POOL_DRAWS))]
    layers = []
    for i, layer in enumerate(like.layers):
        expression, stack, ratio = layer.expression, layer.stack, layer.ratio
        if space.fixed_shapes is None:
            stack, ratio = int(wanted[f"layer{i}.stack"]), ratio_of(str(wanted[f"layer{i}.ratio"]))
        if pool:
            target = tuple(wanted[f"layer{i}.{name}"] for name in TREE_GENES)
            expression = max((a.layers[i].expression for a in pool), key=lambda e: _agreement(e, target))
            if len(space.linears) > 1:
                expression = with_kron(expression, [name for name in WEIGHTS if wanted[f"layer{i}.{name}"] == KRON])
        layers.append(LayerSpec(expression, stack, ratio))
    return Architecture(tuple(layers))


def _agreement(expression: Expression, wanted: tuple[str | int, ...]) -> int:
    return sum(a == b for a, b in zip(_tree_genes(expression), wanted, strict=True))


@lru_cache(maxsize=EXPRESSIONS)
def _tree_genes(expression: Expression) -> tuple[str | int, ...]:
    return (*places(expression), expression.height)
