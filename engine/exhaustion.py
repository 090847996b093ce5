"""Lack of memory, by whatever name it comes.

CUDA raises `torch.OutOfMemoryError`; PyTorch's CPU allocator a `RuntimeError` with a text of its own, the C++ kernels
another, Python and NumPy `MemoryError`. Rejected: catching every `RuntimeError` of a candidate as "invalid", as the
published search does; wrong shapes and real defects then pass for failed candidates.
"""

from __future__ import annotations

import gc

import torch

_TEXTS = (
    "can't allocate memory",  # c10's CPU allocator
    "not enough memory",  # the same, on other platforms
    "backend: out of memory",  # kernels.backends
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def free_memory() -> None:
    """Gives back what nobody refers to any more, on the host and on CUDA devices."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
