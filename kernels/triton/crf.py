"""The CRF scan on Triton kernels (`kernels.triton.crf_kernels`); functions as in `kernels.reference.crf`.

One launch forward and one backward; nothing waits for the device. A program has one warp for up to 16 tags, two for up
to 32, eight for 64 (four spill registers on sm_80): by the compiler's figures, not yet measured on a device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.triton import crf_kernels
from kernels.triton.launch import launch


def scan(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor, best: bool
) -> tuple[Tensor, Tensor]:
    """total [B] float64 and alpha [B, n, L] float32."""
    batch, positions, tags = emissions.shape
    total = emissions.new_zeros(batch, dtype=torch.float64)
    alpha = _zeros(emissions)
    if batch:
        dense = [t.contiguous() for t in (emissions, transitions, start, end, lengths)]
        launch(
            crf_kernels.crf_scan_fwd_kernel, (batch,), *dense, alpha, total, positions, tags, BEST=best, **_sizes(tags)
        )
    return total, alpha


def scan_bwd(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor, alpha: Tensor, best: bool
) -> tuple[Tensor, Tensor]:
    """Marginals of tags [B, n, L] and counts of pairs [B, L, L], float32; the best path and its pairs with `best`."""
    del start
    batch, positions, tags = emissions.shape
    marginals, pairs = _zeros(emissions), emissions.new_empty(batch, tags, tags)
    if batch:
        shared = [t.contiguous() for t in (transitions, end, lengths, alpha)]
        outputs = (marginals, pairs, positions, tags)
        if best:
            launch(crf_kernels.crf_path_kernel, (batch,), *shared, *outputs, **_sizes(tags))
        else:
            launch(crf_kernels.crf_scan_bwd_kernel, (batch,), emissions.contiguous(), *shared, *outputs, **_sizes(tags))
    return marginals, pairs


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, memory_format=torch.contiguous_format)


def _sizes(tags: int) -> dict[str, Any]:
    rows = max(16, triton.next_power_of_2(tags))
    return {"BL": rows, "warps": {16: 1, 32: 2}.get(rows, 8), "stages": 1}
