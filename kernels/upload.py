"""Copies of programs on a device: made without waiting for the kernels queued there, dropped when nothing reads them.

A copy is made on a stream of its own, in a thread of its own: PyTorch's memory pools for graphs (those of
`torch.compile(mode="reduce-overhead")`, `torch.cuda.use_mem_pool`) take whatever their thread allocates, and a copy
outlives the graph whose pool was open when its program was first used.

Rejected: `Tensor.to` on the current stream. From memory that is not pinned it waits for everything queued before it.
Rejected: `Tensor.record_stream` for every stream a copy is read on, at every launch. Copies are dropped so rarely that
waiting for the whole device costs less.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch import Tensor

V = TypeVar("V")


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device of a small CPU tensor; a CPU device gets the tensor itself.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if device.type == "cpu":
        return host
    if capturing(device):
        raise RuntimeError(
            "a program was first used while a CUDA graph was captured: call it once before, or use a ProgramBuffer"
        )
    return _thread().submit(_copied, host, device).result()


def _copied(host: Tensor, device: torch.device) -> Tensor:
    # a stream of its own: waiting for it waits for these few bytes, not for the kernels queued before them
    stream = _upload_stream(device)
    with torch.cuda.stream(stream):
        copy = host.pin_memory().to(device, non_blocking=True)
    stream.synchronize()
    return copy


@lru_cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "ffnas-upload")


@lru_cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Copies(Generic[V]):
    """Device copies, or what is made of them, by device and key.

    Of more than `size` the less recently used half is dropped. Kernels on any stream may still be reading them, so
    the device is waited for first. What was handed out while a graph was captured is kept for good: the graph reads
    it at every replay.

    Args:
        size: most copies, besides those of graphs.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[tuple[torch.device, Hashable], V] = OrderedDict()
        self._captured: set[tuple[torch.device, Hashable]] = set()
        self._lock = Lock()

    def get(self, device: torch.device, key: Hashable, make: Callable[[], V]) -> V:
        """The copy, made at its first use."""
        at = (device, key)
        with self._lock:
            if at in self._kept:
                self._kept.move_to_end(at)
            else:
                self._kept[at] = make()
                if len(self._kept) - len(self._captured) > self.size:
                    self._forget_half()
            if capturing(device):
                self._captured.add(at)
            return self._kept[at]

    def __len__(self) -> int:
        return len(self._kept)

    def _forget_half(self) -> None:
        old = [at for at in self._kept if at not in self._captured][: self.size // 2]
        for device in {device for device, _ in old if device.type == "cuda"}:
            torch.cuda.synchronize(device)
        for at in old:
            del self._kept[at]
