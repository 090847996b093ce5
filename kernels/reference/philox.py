"""Philox4x32-10, the counter-based generator behind dropout, in torch integer operations.

Every backend makes this mask bit for bit from the seed, so that backward computes it again. For an output of N rows and
H columns (leading dimensions flattened) the element at (row, column) uses

    counter = (column // 4, row mod 2^32, row // 2^32, stream)      key = (seed mod 2^32, seed // 2^32)
    word    = philox4x32_10(counter, key)[column % 4]               kept  iff  word >= round(p * 2^32)

and kept elements are scaled by 1 / (1 - p). `stream` is the FFN's position in its stack (docs/decisions/0010).

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 4.3 (constants, 10 rounds).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_CHUNK = 1 << 14
"""Counters worked on at once on a CPU, so that the rounds stay in cache."""


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
    """High and low 32 bits of a * b: the int64 product wraps modulo 2^64 with the right bits in both halves."""
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def random_words(rows: int, columns: int, seed: int, *, stream: int = 0, device: torch.device | None = None) -> Tensor:
    """The 32-bit word of every element of a [rows, columns] output, int64 [rows, columns]; layout as in the module."""
    words = torch.empty(rows, (columns + 3) // 4, 4, dtype=torch.int64, device=device)
    for start, stop in _row_blocks(rows, columns, device):
        for lane, word in enumerate(_word_groups(start, stop, columns, seed, stream, device)):
            words[start:stop, :, lane] = word
    return words.flatten(1)[:, :columns]


def _row_blocks(rows: int, columns: int, device: torch.device | None) -> Iterator[tuple[int, int]]:
    """Row ranges [start, stop) of about `_CHUNK` counters each on a CPU, all rows at once elsewhere."""
    on_cpu = device is None or torch.device(device).type == "cpu"
    step = max(1, 4 * _CHUNK // max(columns, 1)) if on_cpu else max(rows, 1)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _word_groups(
    start: int, stop: int, columns: int, seed: int, stream: int, device: torch.device | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words of rows [start, stop): four int64 [stop - start, ceil(columns / 4)], one per column modulo 4."""
    row = torch.arange(start, stop, dtype=torch.int64, device=device)[:, None]
    group = torch.arange((columns + 3) // 4, dtype=torch.int64, device=device)[None, :]
    return philox4x32(group, row & _MASK, row >> 32, torch.full_like(group[:, :1], stream), seed)


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
    columns, rows = shape[-1], math.prod(shape[:-1])
    kept = torch.empty(rows, (columns + 3) // 4, 4, dtype=torch.bool, device=device)
    for start, stop in _row_blocks(rows, columns, device):
        for lane, words in enumerate(_word_groups(start, stop, columns, seed, stream, device)):
            torch.ge(words, threshold, out=kept[start:stop, :, lane])
    return kept.flatten(1)[:, :columns].reshape(shape)


def dropout(value: Tensor, p: float, seed: int, *, stream: int = 0) -> Tensor:
    """Dropout of `value` ([..., H], any floating dtype) with the mask above; kept elements scaled by 1 / (1 - p)."""
    if p == 0.0:
        return value
    kept = dropout_mask(value.shape, p, seed, stream=stream, device=value.device)
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    return torch.where(kept, value * scale, torch.zeros_like(value))
