"""The precision passes run in: bf16 autocast, and the one way to do without it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

_in_fp32: contextvars.ContextVar[bool] = contextvars.ContextVar("in_fp32", default=False)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast on `device` when `precision` is `"bf16"`, otherwise (and in `without_autocast`) nothing."""
    if precision == "bf16" and not _in_fp32.get():
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Within, `autocast` does nothing: students and losses run in fp32, whatever their precision."""
    token = _in_fp32.set(True)
    try:
        yield
    finally:
        _in_fp32.reset(token)
