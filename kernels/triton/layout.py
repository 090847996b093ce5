"""Row strides, alignments, padded buffers and TF32: what kernels are told about their operands.

A kernel's `ALIGN` is the number of elements (8, 4, 2 or 1, and at most 16 bytes) that divides every row stride and
width it applies to; strides and widths are passed in that unit, so that the compiler sees the divisibility.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PAD = 8
"""Rows of our own buffers are a multiple of this many elements: 16 bytes for 16-bit dtypes, 32 for float32."""


def padded(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized [rows, columns rounded up to PAD]."""
    return torch.empty((rows, -(-columns // PAD) * PAD), dtype=dtype, device=device)


def allows_tf32() -> bool:
    """Whether PyTorch may round the operands of float32 products to TF32 on CUDA, whichever way that was set."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def alignment(sizes: Sequence[int], tensors: Sequence[Tensor]) -> int:
    """The largest of 8, 4, 2, 1 that divides all `sizes`, with elements that many at a time aligned in every tensor.

    Tensors whose first element is not 16-byte aligned (views from the middle of a row) get 1.
    """
    if any(t.data_ptr() % 16 for t in tensors):
        return 1
    return math.gcd(8, *sizes)


def matrix_units(tensors: Sequence[Tensor], width: int) -> tuple[int, list[int]]:
    """(ALIGN, row strides of the first two or three tensors in that unit) of matrices with `width` columns."""
    strides = [t.stride(0) for t in tensors]
    align = alignment([width, *strides], tensors)
    return align, [s // align for s in strides]
