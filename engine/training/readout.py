"""Numbers on their way from the device to the host, without anybody waiting for them.

On CUDA the values are copied into pinned memory behind the work queued so far, and an event says when they are there;
on the CPU they are there at once. Rejected: `.tolist()` on the spot, which stops the host, and with it the queue, until
every kernel has run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Readout:
    """A copy of `values` as of now.

    Args:
        values: any shape, on any device; may be changed afterwards.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = values.clone()

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> Any:
        """The values as nested lists."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
