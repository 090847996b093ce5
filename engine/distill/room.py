"""How many students memory holds at once, by formula.

While a student is trained it needs its weights, their gradients and AdamW's two moments, four float32 numbers per
parameter; one that is in the middle of a step also what backward reads. In numbers per token, with H hidden width, E
embedding factor and d the inner width of a layer's FFNs:

    embedding        3E + 3H: concatenation (E without neighbours), projection, sum, LayerNorm
    attention        4H + 4a: input, queries, keys, values, context, projection, sum, LayerNorm; no S x S scores; a = H
                     with all heads, h H / heads with h; nothing without heads
    each FFN         3H + 2d: input, both products, sum

Of students that are trained side by side `workers` are in the middle of a step at the same time. Only `SHARE` of the
free memory is planned for: the teacher's answers, batches, allocators and other programs need some too. Where that is
still too much, `engine.distill.population` takes students out as memory runs out.

How many fit decides when a student is trained, never which, and not its score.

Rejected: training one student and measuring; its peak shows up only in the step that allocates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from engine.architecture.architecture import Architecture
from engine.architecture.params import count_parameters
from engine.architecture.shape import ModelShape, inner_width

SHARE = 0.7
"""Of the free memory that students may take."""
_BYTES = 4
_MEMINFO = Path("/proc/meminfo")
_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
_STAT = Path("/sys/fs/cgroup/memory.stat")


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had on a device at this moment; None where the system does not tell.

    On the host what Linux calls available, or what the process's control group leaves, if that is less; on CUDA what
    the driver has and what PyTorch keeps for itself without using it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = _MEMINFO.read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        limit = _LIMIT.read_text().strip()
        return free if limit == "max" else min(free, int(limit) - int(_USED.read_text()) + _cached_files())
    except OSError:  # no control groups
        return free


def _cached_files() -> int:
    """What the control group counts as used for files read earlier, and gives up where memory is asked for."""
    try:
        lines = (line.split() for line in _STAT.read_text().splitlines())
        return next((int(value) for name, value in lines if name == "inactive_file"), 0)
    except (OSError, ValueError):
        return 0


def state_bytes(arch: Architecture, shape: ModelShape) -> int:
    """Weights, gradients and moments of a student in training."""
    return 4 * _BYTES * count_parameters(arch, shape)


def step_bytes(arch: Architecture, shape: ModelShape, tokens: int) -> int:
    """What a step on `tokens` tokens keeps for backward."""
    hidden = shape.hidden_size
    numbers = shape.embedding_inputs + 3 * hidden
    for layer in arch.layers:
        width = shape.attention_width(layer.heads)
        numbers += 4 * (hidden + width) if width else 0
        numbers += layer.stack * (3 * hidden + 2 * inner_width(layer.ratio, shape.ffn_size))
    return _BYTES * tokens * numbers


def students_at_once(
    archs: Sequence[Architecture], shape: ModelShape, tokens: int, workers: int, free: int | None
) -> int:
    """How many of `archs`, from the first on, are trained together: at least one.

    Args:
        archs: at least one.
        shape: of the students.
        tokens: per batch.
        workers: students in the middle of a step at the same time, at most.
        free: bytes (`free_bytes`); None: all of them.
    """
    if free is None:
        return len(archs)
    states, steps = 0, 0
    for count, arch in enumerate(archs):
        states += state_bytes(arch, shape)
        steps = max(steps, step_bytes(arch, shape, tokens))
        if count and states + min(workers, count + 1) * steps > SHARE * free:
            return count
    return len(archs)
