"""Numeric fingerprint: a short string that two expressions share if they compute the same function.

The expression is run in float64 on fixed probes, at the real widths H and d and under the real width policy:

    probes       8 rows of x at scales 0.25, 1, 2, 4; weights of variance 1 / fan-in, biases 1/4; from Philox
    statistics   y squashed by asinh, each row projected on 3 fixed directions: 24 numbers
    hash         of the cells, 1e-6 wide, that the numbers lie in; of the counts of nan, inf and -inf per row; and of
                 which weights are Kronecker products

Two forms of one function are told apart with probability under 24 x 1e-8; distinct functions that agree on the probes
to 1e-6 share a fingerprint. Where these numbers come from: docs/decisions/0003.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

from kernels.bounded import EXPRESSIONS
from kernels.language.canonical import canonicalize
from kernels.language.expression import Expression, kron_weights
from kernels.language.widths import validate
from kernels.reference.ffn import evaluate
from kernels.reference.philox import random_words

_SEED = 0xFF7A5
_SCALES = (0.25, 0.25, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0)
_DIRECTIONS = 3
_CELL = 1e-6
_OFFSET = (math.sqrt(5.0) - 1.0) / 2.0
_CACHED_WIDTHS = 8
"""(hidden, inner) pairs whose probe weights are kept: 16 H d bytes each, 9 MB at H = d = 540."""


def fingerprint(expr: Expression, hidden: int, inner: int, policy: str = "truncate") -> str:
    """Fingerprint of `expr` as a function at these widths: 16 hexadecimal digits.

    Fingerprints are comparable only at equal `hidden` and `inner`. Both policies share one fingerprint where they
    give the same function.

    Raises:
        ExpressionError: `expr` is not a valid FFN body at these widths.
    """
    validate(expr, hidden, inner, policy)
    return _fingerprint(canonicalize(expr), hidden, inner, policy)


@lru_cache(maxsize=EXPRESSIONS)
def _fingerprint(expr: Expression, hidden: int, inner: int, policy: str) -> str:
    cells = [_token(v) for v in statistics(expr, hidden, inner, policy).flatten().tolist()]
    cells += sorted(kron_weights(expr))
    return hashlib.sha256(",".join(cells).encode()).hexdigest()[:16]


def statistics(expr: Expression, hidden: int, inner: int, policy: str = "truncate") -> Tensor:
    """The statistics before quantization, float64 [8, 5]: 3 projections, then counts of NaN and of signed infinities.

    Raises `ExpressionError` as `fingerprint` does.
    """
    probe = _probe(hidden, inner)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        y = evaluate(expr, *probe[:-1], policy=policy)
        finite = torch.isfinite(y)
        squashed = torch.asinh(torch.where(finite, y, torch.zeros_like(y)))
        projections = squashed @ probe[-1]
        nan = torch.isnan(y).sum(1)
        signed = (torch.isinf(y) * torch.sign(y.nan_to_num(0.0))).sum(1)
    return torch.cat([projections, nan[:, None].double(), signed[:, None]], 1)


def _token(value: float) -> str:
    return str(math.floor(value / _CELL + _OFFSET))


@lru_cache(maxsize=_CACHED_WIDTHS)
def _probe(hidden: int, inner: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [8, H], w1 [d, H], b1 [d], w2 [H, d], b2 [H] and directions [H, 3], float64 on the CPU."""
    scales = torch.tensor(_SCALES, dtype=torch.float64)[:, None]
    x = _symmetric(len(_SCALES), hidden, 0) * scales
    w1 = _symmetric(inner, hidden, 1) / math.sqrt(hidden)
    b1 = _symmetric(1, inner, 2)[0] / 2
    w2 = _symmetric(hidden, inner, 3) / math.sqrt(inner)
    b2 = _symmetric(1, hidden, 4)[0] / 2
    u = _uniform(hidden, _DIRECTIONS, 5) * 2 - 1
    directions = (torch.sign(u) * (0.5 + u.abs())) / math.sqrt(hidden)
    return x, w1, b1, w2, b2, directions


def _symmetric(rows: int, columns: int, stream: int) -> Tensor:
    """Uniform with mean 0 and variance 1, float64 [rows, columns]."""
    return (_uniform(rows, columns, stream) * 2 - 1) * math.sqrt(3.0)


def _uniform(rows: int, columns: int, stream: int) -> Tensor:
    """Uniform in (0, 1), float64 [rows, columns]."""
    return (random_words(rows, columns, _SEED, stream=stream, device=torch.device("cpu")).double() + 0.5) / 2.0**32
