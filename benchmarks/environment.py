"""What a result was measured on: recorded beside every number."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

from kernels.backends.cpu import CpuBackend
from kernels.dispatch import load_backend


def describe() -> dict[str, object]:
    """Processor, threads, versions, instruction sets in use and the date (UTC)."""
    backend = load_backend("cpu")
    isas = (
        {str(t).removeprefix("torch."): backend.isa(t) for t in (torch.float32, torch.bfloat16)}
        if isinstance(backend, CpuBackend)
        else {"unavailable": str(backend)}
    )
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instruction_sets": isas,
    }


def processor() -> str:
    """The processor's own name, or the machine type where the system does not tell."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return " ".join(names[0].split()) if names else platform.processor() or platform.machine()
