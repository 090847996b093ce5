"""Copies of a program's words on a device, made without waiting for the kernels queued there.

Rejected: `Tensor.to` on the current stream. From memory that is not pinned it waits for everything queued before it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device of a small CPU tensor; a CPU device gets the tensor itself.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if device.type == "cpu":
        return host
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a program was first used while a CUDA graph was captured: call it once before, or use a ProgramBuffer"
        )
    # a stream of its own: waiting for it waits for these few bytes, not for the kernels queued before them
    stream = _upload_stream(device)
    with torch.cuda.stream(stream):
        copy = host.pin_memory().to(device, non_blocking=True)
    stream.synchronize()
    return copy


@lru_cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
