"""How kernels of this backend are launched: on the current device and stream, or only compiled.

`launch` is the one place that calls Triton. In a `compile_only` block it compiles what it would have launched and runs
nothing, so that the driver of `kernels.triton.ffn` itself, run over meta tensors, says which kernels a call needs:
compile checks and background compilation use that, for any architecture and without a GPU.

`statistics` counts what was launched and compiled in this process.

Rejected: listing the kernels and their signatures a second time for compilation; such a list is wrong the first time
a kernel gets another argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction

OPTIONS = {"enable_fp_fusion": False}
"""For every kernel; see `kernels.triton.elementary`."""


@dataclass
class Statistics:
    """Counters of this process.

    Attributes:
        launches: kernels launched.
        variants: kernels built in this process: from Triton's cache on disk, or compiled.
        compilations: those that were compiled.
    """

    launches: int = 0
    variants: int = 0
    compilations: int = 0
    _hooked: bool = field(default=False, repr=False)

    def hook(self) -> None:
        """Starts counting compilations; a listener that is there already goes on hearing of them."""
        if self._hooked:
            return
        self._hooked = True
        earlier = triton.knobs.compilation.listener

        def listen(**event: Any) -> None:
            self.variants += 1
            self.compilations += not event.get("cache_hit", False)
            if earlier is not None:
                earlier(**event)

        triton.knobs.compilation.listener = listen


statistics = Statistics()

Compiled = Callable[[Any, Any, dict[str, Any]], None]
_compile_only: ContextVar[Compiled | None] = ContextVar("ffnas_compile_only", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int, **constants: Any) -> None:
    """kernel[grid](*args, **constants) on the current device and stream; only compiled in a `compile_only` block."""
    statistics.hook()
    seen = _compile_only.get()
    if seen is not None:
        built = kernel.warmup(*args, grid=grid, num_warps=warps, num_stages=stages, **OPTIONS, **constants)
        seen(kernel, built, {"warps": warps, "stages": stages, **constants})
        return
    statistics.launches += 1
    kernel[grid](*args, num_warps=warps, num_stages=stages, **OPTIONS, **constants)


def compiling() -> bool:
    """Whether kernels are only compiled here."""
    return _compile_only.get() is not None


def interpreted(kernel: Any) -> bool:
    """Whether Triton's interpreter runs `kernel` (TRITON_INTERPRET=1 when it was defined)."""
    return isinstance(kernel, InterpretedFunction)


class _TargetOnly:
    """What Triton asks its driver for while it compiles, answered without a device."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return -self.target.arch  # a key for Triton's caches that no device has

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_only(seen: Compiled, arch: int | None = None) -> Iterator[None]:
    """Kernels launched in this block are compiled, not run.

    Args:
        seen: called with (kernel, compiled kernel, constants) for each.
        arch: compile for this compute capability times ten (80 or 90) without a device, and replace Triton's driver
            for the whole process meanwhile: for command-line tools and worker processes. None: for the current device.
    """
    token = _compile_only.set(seen)
    earlier = driver._active
    if arch is not None:
        driver.set_active(_TargetOnly(arch))  # type: ignore[arg-type]
    try:
        yield
    finally:
        driver._active = earlier
        _compile_only.reset(token)
