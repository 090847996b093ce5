"""The limits of a configuration as sums over layers."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from search.config.schema import BudgetConfig
from search.context import Prepared
from search.inherit.candidates import Budget
from search.inherit.latency import Milliseconds
from search.inherit.total import Tables
from search.inherit.variants import Variants

SLACK = 0.005
"""A share of the encoder is kept to within this, so that three of six layers at a quarter of their width, biases and
norms included, are a quarter of it."""

Times = Callable[[], Milliseconds]
"""Asked for where a limit needs them."""


def budget_of(
    ctx: Prepared, made: Variants, tables: Tables, times: Times, limits: BudgetConfig | None = None
) -> Budget:
    """`limits`, or those of the configuration, as sums over layers; of tables, the smallest counts."""
    budget, shape = limits or ctx.config.budget, made.shape
    layers = shape.num_layers
    sizes = np.array([[made.layer(spec) for spec in made.specs]] * layers, dtype=np.float64)
    names, costs, most = [], [], []
    if budget.params is not None:
        names.append("params")
        costs.append(sizes)
        most.append(budget.params[1] - tables.fixed)
    if budget.flops is not None:
        length = ctx.config.objectives.sequence_length or ctx.config.data.max_length
        names.append("flops")
        costs.append(np.array([[made.layer_flops(spec, length) for spec in made.specs]] * layers, dtype=np.float64))
        most.append(budget.flops - made.rest_flops(length))
    if budget.latency_ms is not None or budget.speedup is not None:
        took = times()
        names.append("latency_ms")
        costs.append(np.tile(took.variants, (layers, 1)))
        most.append(min(budget.latency_ms or took.whole, took.whole / (budget.speedup or 1.0)) - took.rest)
    if budget.encoder is not None or not names:
        names.append("encoder")
        costs.append(sizes)
        share = Fraction(1, 4) if budget.encoder is None else Fraction(budget.encoder).limit_denominator(10**6)
        most.append(float(share * made.encoder(made.whole)) * (1 + SLACK))
    if tables.most is not None:
        names.append("total")
        costs.append(sizes)
        most.append(tables.most - tables.fixed)
    return Budget(tuple(names), np.stack(costs), tuple(most))


def slower(budget: Budget, factor: float, rest: float) -> Budget:
    """`budget` on a machine where layers and the rest, `rest` milliseconds, take `factor` times as long."""
    costs, limits = budget.costs.copy(), list(budget.limits)
    for k, name in enumerate(budget.names):
        if name == "latency_ms":
            costs[k] *= factor
            limits[k] += rest - factor * rest
    return Budget(budget.names, costs, tuple(limits))
