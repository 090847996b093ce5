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

from kernels.backends.reference_tensor_ops import ReferenceTensorOps
from kernels.cache import cache_dir
from kernels.call import Backend, BackendUnavailable, FFNCall, TensorOps

if TYPE_CHECKING:
    from types import ModuleType

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST = (8, 0)
"""Compute capability the kernels need."""
_MOST_HEADS = 65535
"""Programs along a grid's second axis."""


def load() -> TritonBackend:
    """Imports the kernels. Raises `BackendUnavailable` without Triton, or without a CUDA device and the interpreter."""
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("triton is not installed: pip install triton")
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreter and not torch.cuda.is_available():
        raise BackendUnavailable("there is no CUDA device")
    names = ("ffn", "specialize", "losses", "attention")
    try:
        modules = [importlib.import_module(f"kernels.triton.{name}") for name in names]
    except OSError as error:  # generated source is written when it is imported (`kernels.triton.generated`)
        raise BackendUnavailable(f"cannot write to the cache {cache_dir()} ({error}): set FFNAS_CACHE") from error
    return TritonBackend(*modules, interpreter=interpreter)


class TritonBackend(Backend):
    """See the module."""

    name = "triton"
    saved_layout = 1

    def __init__(
        self,
        ffn: ModuleType,
        specialize: ModuleType,
        losses: ModuleType,
        attention: ModuleType,
        *,
        interpreter: bool,
    ) -> None:
        self._ffn: Any = ffn
        self._specialize: Any = specialize
        self._interpreter = interpreter
        self._capable: dict[torch.device, str | None] = {}
        self.tensor_ops = TritonTensorOps(self, losses, attention)

    def supports(self, call: FFNCall) -> str | None:
        reason = self.refuses(call.x.device, (call.x.dtype, call.compute_dtype))
        if reason is not None:
            return reason
        if call.x.dtype not in _DTYPES or call.compute_dtype not in _DTYPES:
            return f"it serves float32, float16 and bfloat16, not {call.x.dtype} with {call.compute_dtype} products"
        return None

    def forward(self, call: FFNCall, save: bool) -> tuple[Tensor, list[Tensor]]:
        with _on(call.x.device):
            return self._ffn.forward(call, save, self._specialize.program_of(call, save))

    def saved_like(self, call: FFNCall) -> list[Tensor]:
        return self._ffn.saved_like(call)

    def backward(
        self,
        call: FFNCall,
        grad_out: Tensor,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
        overwrite: bool = False,
    ) -> list[Tensor]:
        del overwrite
        with _on(call.x.device):
            program = self._specialize.program_of(call, True, needs)
            return self._ffn.backward(call, grad_out, saved, needs, program)

    def refuses(self, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
        """Why tensors on this device cannot be served, or of these dtypes under the interpreter; None: they can."""
        if not self._interpreter:
            return self._device_reason(device) if device.type == "cuda" else f"it serves CUDA tensors, x is on {device}"
        if device.type != "cpu":
            return f"Triton's interpreter serves CPU tensors, x is on {device}"
        if torch.bfloat16 in dtypes:
            return "Triton's interpreter does not compute bfloat16 correctly"
        return None

    def _device_reason(self, device: torch.device) -> str | None:
        if device not in self._capable:
            capability = torch.cuda.get_device_capability(device)
            self._capable[device] = (
                None if capability >= _OLDEST else f"it needs compute capability 8.0, {device} has {capability}"
            )
        return self._capable[device]


class TritonTensorOps(TensorOps):
    """The losses and attention of this backend; linear layers are PyTorch's.

    Args:
        backend: whose devices these are.
        losses, attention: `kernels.triton.losses` and `kernels.triton.attention`.
    """

    def __init__(self, backend: TritonBackend, losses: ModuleType, attention: ModuleType) -> None:
        self._backend, self._losses, self._attention = backend, losses, attention

    def supports(self, tensors: Sequence[Tensor]) -> str | None:
        dtypes = [t.dtype for t in tensors]
        for t in tensors:
            reason = self._backend.refuses(t.device, dtypes)
            if reason is not None:
                return reason
            if t.dtype not in _DTYPES:
                return f"its losses and attention serve float32, float16 and bfloat16, got {t.dtype}"
            most = self._attention.LARGEST_HEAD[t.dtype.itemsize]
            if t.ndim == 4 and t.shape[-1] > most:
                return f"its attention serves {str(t.dtype)[6:]} heads up to {most} wide, got {t.shape[-1]}"
            if t.ndim == 4 and t.shape[0] * t.shape[1] > _MOST_HEADS:
                return f"its attention serves {_MOST_HEADS} heads of all samples at most, got {t.shape[0] * t.shape[1]}"
        return None

    linear = staticmethod(ReferenceTensorOps.linear)

    def score_mse(self, q_s: Sequence[Tensor], *rest: Any) -> tuple[Tensor, list[Tensor]]:
        with _on(q_s[0].device):
            return self._losses.score_mse(q_s, *rest)

    def hidden_mse(self, h_s: Sequence[Tensor], *rest: Any) -> tuple[Tensor, list[Tensor]]:
        with _on(h_s[0].device):
            return self._losses.hidden_mse(h_s, *rest)

    def soft_cross_entropy(self, student: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor]]:
        with _on(student.device):
            return self._losses.soft_cross_entropy(student, *rest)

    def attention_forward(self, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        with _on(q.device):
            return self._attention.forward(q, *rest)

    def attention_backward(self, grad_context: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        with _on(grad_context.device):
            return self._attention.backward(grad_context, *rest)


def _on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device: that of x while a call runs. Does nothing for a CPU tensor."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)
