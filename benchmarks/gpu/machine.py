"""What is measured on, and its ceilings: a large copy, a large product, and rows of 540 against rows of 544 columns."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.ffn_cases import DTYPES
from benchmarks.gpu.records import Line, Records
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.sides import graphed, rates, seconds

STUB = "STUB, NOT A MEASUREMENT"


def run(records: Records, scale: Scale, out: Path) -> None:
    del out
    records.case("environment", lambda: environment(scale))
    for dtype in dict.fromkeys((scale.dtype, "fp32", "fp16")):
        records.case(f"ceilings {dtype}", lambda dtype=dtype: ceilings(dtype, scale))
    for columns in (scale.hidden, scale.hidden + 4):
        records.case(f"rows of {columns}", lambda columns=columns: rows_of(columns, scale))


def environment(scale: Scale) -> Line:
    """Device, driver and versions."""
    import transformers
    import triton

    found: Line = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "device": STUB, "torch": torch.__version__,
        "triton": triton.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "transformers": transformers.__version__, "processors": os.cpu_count(),
    }  # fmt: skip
    if scale.rehearses:
        return found
    device = torch.cuda.get_device_properties(0)
    limits = {
        "multiprocessors": device.multi_processor_count, "memory_gib": round(device.total_memory / 2**30),
        "cache_mib": device.L2_cache_size / 2**20, "shared_kib": device.shared_memory_per_block_optin / 1024,
    }  # fmt: skip
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm", "--format=csv,noheader"]
    found |= {"device": device.name, "capability": [device.major, device.minor], **limits}
    found["driver, clock"] = _output(query)
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    found["nvcc"] = (_output([nvcc, "--version"]).splitlines() or ["none"])[-1]
    return found


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def ceilings(dtype: str, scale: Scale) -> Line:
    """FLOP/s of a product and bytes/s of a copy: what floors are computed from."""
    flops, bandwidth = rates(DTYPES[dtype], scale.device)
    return {"dtype": dtype, "flops": flops, "bandwidth": bandwidth}


def rows_of(columns: int, scale: Scale) -> Line:
    """Seconds of a square product and of a copy of rows this wide, by PyTorch."""
    dtype = DTYPES[scale.dtype]
    x, w = (torch.randn(n, columns, device=scale.device).to(dtype) for n in (scale.tokens, columns))
    y, copy = torch.empty_like(x), torch.empty_like(x)
    found: Line = {"tokens": scale.tokens}
    for name, run in {"product": lambda: torch.mm(x, w.T, out=y), "copy": lambda: copy.copy_(x)}.items():
        replay = graphed(lambda run=run: [run() for _ in range(10)], "eager", scale.device)
        found[name] = min(seconds(replay, 5, scale.device) / 50 for _ in range(3))
    return found
