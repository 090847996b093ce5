"""The CUDA backend: the CUDA C++ kernels (kernels.cuda), with Triton's products where Triton is installed.

A call takes one of two routes, decided by its device, dtypes, widths and flags:

    rows     products by `kernels.triton`, everything that works on whole rows by `kernels.cuda.rows`
    stack    the whole stack in one launch, `kernels.cuda.stack`

`FFNAS_CUDA_ROUTE` names the one asked first; "rows" where it does not. A call the first cannot serve takes the other.
Serves float32, bfloat16 and float16 on NVIDIA GPUs from sm_80 up; products in float32 never use tf32 on route stack.

A `kernels.triton.device_program.ProgramBuffer` holds the microcode of Triton's kernels. Route rows keeps Triton's row
kernels for calls that read one; route stack and grouped launches refuse them, since they would compute the buffer's
first program whatever it holds, in a captured graph too.

Importing this module touches no device; `load` looks for one, and compiles what is not in the cache.

Rejected: choosing the route by the number of tokens. `supports` and `saved_like` are asked while a graph is traced,
where it is not known.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.bounded import Bounded
from kernels.call import Backend, BackendUnavailable, FFNCall
from kernels.cuda import grouped, rows, stack
from kernels.cuda.library import is_emulated, library
from kernels.language.program import Flag
from kernels.language.validation import checked_words

if TYPE_CHECKING:
    from kernels.triton.device_program import DeviceProgram
    from kernels.triton.rows import Needs

ENVIRONMENT = "FFNAS_CUDA_ROUTE"
ROUTES = ("rows", "stack")
_OLDEST = (8, 0)
"""Compute capability the kernels need."""


def load() -> CudaBackend:
    """Finds or builds the library. Raises `BackendUnavailable` without a CUDA device, or where it cannot be had."""
    if not is_emulated():
        if not torch.cuda.is_available():
            raise BackendUnavailable("there is no CUDA device")
        status = library(torch.device("cuda")).ffnas_cuda_probe()
        if status:
            raise BackendUnavailable(
                f"its CUDA runtime cannot start (CUDA error {status}; 35: the driver is older than the toolkit it was"
                " built with: set CUDA_HOME to an older one)"
            )
    if wanted_route() not in ROUTES:
        raise BackendUnavailable(f"{ENVIRONMENT}={wanted_route()!r} is none of {', '.join(ROUTES)}")
    return CudaBackend()


def wanted_route() -> str:
    """The value of FFNAS_CUDA_ROUTE, read at every call: it must not change between forward and backward."""
    return os.environ.get(ENVIRONMENT, ROUTES[0])


class CudaBackend(Backend):
    """See the module."""

    name = "cuda"

    def __init__(self) -> None:
        self._device_reasons: dict[torch.device, str | None] = {}
        self._answers: Bounded[tuple[object, ...], str] = Bounded(4096)

    @property
    def saved_layout(self) -> int:
        """The routes save different tensors: graphs compiled for one must not be reused by the other."""
        return 1 + (wanted_route() == ROUTES[1]) + (2 if self._triton is None else 0)

    @cached_property
    def _triton(self) -> ModuleType | None:
        if importlib.util.find_spec("triton") is None:
            return None
        return importlib.import_module("kernels.triton.ffn")

    def supports(self, call: FFNCall) -> str | None:
        reason = self._device_reason(call.x.device)
        if reason is None:
            answer = self._route(call)
            reason = None if answer in ROUTES else answer
        return reason

    def supports_group(self, calls: Sequence[FFNCall]) -> str | None:
        if any(_buffer(call, backward=False) is not None for call in calls):
            return "one launch for many stacks does not read a ProgramBuffer"
        return self._device_reason(calls[0].x.device) or grouped.supports(calls)

    def forward(self, call: FFNCall, save: bool) -> tuple[Tensor, list[Tensor]]:
        with _on(call.x.device):
            if self._route(call) == "stack":
                _refuse_buffer(call, backward=False)
                return stack.forward(call, save)
            return self._ffn.forward(call, save, self._program_of(call, save), _Rows())

    def saved_like(self, call: FFNCall) -> list[Tensor]:
        return stack.saved_like(call) if self._route(call) == "stack" else self._ffn.saved_like(call)

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
            if self._route(call) == "stack":
                _refuse_buffer(call, backward=True)
                return stack.backward(call, grad_out, saved, needs)
            return self._ffn.backward(call, grad_out, saved, needs, self._program_of(call, True, needs), _Rows())

    @property
    def _ffn(self) -> Any:
        assert self._triton is not None
        return self._triton

    @property
    def _program_of(self) -> Any:
        return importlib.import_module("kernels.triton.specialize").program_of

    def _route(self, call: FFNCall) -> str:
        """The first route that can serve the call, or why none can; remembered by all that it depends on."""
        parallel, wanted = call.flags & Flag.PARALLEL, wanted_route()
        key = (wanted, call.x.device, call.x.dtype, call.compute_dtype, call.hidden, call.inner, parallel)
        answer = self._answers.get(key)
        if answer is None:
            order = sorted(ROUTES, key=lambda route: route != wanted)
            reasons = {route: self._route_reason(route, call) for route in order}
            served = next((route for route, reason in reasons.items() if reason is None), None)
            answer = served or "; ".join(f"{route}: {why}" for route, why in reasons.items())
            self._answers[key] = answer
        return answer

    def _route_reason(self, route: str, call: FFNCall) -> str | None:
        if route == "stack":
            return stack.supports(call)
        return "triton is not installed" if self._triton is None else rows.supports(call)

    def _device_reason(self, device: torch.device) -> str | None:
        if device.type == "cpu" and is_emulated():
            return None
        if device.type != "cuda":
            return f"it serves CUDA tensors, x is on {device}"
        if device not in self._device_reasons:
            capability = torch.cuda.get_device_capability(device)
            old = f"it needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
            self._device_reasons[device] = None if capability >= _OLDEST else old
        return self._device_reasons[device]


class _Rows:
    """The `rows` of `kernels.triton.ffn` made of CUDA kernels."""

    def forward(
        self,
        call: FFNCall,
        layer: int,
        x: Tensor,
        y: Tensor,
        y2: Tensor | None,
        device_program: DeviceProgram,
        save_stats: bool,
    ) -> tuple[Tensor, Tensor | None]:
        return _implementation(call, backward=False).forward(call, layer, x, y, y2, device_program, save_stats)

    def backward(
        self,
        call: FFNCall,
        layer: int,
        grad_out: Tensor,
        x: Tensor,
        y: Tensor | None,
        y2: Tensor | None,
        stats: Tensor | None,
        device_program: DeviceProgram,
        needs: Needs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        own = _implementation(call, backward=True)
        return own.backward(call, layer, grad_out, x, y, y2, stats, device_program, needs)


def _implementation(call: FFNCall, *, backward: bool) -> Any:
    """`kernels.cuda.rows`, or Triton's where the program sits in a buffer that only those can read."""
    if _buffer(call, backward=backward) is None:
        return rows
    from kernels.triton.rows import TritonRows

    return TritonRows()


def _buffer(call: FFNCall, *, backward: bool) -> DeviceProgram | None:
    """The content of the buffer that stands for the call's program; None where there is none."""
    module = sys.modules.get("kernels.triton.device_program")
    if module is None:  # nobody has made one
        return None
    device = call.x.device
    bound = module.bound_buffer(call.program, device)
    return bound or module.active_buffer(checked_words(call.program), device, backward=backward)


def _refuse_buffer(call: FFNCall, *, backward: bool) -> None:
    if _buffer(call, backward=backward) is not None:
        raise RuntimeError(
            f"{ENVIRONMENT}={wanted_route()}: the program is in a ProgramBuffer, which route stack does not read:"
            f" it would go on computing the buffer's first program; use FFNAS_BACKEND=triton or {ENVIRONMENT}=rows"
        )


def _on(device: torch.device) -> torch.cuda.device:
    """Makes x's device current while a call runs; does nothing for a CPU tensor."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)
