"""Philox4x32-10, the counter-based generator behind dropout, in torch integer operations.

Every backend must reproduce this mask bit for bit, from the seed alone, so that the backward pass regenerates it
instead of reading it back. For an output of N rows and H columns (leading dimensions flattened) the element at
(row, column) uses

    counter = (column // 4, row mod 2^32, row // 2^32, stream)      key = (seed mod 2^32, seed // 2^32)
    word    = philox4x32_10(counter, key)[column % 4]               kept  iff  word >= round(p * 2^32)

and kept elements are scaled by 1 / (1 - p). `stream` tells the FFNs of one call apart (position in a stack); one
counter serves four neighbouring columns and never two rows, so a kernel may tile rows and columns as it likes.

Rejected: torch's own generators. Their order of numbers depends on the device and on the launch geometry.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 4.3 (constants, 10 rounds);
`triton.language.philox` computes the same words.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        c0, c1, c2, c3: counter words, int64 tensors of values in [0, 2^32), broadcast against each other.
        seed: the 64-bit key; taken modulo 2^64.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b; in 16-bit halves, since the 64-bit product would overflow int64."""
    low = (b & 0xFFFF) * a
    high = (b >> 16) * a + (low >> 16)
    return high >> 16, ((high << 16) | (low & 0xFFFF)) & _MASK


def random_words(rows: int, columns: int, seed: int, *, stream: int = 0, device: torch.device | None = None) -> Tensor:
    """The 32-bit word of every element of a [rows, columns] output, int64 [rows, columns]; layout as in the module."""
    row = torch.arange(rows, dtype=torch.int64, device=device)[:, None]
    group = torch.arange((columns + 3) // 4, dtype=torch.int64, device=device)[None, :]
    last = torch.full_like(row[:1], stream)
    words = torch.stack(philox4x32(group, row & _MASK, row >> 32, last, seed), dim=-1)
    return words.reshape(rows, -1)[:, :columns]


def drop_threshold(p: float) -> int:
    """round(p * 2^32), clamped to 2^32: elements whose word is below it are dropped."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p_drop must lie in [0, 1], got {p!r}")
    return min(round(p * 2**32), 2**32)


def dropout_mask(
    shape: torch.Size | tuple[int, ...], p: float, seed: int, *, stream: int = 0, device: torch.device | None = None
) -> Tensor:
    """Which elements dropout keeps: bool tensor of `shape` ([..., H]), True = kept.

    Args:
        shape: output shape; all dimensions but the last are flattened to rows.
        p: probability of dropping an element, in [0, 1].
        seed: 64-bit seed.
        stream: position of the FFN in a stack, in [0, 2^32).

    Raises:
        ValueError: `p` outside [0, 1].
    """
    threshold = drop_threshold(p)
    columns = shape[-1]
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return (random_words(rows, columns, seed, stream=stream, device=device) >= threshold).reshape(shape)


def dropout(value: Tensor, p: float, seed: int, *, stream: int = 0) -> Tensor:
    """Dropout of `value` ([..., H], any floating dtype) with the mask above; kept elements scaled by 1 / (1 - p)."""
    if p == 0.0:
        return value
    kept = dropout_mask(value.shape, p, seed, stream=stream, device=value.device)
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    return torch.where(kept, value * scale, torch.zeros_like(value))
