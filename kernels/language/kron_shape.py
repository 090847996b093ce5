"""Shapes of Kronecker factors: which small matrices a weight `A (x) B` is made of.

One pair of numbers, the *block* (p, q), says how both weights of an FFN are factored; p divides d, q divides H:

    wb1  [d, H] = A [d/p, H/q] (x) B [p, q]          wb2  [H, d] = A [H/q, d/p] (x) B [q, p]

p is the divisor of all inner widths nearest to the square root of the largest, q that of H nearest to the square root
of H; of two as near, the smaller. A block that fits several inner widths makes narrower FFNs views of the factors.

Source: KroneckerBERT (Tahaei et al., NAACL 2022), section 3, chooses shapes by hand. Why one block:
docs/decisions/0004.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from kernels.language.operators import WEIGHTS

Block = tuple[int, int]
"""(p, q): rows of wb1's B and columns of wb1's B."""


def default_block(hidden: int, inners: Iterable[int]) -> Block:
    """The block the rule gives for hidden width H and these inner widths (at least one)."""
    widths = tuple(inners)
    return _divisor(math.gcd(*widths), math.sqrt(max(widths))), _divisor(hidden, math.sqrt(hidden))


def check_block(block: Block, hidden: int, inner: int) -> None:
    """Raises `ValueError` unless `block` = (p, q) divides (inner, hidden)."""
    for name, part, whole in (("inner width", block[0], inner), ("hidden width", block[1], hidden)):
        if isinstance(part, bool) or not isinstance(part, int) or part < 1 or whole % part:
            raise ValueError(f"Kronecker block {list(block)}: {part} does not divide the {name} {whole}")


def factor_shapes(weight: str, block: Block, hidden: int, inner: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A and B of `"wb1"` or `"wb2"`. Raises `ValueError` as `check_block`."""
    check_block(block, hidden, inner)
    p, q = block
    small, large = (p, q), (inner // p, hidden // q)
    return (large, small) if weight == WEIGHTS[0] else (large[::-1], small[::-1])


def weight_size(weight: str, kron: Collection[str], block: Block | None, hidden: int, inner: int) -> int:
    """Numbers in the matrix (or the two factors) of a weight, its bias not counted."""
    if weight not in kron:
        return hidden * inner
    assert block is not None
    (a, b), (c, d) = factor_shapes(weight, block, hidden, inner)
    return a * b + c * d


def weight_products(weight: str, kron: Collection[str], block: Block | None, hidden: int, inner: int) -> int:
    """Multiply-accumulates per token of a product with this weight, the cheaper order of the two factors taken."""
    if weight not in kron:
        return hidden * inner
    assert block is not None
    (a1, a2), (b1, b2) = factor_shapes(weight, block, hidden, inner)
    return min(small_first_products(a1, a2, b1, b2), large_first_products(a1, a2, b1, b2))


def small_first_products(a1: int, a2: int, b1: int, b2: int) -> int:
    """Multiply-accumulates of x -> A (X B^T), A [a1, a2], B [b1, b2], X [a2, b2]."""
    return a2 * b1 * (b2 + a1)


def large_first_products(a1: int, a2: int, b1: int, b2: int) -> int:
    """Multiply-accumulates of x -> (A X) B^T."""
    return a1 * b2 * (a2 + b1)


def _divisor(number: int, wanted: float) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))
