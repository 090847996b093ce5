"""Block sizes, warps and stages per shape family, and where they come from.

A family is a kernel, a dtype and a number of slots; widths do not matter to it, since every width of the search space
is a few blocks. The depth of a block (BK) and the number of token groups are the same for all configurations of a
family, so that results do not depend on which one runs (only the bias gradient of w1 is grouped by rows of a block).

    measured   `tiles/sm_NN.json`, package data: what `python -m benchmarks.gpu_check` found on a device of that
               architecture (its file tiles.json, committed under that name); none is there yet
    reasoned   `_REASONED`: for families without a measurement, sm_90 (H100) and sm_80 (A100) in mind
    tuned      on any other architecture, or where FFNAS_TUNE=1: the candidates of `candidates` are timed once at the
               first call of a family, and the fastest kept in `<cache>/triton/tuning-<device>-<versions>.json`
    FFNAS_TUNE=0 turns timing off: the first two then serve every architecture

Timing synchronizes the device; it never happens while a CUDA graph is captured or kernels are only compiled: then the
measured or reasoned values (`shipped`) are used, and nothing is remembered.

Reasoning. Products this small are bound by what travels from the second-level cache: 8192 x 540 x 540 reads 119 MB in
blocks of 128 x 64, 81 MB in blocks of 128 x 128. So blocks are 128 columns wide where that wastes at most a fifth of
them (540: 19 %), else 64 (270, 180, 135). The epilogue works on a quarter of the columns at a time, which leaves the
tiles of the interpreting machine 16 elements a thread, or 8. Depth 64 makes 128-byte rows of shared memory; three
stages hide the cache's latency. float32 without TF32 runs on plain multiply-adds, which want many results a thread and
little depth. Row kernels have 8 elements a thread forward and 4 backward, where more tiles are alive.

Rejected: `triton.autotune`. It tunes per launch site and process, and cannot be told not to while a graph is captured.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.cache import cache_dir
from kernels.triton.evaluate import interpret
from kernels.triton.launch import architecture, compiling, interpreted

ENVIRONMENT = "FFNAS_TUNE"


_MOST_REGISTERS = 255
"""A thread can have no more."""


class Gemm(NamedTuple):
    """Rows, columns and depth of a block; parts of the epilogue; warps; pipeline stages."""

    rows: int
    columns: int
    depth: int
    split: int
    warps: int
    stages: int

    def constants(self, slots: int | None = None) -> dict[str, int]:
        """As arguments of `kernels.triton.launch.launch`; `slots` of an epilogue, None for none."""
        own = {"BM": self.rows, "BN": self.columns, "BK": self.depth, "warps": self.warps, "stages": self.stages}
        if slots is None:
            return own
        # left alone, ptxas may spill a few registers to reach the next occupancy step
        limit = {"maxnreg": _MOST_REGISTERS}
        return {**own, "SPLIT": self.split, **limit}


class RowBlocks(NamedTuple):
    """Rows of a tile, its two blocks of columns, warps, programs launched at most (backward), and most registers."""

    rows: int
    first: int
    second: int
    warps: int
    programs: int
    registers: int | None

    def limits(self) -> dict[str, int]:
        """As arguments of `kernels.triton.launch.launch`."""
        return {} if self.registers is None else {"maxnreg": self.registers}


_REASONED = {
    ("linear", 16): {
        0: (Gemm(128, 64, 64, 1, 8, 3), Gemm(128, 128, 64, 2, 8, 3)),
        2: (Gemm(128, 64, 64, 4, 8, 3), Gemm(128, 128, 64, 4, 8, 3)),
        6: (Gemm(64, 64, 64, 2, 8, 3), Gemm(64, 64, 64, 2, 8, 3)),
        16: (Gemm(32, 64, 64, 2, 8, 2), Gemm(32, 64, 64, 2, 8, 2)),
    },
    ("linear_bwd", 16): {
        0: (Gemm(128, 64, 64, 2, 8, 3), Gemm(128, 128, 64, 4, 8, 3)),
        2: (Gemm(128, 64, 64, 4, 8, 3), Gemm(128, 128, 64, 4, 8, 3)),
        6: (Gemm(64, 64, 64, 2, 8, 3), Gemm(64, 64, 64, 2, 8, 3)),
        16: (Gemm(32, 64, 64, 2, 8, 2), Gemm(32, 64, 64, 2, 8, 2)),
    },
    ("weight_grad", 16): {0: (Gemm(64, 64, 64, 1, 4, 3), Gemm(128, 128, 64, 1, 8, 3))},
    ("linear", 32): {
        0: (Gemm(64, 64, 32, 1, 8, 3), Gemm(64, 64, 32, 1, 8, 3)),
        2: (Gemm(64, 64, 32, 2, 8, 3), Gemm(64, 64, 32, 2, 8, 3)),
        6: (Gemm(64, 64, 32, 2, 8, 3), Gemm(64, 64, 32, 2, 8, 3)),
        16: (Gemm(32, 64, 32, 2, 8, 2), Gemm(32, 64, 32, 2, 8, 2)),
    },
    ("linear_bwd", 32): {
        0: (Gemm(64, 64, 32, 2, 8, 3), Gemm(64, 64, 32, 2, 8, 3)),
        2: (Gemm(64, 64, 32, 2, 8, 3), Gemm(64, 64, 32, 2, 8, 3)),
        6: (Gemm(64, 64, 32, 2, 8, 3), Gemm(64, 64, 32, 2, 8, 3)),
        16: (Gemm(32, 64, 32, 2, 8, 2), Gemm(32, 64, 32, 2, 8, 2)),
    },
    ("weight_grad", 32): {0: (Gemm(64, 64, 32, 1, 8, 3), Gemm(64, 64, 32, 1, 8, 3))},
}
"""(kernel, bits of the dtype) -> slots -> (narrow, wide); 0 slots: no program, or a generated one."""
_INTERPRETER = Gemm(32, 32, 32, 2, 1, 1)
"""Small enough that odd test sizes span several blocks."""

_tuned: dict[str, dict[str, list[int]]] = {}


class Family(NamedTuple):
    """A product kernel ("linear", "linear_bwd" or "weight_grad"), its dtype, slots, and whether its blocks are wide."""

    kind: str
    dtype: torch.dtype
    slots: int
    wide: bool

    def key(self) -> str:
        return f"{self.kind} {self.dtype} {self.slots} {'wide' if self.wide else 'narrow'}"


def family(kind: str, dtype: torch.dtype, slots: int, *sizes: int) -> Family:
    """The family of a product: wide where blocks of 128 waste at most a fifth of each of the given sizes."""
    return Family(kind, dtype, slots, all(-(-size // 128) * 128 <= 1.2 * size for size in sizes))


def shipped(of: Family) -> Gemm:
    """The configuration of a family that is used without timing: measured on this architecture, or reasoned."""
    if interpreted(interpret):
        return _INTERPRETER
    return measured(architecture()).get(of.key()) or reasoned(of)


def reasoned(of: Family) -> Gemm:
    """The configuration of a family where none was measured."""
    return _REASONED[of.kind, 8 * of.dtype.itemsize][of.slots][of.wide]


TILES = Path(__file__).parent / "tiles"
"""Folder of the measured configurations."""


@lru_cache
def measured(arch: int | None, folder: Path = TILES) -> dict[str, Gemm]:
    """Configurations by `Family.key`, of `folder`/sm_ARCH.json; none where there is no such file.

    Raises:
        ValueError: the file is not what `tiles_file` makes.
    """
    file = folder / f"sm_{arch}.json"
    if arch is None or not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    tiles = found.get("tiles") if isinstance(found, dict) else None
    if not isinstance(tiles, dict) or not all(_is_gemm(v) for v in tiles.values()):
        raise ValueError(f"{file}: not a file of measured tiles: write it with `python -m benchmarks.gpu_check`")
    return {key: Gemm(*value) for key, value in tiles.items()}


def tiles_file(tiles: dict[str, Gemm], **origin: object) -> str:
    """The text of a file that `measured` reads; `origin`: device and versions it was measured with."""
    lines = (f"  {json.dumps(key)}: {json.dumps(list(tiles[key]))}" for key in sorted(tiles))
    return f'{json.dumps(origin)[:-1]}, "tiles": {{\n' + ",\n".join(lines) + "\n}}\n"


def _is_gemm(value: object) -> bool:
    return isinstance(value, list) and len(value) == len(Gemm._fields) and all(type(v) is int and v > 0 for v in value)


def candidates(of: Family) -> list[Gemm]:
    """The shipped configuration first, and others of equal depth to be timed against it."""
    first = shipped(of)
    if interpreted(interpret):
        return [first, first._replace(rows=16)]
    base = reasoned(of)
    others = [base, base._replace(stages=2), base._replace(stages=4), base._replace(warps=4)]
    if of.slots <= 2 and of.dtype != torch.float32:
        others += [
            base._replace(rows=64, columns=64, warps=4),
            base._replace(rows=64, columns=128, warps=4),
            base._replace(rows=128, columns=64),
            base._replace(rows=128, columns=128),
            base._replace(rows=256, columns=64),
        ]
    return list(dict.fromkeys([first, *others]))


Choose = Callable[[Family, Callable[[Gemm], object]], Gemm]
_sweeping: ContextVar[Choose | None] = ContextVar("ffnas_tile_sweep", default=None)


@contextlib.contextmanager
def sweeping(choose: Choose) -> Iterator[None]:
    """In the block `choose(family, run)` decides on every configuration, and may run any of them before."""
    token = _sweeping.set(choose)
    try:
        yield
    finally:
        _sweeping.reset(token)


def chosen(of: Family, device: torch.device, run: Callable[[Gemm], object]) -> Gemm:
    """The configuration to use: shipped, remembered, or timed now.

    Args:
        of: the family.
        device: where the kernel runs.
        run: launches the kernel with a configuration on the caller's tensors, into outputs that are written again
            afterwards; called only where timing is due.
    """
    choose = _sweeping.get()
    if choose is not None:
        return choose(of, run)
    if device.type != "cuda" or compiling() or not _tunes(device):
        return shipped(of)
    file = _file(device)
    known = _load(file)
    if of.key() in known:
        return Gemm(*known[of.key()])
    if not due(of, device):
        return shipped(of)
    best = min(candidates(of), key=lambda c: _time(run, c))
    known[of.key()] = list(best)
    _save(file, known)
    return best


def due(of: Family, device: torch.device) -> bool:
    """Whether `chosen` would time candidates now."""
    if _sweeping.get() is not None:
        return True
    if device.type != "cuda" or compiling() or not _tunes(device):
        return False
    return of.key() not in _load(_file(device)) and not torch.cuda.is_current_stream_capturing()


def _tunes(device: torch.device) -> bool:
    wish = os.environ.get(ENVIRONMENT)
    if wish is not None:
        return wish != "0"
    return _capability(device) not in ((8, 0), (9, 0))


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _time(run: Callable[[Gemm], object], config: Gemm) -> float:
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
            if isinstance(found, dict) and all(_is_gemm(v) for v in found.values()):
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
    per_thread = 4 if backward or slots > 6 else 8
    warps = max(1, min(8, first // (32 * per_thread)))
    count = max(1, min(8, per_thread * 32 * warps // first))
    # left alone, ptxas aims at the next lower occupancy step (80, 128, 168 registers) and spills a few to get there
    registers = {0: 128, 2: 168, 6: 168}.get(slots, _MOST_REGISTERS) if backward and first <= 128 * warps else None
    return RowBlocks(count, first, second, warps, 512, registers)


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
    return max(1, min(8, tokens // 512))
