"""Architectures as fixed-length vectors of numbers, for the learned parts of a search: the paper's encoding.

`feature_names` names every entry. Per layer:

    token_0..31      the expression's operators in text order (pre-order) as ids, 0 after the end; longer ones are cut
    height, size     of the tree
    count_<op>       how often each operator occurs: those of the paper's space and gelu_erf always, others where the
                     space has them
    activation_mid   whether an activation is the operand of wb2 (the place of GELU in the hand-designed FFN)
    residual         whether x reaches the root past both weights (a binary operator above wb2)
    stack, ratio     n and r
    params_share     the layer's FFN parameters over the architecture's total

and for the whole: total parameters as a position in the budget window, mean stack, mean ratio. Ids: x 1, wb1 2, wb2 3
(-2 and -3 as Kronecker products), then 4 + the operator's place. Source: EfficientBERT (Dong et al., 2021), section
3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.params import count_parameters, layer_parameters
from engine.architecture.shape import ModelShape
from kernels.bounded import EXPRESSIONS
from kernels.language.expression import Expression
from kernels.language.operators import KRON, LEAF, OPERATORS
from kernels.language.widths import weight_order
from search.space.rules import is_activation

MAX_TOKENS = 32
"""Tokens kept per layer; 9 in 10 random expressions of the paper's space have at most 22 nodes."""

_OPERATOR_IDS = {name: 4 + place for place, name in enumerate(OPERATORS)}
ALWAYS_COUNTED = tuple(name for name, row in OPERATORS.items() if row.in_paper or name == "gelu_erf")
_TOTAL_NAMES = ("params_in_window", "mean_stack", "mean_ratio")


def counted_operators(*allowed: Iterable[str]) -> tuple[str, ...]:
    """Names with a `count_` entry in a space with these operators and kinds of linear."""
    names = {name for group in allowed for name in group}
    extra = (name for name in (*OPERATORS, KRON) if name in names and name not in ALWAYS_COUNTED)
    return (*ALWAYS_COUNTED, *extra)


def feature_names(num_layers: int, counted: Sequence[str] = ALWAYS_COUNTED) -> list[str]:
    """Names of the entries of `encode`, e.g. `layer0.token_3`, `total.mean_stack`."""
    layer = (
        *(f"token_{i}" for i in range(MAX_TOKENS)),
        *("height", "size", *(f"count_{name}" for name in counted), "activation_mid", "residual"),
        *("stack", "ratio", "params_share"),
    )
    return [f"layer{i}.{name}" for i in range(num_layers) for name in layer] + [
        f"total.{name}" for name in _TOTAL_NAMES
    ]


def encode(
    arch: Architecture, shape: ModelShape, budget: tuple[int, int], counted: tuple[str, ...] = ALWAYS_COUNTED
) -> np.ndarray:
    """Feature vector of `arch`, float64 [L * (39 + operators counted) + 3]; see the module's text.

    Args:
        arch: L layers, L that of `shape`.
        shape: sizes of the student; `fit_dense` is counted where it has one.
        budget: window of parameters (low, high).
        counted: operators with a `count_` entry.
    """
    total = count_parameters(arch, shape)
    blocks = [_layer(spec, shape, total, counted) for spec in arch.layers]
    window = max(budget[1] - budget[0], 1)
    stacks, ratios = [s.stack for s in arch.layers], [float(s.ratio) for s in arch.layers]
    whole = [(total - budget[0]) / window, float(np.mean(stacks)), float(np.mean(ratios))]
    return np.concatenate([*blocks, whole])


def tokens(expr: Expression) -> list[int]:
    """Token ids of `expr` in text order, full length."""
    return [_token(node) for node in expr.walk()]


def _layer(spec: LayerSpec, shape: ModelShape, total: int, counted: tuple[str, ...]) -> np.ndarray:
    params = layer_parameters(spec, shape)
    return np.concatenate([_tree(spec.expression, counted), [spec.stack, float(spec.ratio), params / total]])


@lru_cache(maxsize=EXPRESSIONS)
def _tree(expr: Expression, counted: tuple[str, ...]) -> np.ndarray:
    ids = tokens(expr)
    padded = (ids + [0] * MAX_TOKENS)[:MAX_TOKENS]
    counts = [sum(node.op == name for node in expr.walk()) for name in counted]
    mid = any(node.weight == "wb2" and is_activation(node.args[0]) for node in expr.walk())
    features = np.asarray([*padded, expr.height, expr.size, *counts, mid, has_residual(expr)], dtype=np.float64)
    features.flags.writeable = False  # shared by all who ask
    return features


def has_residual(expr: Expression) -> bool:
    """Whether a binary operator above both weights joins their value with a weightless operand."""
    node = expr
    while node.args and node.weight is None:
        with_weights = [a for a in node.args if weight_order(a)]
        if len(with_weights) < len(node.args):
            return True
        if len(with_weights) > 1:
            return False
        node = with_weights[0]
    return False


def _token(node: Expression) -> int:
    if node.op == LEAF:
        return 1
    if node.weight is not None:
        token = 2 if node.weight == "wb1" else 3
        return -token if node.op == KRON else token
    return _OPERATOR_IDS[node.op]
