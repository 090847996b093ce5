"""The learned partition of a space: a binary tree of linear splits, good half left, built from scored points.

At every node ridge regression (its strength chosen by leave-one-out error) predicts the score from the features, and
the plane through the middle of the predictions parts the node's points into a good and a bad child. A node that
cannot be parted (too few points, equal scores, equal features, no gap between predictions) is a leaf; so ties,
constant scores and single-class nodes need no special case.

Rejected: a logistic or support vector classifier on better-half labels. On synthetic objectives it found no
better candidates than ridge (3.79 against 3.80 standard deviations above the mean after 200 trials, mean of 20 seeds),
it forgets how much better a point is, and equal scores make its labels arbitrary.

Source: LaNAS, Wang et al. 2019, "Sample-Efficient Neural Architecture Search by Learning Action Space", section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ALPHAS = tuple(float(a) for a in np.logspace(-1, 4, 11))
"""Ridge strengths to choose from; features are standardized."""

GAP = 1e-9
"""Smallest distance between two predictions, in standard deviations of the target, that a plane may pass through."""


@dataclass(frozen=True)
class Split:
    """A plane: `features @ weights > threshold` is the good side.

    Attributes:
        weights: float64 [D].
        threshold: of the weighted sum.
    """

    weights: np.ndarray
    threshold: float

    def good(self, features: np.ndarray) -> np.ndarray:
        """bool [N] for features [N, D]."""
        return features @ self.weights > self.threshold


@dataclass
class Node:
    """A node; a leaf has no split. Counts and means come from `count`.

    Attributes:
        split: how the children part the node, None for a leaf.
        children: (good, bad).
        visits: points in the node, the running ones included.
        mean: mean value of its scored points; its parent's where it has none.
    """

    split: Split | None = None
    children: tuple[Node, Node] | None = None
    visits: int = 0
    mean: float = 0.0


def build(features: np.ndarray, values: np.ndarray, *, min_leaf: int, max_depth: int) -> Node:
    """Builds a tree.

    Args:
        features: float64 [N, D].
        values: float64 [N], finite; higher is better.
        min_leaf: fewest points in a leaf.
        max_depth: most splits from root to leaf.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):  # the same sums in the same order on any number of cores
        return _build(features, values, min_leaf, max_depth)


def count(node: Node, features: np.ndarray, values: np.ndarray, parent_mean: float = 0.0) -> None:
    """Fills in visits and means: all points visit, those whose value is NaN (still running) add to no mean."""
    scored = values[~np.isnan(values)]
    node.visits = len(values)
    node.mean = float(scored.mean()) if len(scored) else parent_mean
    if node.split is not None and node.children is not None:
        good = node.split.good(features)
        for child, side in zip(node.children, (good, ~good), strict=True):
            count(child, features[side], values[side], node.mean)


def descend(root: Node, exploration: float) -> list[tuple[Split, bool]]:
    """The path to the leaf with the highest upper confidence bound at every step, ties to the good side.

    A child's bound is mean + 2 c sqrt(2 ln(visits of parent) / visits of child) (LaNAS, equation 4).

    Returns:
        The splits from the root, each with whether the path took its good side.
    """
    path: list[tuple[Split, bool]] = []
    node = root
    while node.split is not None and node.children is not None:
        bounds = [_bound(child, node.visits, exploration) for child in node.children]
        good = bounds[0] >= bounds[1]
        path.append((node.split, good))
        node = node.children[0 if good else 1]
    return path


def describe(node: Node, scale: np.ndarray, names: Sequence[str], features: int = 3) -> dict[str, Any]:
    """A counted tree as JSON values: visits, mean, and for every split the features that weigh most.

    Args:
        node: the root.
        scale: float64 [D], standard deviations of the features; a weight times that says how much a feature matters.
        names: of the features; their numbers where it is empty.
        features: so many are named per split.
    """
    found: dict[str, Any] = {"visits": node.visits, "mean": node.mean}
    if node.split is not None and node.children is not None:
        weights = node.split.weights * scale
        total = np.abs(weights).sum() or 1.0
        order = np.argsort(-np.abs(weights), kind="stable")[:features]
        found["features"] = [
            {"name": names[i] if len(names) else f"feature {i}", "share": float(weights[i] / total)} for i in order
        ]
        found["children"] = [describe(child, scale, names, features) for child in node.children]
    return found


def agreement(path: list[tuple[Split, bool]], features: np.ndarray) -> np.ndarray:
    """int [N]: on how many splits of the path each point of `features` [N, D] takes the path's side."""
    total = np.zeros(len(features), dtype=np.int64)
    for split, good in path:
        total += split.good(features) == good
    return total


def ranks(scores: np.ndarray) -> np.ndarray:
    """Scores [N] as shares of the way from worst (0) to best (1); equal scores share their mean rank; NaN stays NaN.

    Ranks make the exploration constant independent of the metric's scale and of a few very bad candidates.
    """
    result = np.full(len(scores), np.nan)
    known = np.flatnonzero(~np.isnan(scores))
    if len(known):
        _, inverse, counts = np.unique(scores[known], return_inverse=True, return_counts=True)
        upper = np.cumsum(counts) - 1
        result[known] = ((upper - (counts - 1) / 2) / max(len(known) - 1, 1))[inverse]
        if len(counts) == 1:
            result[known] = 0.5
    return result


def _build(features: np.ndarray, values: np.ndarray, min_leaf: int, depth: int) -> Node:
    split = _fit(features, values, min_leaf) if depth > 0 and len(values) >= 2 * min_leaf else None
    if split is None:
        return Node()
    good = split.good(features)
    better, worse = (_build(features[side], values[side], min_leaf, depth - 1) for side in (good, ~good))
    return Node(split, (better, worse))


def _bound(child: Node, parent_visits: int, exploration: float) -> float:
    if child.visits == 0:
        return math.inf
    return child.mean + 2 * exploration * math.sqrt(2 * math.log(max(parent_visits, 1)) / child.visits)


def _fit(features: np.ndarray, values: np.ndarray, min_leaf: int) -> Split | None:
    from sklearn.linear_model import RidgeCV  # deferred: a second of import

    spread = values.std()
    scale = features.std(axis=0)
    varies = scale > 1e-12
    if spread < 1e-12 or not varies.any():
        return None
    standard = (features[:, varies] - features[:, varies].mean(axis=0)) / scale[varies]
    coefficients = RidgeCV(alphas=ALPHAS).fit(standard, (values - values.mean()) / spread).coef_
    weights = np.zeros(features.shape[1])
    weights[varies] = coefficients / scale[varies]
    # the plane goes through the gap nearest to the middle that leaves enough points on both sides
    ordered = np.sort(features @ weights)
    gaps = [i for i in range(min_leaf, len(ordered) - min_leaf + 1) if ordered[i] - ordered[i - 1] > GAP]
    if not gaps:
        return None
    cut = min(gaps, key=lambda i: abs(i - len(ordered) / 2))
    return Split(weights, float(ordered[cut - 1] + ordered[cut]) / 2)
