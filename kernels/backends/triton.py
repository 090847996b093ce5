"""The Triton backend: kernels.triton, for NVIDIA GPUs from sm_80 up.

Serves float32, float16 and bfloat16, and autocast between them. float64 goes to the next backend.

Under `TRITON_INTERPRET=1` (Triton's interpreter, for checks without a GPU) it serves CPU tensors, too, where asked by
name; not bfloat16 products, which that interpreter gets wrong without saying so.

Importing this module imports neither Triton nor touches a device; `load` does the first, and looks for the second.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.backends.base import BackendUnavailable, FFNCall

if TYPE_CHECKING:
    from types import ModuleType

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST = (8, 0)
"""Compute capability the kernels need."""


def load() -> TritonBackend:
    """Imports the kernels. Raises `BackendUnavailable` without Triton, or without a CUDA device and the interpreter."""
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("triton is not installed: pip install triton")
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreter and not torch.cuda.is_available():
        raise BackendUnavailable("there is no CUDA device")
    return TritonBackend(importlib.import_module("kernels.triton.ffn"), interpreter)


class TritonBackend:
    """See the module; the methods are those of `kernels.backends.base.Backend`."""

    name = "triton"
    saved_layout = 1
    """Goes up with every change of what `forward` saves: graphs compiled for another layout must not be reused."""

    def __init__(self, ffn: ModuleType, interpreter: bool) -> None:
        self._ffn: Any = ffn
        self._interpreter = interpreter
        self._capable: dict[torch.device, str | None] = {}

    def supports(self, call: FFNCall) -> str | None:
        device = call.x.device
        if self._interpreter:
            if device.type != "cpu":
                return f"Triton's interpreter serves CPU tensors, x is on {device}"
            if torch.bfloat16 in (call.x.dtype, call.compute_dtype):
                return "Triton's interpreter does not compute bfloat16 correctly"
        elif device.type != "cuda":
            return f"it serves CUDA tensors, x is on {device}"
        else:
            reason = self._device_reason(device)
            if reason is not None:
                return reason
        if call.x.dtype not in _DTYPES or call.compute_dtype not in _DTYPES:
            return f"it serves float32, float16 and bfloat16, not {call.x.dtype} with {call.compute_dtype} products"
        return None

    def forward(self, call: FFNCall, save: bool) -> tuple[Tensor, list[Tensor]]:
        with _on(call.x.device):
            return self._ffn.forward(call, save)

    def saved_like(self, call: FFNCall) -> list[Tensor]:
        return self._ffn.saved_like(call)

    def backward(self, call: FFNCall, grad_out: Tensor, saved: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
        with _on(call.x.device):
            return self._ffn.backward(call, grad_out, saved, needs)

    def _device_reason(self, device: torch.device) -> str | None:
        if device not in self._capable:
            capability = torch.cuda.get_device_capability(device)
            self._capable[device] = (
                None if capability >= _OLDEST else f"it needs compute capability 8.0, {device} has {capability}"
            )
        return self._capable[device]


def _on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device: that of x while a call runs. Does nothing for a CPU tensor."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)
