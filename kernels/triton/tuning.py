"""Block sizes, warps and stages per shape family, and where they come from.

A family is a kernel, a dtype and a number of slots; widths do not matter to it, since every width of the search space
is a few blocks. The depth of a block (BK) and the number of token groups are the same for all configurations of a family,
so that results do not depend on which one runs (only the bias gradient of w1 is grouped by rows of a block).

    shipped    `_SHIPPED`: by reasoning, for sm_90 (H100) and sm_80 (A100); not yet measured on either
    tuned      on any other architecture, or where FFNAS_TUNE=1: the candidates of `candidates` are timed once at the
               first call of a family, and the fastest kept in `<cache>/triton/tuning-<device>-<versions>.json`
    FFNAS_TUNE=0 turns timing off: the shipped values then serve every architecture

Timing synchronizes the device; it never happens while a CUDA graph is captured or kernels are only compiled: then the
shipped values are used, and nothing is remembered.

Reasoning. A 128 x 64 block with 8 warps leaves 32 accumulators a thread; the epilogue works on them in halves of 16, so
that the tiles of the interpreting machine fit. 64 columns waste 7 % of 540 and of 180 columns, where 128 waste 19 % and
42 %. Depth 64 makes 128-byte rows of shared memory; three stages hide the latency of the second-level cache. float32
without TF32 runs on plain multiply-adds, which want many results a thread and little depth.

Rejected: `triton.autotune`. It tunes per launch site and process, and cannot be told not to while a graph is captured.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.cache import cache_dir
from kernels.triton.evaluate import interpret
from kernels.triton.launch import compiling, interpreted

ENVIRONMENT = "FFNAS_TUNE"


class Gemm(NamedTuple):
    """Rows, columns and depth of a block; parts of the epilogue; warps; pipeline stages."""

    rows: int
    columns: int
    depth: int
    split: int
    warps: int
    stages: int

    def constants(self, *, split: bool = True) -> dict[str, int]:
        """As arguments of `kernels.triton.launch.launch`."""
        own = {"BM": self.rows, "BN": self.columns, "BK": self.depth, "warps": self.warps, "stages": self.stages}
        return {**own, "SPLIT": self.split} if split else own


class RowBlocks(NamedTuple):
    """Rows of a tile, its two blocks of columns, warps, and programs launched at most (backward)."""

    rows: int
    first: int
    second: int
    warps: int
    programs: int


_SHIPPED = {
    ("linear", 16): {0: Gemm(128, 64, 64, 1, 8, 3), 2: Gemm(128, 64, 64, 2, 8, 3), 6: Gemm(64, 64, 64, 2, 8, 3)},
    ("linear_bwd", 16): {0: Gemm(128, 64, 64, 2, 8, 3), 2: Gemm(128, 64, 64, 2, 8, 3), 6: Gemm(64, 64, 64, 2, 8, 3)},
    ("weight_grad", 16): {0: Gemm(64, 64, 64, 1, 4, 3)},
    ("linear", 32): {0: Gemm(64, 64, 32, 1, 8, 3), 2: Gemm(64, 64, 32, 1, 8, 3), 6: Gemm(64, 64, 32, 2, 8, 3)},
    ("linear_bwd", 32): {0: Gemm(64, 64, 32, 1, 8, 3), 2: Gemm(64, 64, 32, 2, 8, 3), 6: Gemm(64, 64, 32, 2, 8, 3)},
    ("weight_grad", 32): {0: Gemm(64, 64, 32, 1, 8, 3)},
}
_MANY_SLOTS = {16: Gemm(32, 32, 64, 1, 8, 2), 32: Gemm(32, 32, 32, 1, 8, 2)}
"""More than six slots: four elements a thread, whatever the product loses by it."""
_INTERPRETER = Gemm(32, 32, 32, 2, 1, 1)
"""Small enough that odd test sizes span several blocks."""

_tuned: dict[str, dict[str, list[int]]] = {}


def gemm(kind: str, dtype: torch.dtype, slots: int) -> Gemm:
    """The shipped configuration of a product kernel ("linear", "linear_bwd" or "weight_grad")."""
    if interpreted(interpret):
        return _INTERPRETER
    bits = 8 * dtype.itemsize
    if slots > 6:
        return _MANY_SLOTS[bits]
    return _SHIPPED[kind, bits][slots]


def candidates(kind: str, dtype: torch.dtype, slots: int) -> list[Gemm]:
    """The shipped configuration first, and others of equal depth to be timed against it."""
    first = gemm(kind, dtype, slots)
    if slots > 6 or dtype == torch.float32:
        return [first, first._replace(stages=2), first._replace(warps=4)]
    others = [
        first._replace(stages=4),
        first._replace(rows=64, warps=4),
        first._replace(rows=64, warps=8, split=1),
        first._replace(columns=128, split=2, warps=8),
    ]
    return [first, *(c for c in others if c != first)]


def chosen(kind: str, dtype: torch.dtype, slots: int, device: torch.device, run: Callable[[Gemm], None]) -> Gemm:
    """The configuration to use: shipped, remembered, or timed now.

    Args:
        run: launches the kernel with a configuration on the caller's tensors, into outputs that are written again
            afterwards; called only where timing is due.
    """
    shipped = gemm(kind, dtype, slots)
    if device.type != "cuda" or compiling() or not _tunes(device):
        return shipped
    file, key = _file(device), f"{kind} {dtype} {slots}"
    known = _load(file)
    if key in known:
        return Gemm(*known[key])
    if not due(kind, dtype, slots, device):
        return shipped
    best = min(candidates(kind, dtype, slots), key=lambda c: _time(run, c))
    known[key] = list(best)
    _save(file, known)
    return best


def due(kind: str, dtype: torch.dtype, slots: int, device: torch.device) -> bool:
    """Whether `chosen` would time candidates now."""
    if device.type != "cuda" or compiling() or not _tunes(device):
        return False
    known = f"{kind} {dtype} {slots}" in _load(_file(device))
    return not known and not torch.cuda.is_current_stream_capturing()


def _tunes(device: torch.device) -> bool:
    wish = os.environ.get(ENVIRONMENT)
    if wish is not None:
        return wish != "0"
    return _capability(device) not in ((8, 0), (9, 0))


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _time(run: Callable[[Gemm], None], config: Gemm) -> float:
    """Milliseconds, or infinity where the device has not the resources for it."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(lambda: run(config), warmup=5, rep=20)
    except OutOfResources:
        return float("inf")


