"""The best combinations of block variants under a budget: dynamic programming over layers.

Losses and costs are sums over layers. Labels (loss, costs, choices so far) are extended layer by layer; those above a
limit are dropped, and of those whose costs fall into one cell of a grid the `WIDTH` with the smallest losses are kept.
With one limit and enough cells that is the exact optimum to within a cell; with several it is a beam.

Rejected: an integer program. A solver is one more dependency for a problem of a few thousand labels, and gives one
answer where the next step wants dozens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.errors import UserError

CELLS = 512
"""Cells per limit; with several limits, of all of them together."""
WIDTH = 12
"""Labels kept per cell."""


def solve(losses: np.ndarray, costs: np.ndarray, limits: Sequence[float], count: int) -> list[tuple[int, ...]]:
    """The `count` best assignments of a variant to every layer.

    Args:
        losses: [L, V], what each variant loses in each layer.
        costs: [K, L, V], not negative.
        limits: [K], the most that costs may add up to.
        count: how many assignments, at most.

    Returns:
        Assignments (a variant per layer), best first.

    Raises:
        UserError: nothing fits.
    """
    layers, variants = losses.shape
    limits_array = np.asarray(limits, dtype=np.float64)
    least = costs.min(axis=2).sum(axis=1)
    if np.any(least > limits_array):
        raise UserError(f"budget: the smallest student costs {least.tolist()}, more than {limits_array.tolist()}")
    remaining = np.concatenate([costs.min(axis=2)[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((len(costs), 1))], axis=1)
    loss, cost = np.zeros(1), np.zeros((1, len(costs)))
    chosen = np.zeros((1, 0), dtype=np.int16)
    cells = max(2, round(CELLS ** (1 / len(costs))))
    for layer in range(layers):
        loss = (loss[:, None] + losses[layer]).ravel()
        cost = (cost[:, None, :] + costs[:, layer].T).reshape(-1, len(costs))
        picks = np.tile(np.arange(variants, dtype=np.int16), len(chosen))
        chosen = np.concatenate([np.repeat(chosen, variants, axis=0), picks[:, None]], axis=1)
        fits = np.all(cost + remaining[:, layer + 1] <= limits_array * (1 + 1e-9), axis=1)
        loss, cost, chosen = loss[fits], cost[fits], chosen[fits]
        keep = _best_per_cell(loss, cost, limits_array, cells)
        loss, cost, chosen = loss[keep], cost[keep], chosen[keep]
    order = np.argsort(loss, kind="stable")[:count]
    return [tuple(int(v) for v in chosen[k]) for k in order]


def _best_per_cell(loss: np.ndarray, cost: np.ndarray, limits: np.ndarray, cells: int) -> np.ndarray:
    """Indices of the `WIDTH` smallest losses in every cell of costs."""
    grid = np.minimum((cost / np.maximum(limits, 1e-12) * cells).astype(np.int64), cells)
    cell = np.ravel_multi_index(tuple(grid.T), (cells + 1,) * grid.shape[1])
    order = np.lexsort((loss, cell))
    ordered = cell[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, dtype=bool)
    starts = np.maximum.accumulate(np.where(first, np.arange(len(ordered)), 0))
    return order[np.arange(len(ordered)) - starts < WIDTH]
