"""Parts of batches brought to the device one ahead of their use.

On CUDA: the next part is pinned and its copy queued on a side stream before the present one is handed out, so the copy
runs beside the step's kernels and the host never waits. Two parts are in flight at most. PyTorch's caching host
allocator keeps a pinned buffer until its copy is over and then uses it again: that is the double buffer. Device memory
belongs to the side stream's pool; `record_stream` keeps it until the consumer's kernels are done with it.

On the CPU: the parts as they are.

Rejected: `torch.utils.data.DataLoader(pin_memory=True)`. Its pinning thread and worker processes cost more than the
gather they would hide (0.1 ms for 32 x 128 tokens), and its copy stays on the consumer's stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from engine.data.batching import Batch
from engine.data.parts import Part


def prefetch(parts: Iterator[Part], device: torch.device) -> Iterator[Part]:
    """The same parts, in the same order, on `device`; on CUDA `parts` is read one ahead."""
    if device.type != "cuda":
        for part in parts:
            yield replace(part, batch=part.batch.to(device))
        return
    side = torch.cuda.Stream(device)
    ahead = _load(parts, device, side)
    while ahead is not None:
        consumer = torch.cuda.current_stream(device)
        consumer.wait_stream(side)
        ready = replace(ahead, batch=_recorded(ahead.batch, consumer))
        ahead = _load(parts, device, side)
        yield ready


def _load(parts: Iterator[Part], device: torch.device, side: torch.cuda.Stream) -> Part | None:
    """The next part with its copies queued on `side`; None at the end."""
    part = next(parts, None)
    if part is None:
        return None
    pinned = part.batch.map(torch.Tensor.pin_memory)
    with torch.cuda.stream(side):
        return replace(part, batch=pinned.to(device, non_blocking=True))


def _recorded(batch: Batch, stream: torch.cuda.Stream) -> Batch:
    """`batch`, its memory kept until the work queued on `stream` is done."""

    def record(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(stream)
        return tensor

    return batch.map(record)