@lru_cache
def _file(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_")
    return str(cache_dir() / "triton" / f"tuning-{name}-torch{torch.__version__}-triton{triton.__version__}.json")


def _load(file: str) -> dict[str, list[int]]:
    """What was tuned before; a damaged or missing file counts as empty, and is written again."""
    if file not in _tuned:
        _tuned[file] = {}
        with contextlib.suppress(OSError, ValueError), open(file, encoding="utf-8") as stream:
            found = json.load(stream)
            if isinstance(found, dict) and all(
                isinstance(v, list) and len(v) == len(Gemm._fields) for v in found.values()
            ):
                _tuned[file] = found
    return _tuned[file]


def _save(file: str, known: dict[str, list[int]]) -> None:
    with contextlib.suppress(OSError):  # a read-only cache: tuned again by the next process
        os.makedirs(os.path.dirname(file), exist_ok=True)
        temporary = f"{file}.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(known, stream, indent=1)
        os.replace(temporary, file)


def rows(hidden: int, slots: int, *, backward: bool) -> RowBlocks:
    """Blocks of the row kernels: 540 columns are 512 and 32."""
    first, second = blocks(hidden)
    warps = 1 if first < 256 else 4 if first < 2048 else 8
    per_thread = 16 if slots <= 2 and not backward else 8 if slots <= 6 else 4
    count = max(1, min(8, per_thread * 32 * warps // first))
    return RowBlocks(count, first, second, warps, 512)


def blocks(hidden: int) -> tuple[int, int]:
    """(largest power of two that fits, next power of two for the rest), at least 4 each; or (one for all, 0)."""
    first = max(4, 1 << (hidden.bit_length() - 1))
    rest = hidden - first
    second = 0 if rest <= 0 else max(4, 1 << (rest - 1).bit_length())
    return (2 * first, 0) if second >= first else (first, second)


def elementwise(slots: int) -> tuple[int, int, int]:
    """Rows, columns and warps of an elementwise tile."""
    return (16, 64, 4) if slots <= 6 else (8, 64, 4)


def reduction(parts: Tensor, count: int) -> tuple[int, int, int]:
    """Rows and columns of a tile that adds `count` rows of `parts`, and warps."""
    return (32, 32, 4) if count > 16 else (8, 128, 4)


def token_groups(tokens: int, depth: int) -> int:
    """Groups of tokens that weight gradients are summed over separately; a function of the call's size alone."""
    if interpreted(interpret):
        return -(-tokens // (2 * depth))
    return max(1, min(16, tokens // 512))
