"""How kernels of this backend are launched: on the current device and stream, or only compiled.

`launch` is the one place that calls Triton. In a `compile_only` block it compiles what it would have launched and runs
nothing, so that the driver of `kernels.triton.ffn` itself, run over meta tensors, says which kernels a call needs:
compile checks and background compilation use that, for any architecture and without a GPU. `recorded` only lists the
launches, to be compiled later, each once.

`statistics` counts what was launched and compiled in this process.

Rejected: listing the kernels and their signatures a second time for compilation; such a list is wrong the first time
a kernel gets another argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
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
        """Starts counting compilations; a listener that is there already goes on hearing of them.

        A kernel of ours that is built while a graph is captured ends the capture with a reason: it would be loaded onto
        the device there, which a capture forbids, with an error that names nothing.
        """
        if self._hooked:
            return
        self._hooked = True
        earlier = triton.knobs.compilation.listener

        def listen(**event: Any) -> None:
            self.variants += 1
            self.compilations += not event.get("cache_hit", False)
            if earlier is not None:
                earlier(**event)
            kernel = getattr(event.get("src"), "fn", None)
            if is_capturing() and not compiling() and str(getattr(kernel, "__module__", "")).startswith(_PACKAGE):
                name = getattr(kernel, "__name__", kernel)
                raise RuntimeError(
                    f"kernel {name} was first used while a CUDA graph was captured: run the call once before, with the"
                    " same ProgramBuffer if there is one"
                )

        triton.knobs.compilation.listener = listen


_PACKAGE = __name__.rpartition(".")[0]


def is_capturing() -> bool:
    """Whether the current stream is being captured into a graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


statistics = Statistics()

Compiled = Callable[[Any, Any, dict[str, Any]], None]


@dataclass(frozen=True)
class Launch:
    """A launch that did not happen.

    Attributes:
        kernel: the Triton function.
        grid, args, warps, stages, constants: as given to `launch`.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    warps: int
    stages: int
    constants: dict[str, Any]

    def build(self) -> Any:
        """The compiled kernel for the current target (`target`, or the current device)."""
        sizes = {"num_warps": self.warps, "num_stages": self.stages}
        return self.kernel.warmup(*self.args, grid=self.grid, **sizes, **OPTIONS, **self.constants)

    def run(self) -> None:
        """Launches it, on the current device and stream."""
        statistics.hook()
        statistics.launches += 1
        self.kernel[self.grid](*self.args, num_warps=self.warps, num_stages=self.stages, **OPTIONS, **self.constants)

    def key(self) -> str:
        """Text that is the same for launches of one compiled kernel.

        Integers count by what Triton may specialize on: 1, multiples of 16, width; tensors by dtype and alignment.
        """
        parts = [f"{self.kernel.__module__}:{self.kernel.__name__}", f"{self.warps} {self.stages}"]
        parts += [_kind(p, a) for p, a in zip(self.kernel.params, self.args, strict=False)]
        return " ".join([*parts, *(f"{k}={_constant(v)}" for k, v in sorted(self.constants.items()))])


def _kind(parameter: Any, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{'' if value.data_ptr() % 16 == 0 else '?'}"
    if isinstance(value, int) and not isinstance(value, bool):
        width = 32 if -(2**31) <= value < 2**31 else 64
        return f"i{width}" if parameter.do_not_specialize else f"i{width}/{value == 1}/{value % 16 == 0}"
    return "float" if isinstance(value, float) else repr(value)


def _constant(value: Any) -> str:
    return f"{value.__module__}:{value.__name__}" if hasattr(value, "__name__") else repr(value)


_instead: ContextVar[Callable[[Launch], None] | None] = ContextVar("ffnas_launch_instead", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int, **constants: Any) -> None:
    """kernel[grid](*args, **constants) on the current device and stream; see `compile_only` and `recorded`."""
    instead = _instead.get()
    if instead is not None:
        instead(Launch(kernel, grid, args, warps, stages, constants))
        return
    statistics.hook()
    statistics.launches += 1
    kernel[grid](*args, num_warps=warps, num_stages=stages, **OPTIONS, **constants)


def compiling() -> bool:
    """Whether kernels are only compiled, or listed, here."""
    return _instead.get() is not None


def recorded(run: Callable[[], object]) -> list[Launch]:
    """What `run` would launch, in order; nothing is launched or compiled."""
    launches: list[Launch] = []
    with _launching(launches.append):
        run()
    return launches


def watched(run: Callable[[], object]) -> list[Launch]:
    """What `run` launches in this thread, in order; everything is launched, with the tiles it has without timing."""
    launches: list[Launch] = []

    def also(asked: Launch) -> None:
        asked.run()
        launches.append(asked)

    with _launching(also):
        run()
    return launches


@contextmanager
def _launching(instead: Callable[[Launch], None]) -> Iterator[None]:
    token = _instead.set(instead)
    try:
        yield
    finally:
        _instead.reset(token)


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


def architecture() -> int | None:
    """Compute capability times ten that kernels are launched or compiled for here; None where there is no device."""
    if isinstance(driver._active, _TargetOnly):
        return driver._active.target.arch
    if not torch.cuda.is_available():
        return None
    return _capability(torch.cuda.current_device())


@lru_cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextmanager
def target(arch: int) -> Iterator[None]:
    """Triton compiles for this compute capability times ten (80 or 90) in the block, without a device.

    Replaces Triton's driver for the whole process meanwhile: for command-line tools and worker processes.
    """
    earlier = driver._active
    driver.set_active(_TargetOnly(arch))  # type: ignore[arg-type]
    try:
        yield
    finally:
        driver._active = earlier


@contextmanager
def compile_only(seen: Compiled, arch: int | None = None) -> Iterator[None]:
    """Kernels launched in this block are compiled, not run.

    Args:
        seen: called with (kernel, compiled kernel, constants) for each.
        arch: compile for it (`target`); None: for the current device.
    """

    def build(asked: Launch) -> None:
        built = asked.build()
        seen(asked.kernel, built, {"warps": asked.warps, "stages": asked.stages, **asked.constants})

    statistics.hook()
    with _launching(build), nullcontext() if arch is None else target(arch):
        yield
