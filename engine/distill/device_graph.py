"""What captured steps (`engine.distill.graphs`) need of a device: a graph, and programs it reads from device memory.

Both are protocols, so that the logic around them is tested without a device. Rejected: asking `torch.cuda.is_available`
there; what cannot be replaced by a stand-in is only ever tested by users.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from engine.student.ffn import FFNPlan
from kernels import dispatch

if TYPE_CHECKING:
    from kernels.triton.device_program import ProgramBuffer


class Graph(Protocol):
    """How a step is captured; `CudaGraph`, or a stand-in."""

    def warm(self, step: Callable[[], None]) -> None:
        """Runs the step."""
        ...

    def capture(self, step: Callable[[], None]) -> None:
        """Records the step without running it."""
        ...

    def replay(self) -> None:
        """Runs what was recorded."""
        ...


class CudaGraph:
    """`torch.cuda.CUDAGraph` of the current device.

    All graphs allocate from one pool: they are replayed one after the other, and leave nothing in it that is still
    needed (results and optimizer state are outside), so that a hundred of them need the memory of the largest.
    """

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def warm(self, step: Callable[[], None]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)

    def capture(self, step: Callable[[], None]) -> None:
        # other threads (prefetching, logging) go on allocating and asking for events meanwhile
        pool = _pool(torch.cuda.current_device())
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            step()

    def replay(self) -> None:
        self._graph.replay()


@lru_cache
def _pool(device: int) -> Any:
    del device
    return torch.cuda.graph_pool_handle()


class Programs(Protocol):
    """Where the programs of a slot's layers are.

    `plans` is what the slot's model runs, asked for after every `load`.
    """

    plans: tuple[FFNPlan, ...]

    def load(self, plans: Sequence[FFNPlan]) -> None:
        """Puts in the programs of another student of the family."""
        ...


class DevicePrograms:
    """A `ProgramBuffer` per layer: what graphs read, whoever captured them.

    Where another backend than Triton serves, there are no buffers: a graph runs its own programs, and those alone are
    its family.

    Args:
        plans: of the first student.
        device: a CUDA device.
    """

    SLOTS = 6
    """Slots every kernel has at least, so that most programs of equal flags fit one graph."""

    def __init__(self, plans: Sequence[FFNPlan], device: torch.device) -> None:
        self._buffers: list[ProgramBuffer] = []
        self.plans = tuple(plans)
        if dispatch.preferred_backend("cuda") != "triton":
            return
        from kernels.triton.device_program import ProgramBuffer

        self._buffers = [ProgramBuffer(p.program, device, slots=self.SLOTS) for p in plans]
        self.plans = tuple(p._replace(program=b.bound) for p, b in zip(plans, self._buffers, strict=True))

    def load(self, plans: Sequence[FFNPlan]) -> None:
        for buffer, plan in zip(self._buffers, plans, strict=bool(self._buffers)):
            buffer.copy_(plan.program)

    @classmethod
    def family(cls, plan: FFNPlan) -> Hashable:
        """What programs that may take each other's place have in common: on other backends, all their words."""
        words = plan.program.words
        if dispatch.preferred_backend("cuda") != "triton":
            return words
        from kernels.triton.microcode import slot_variants

        return int(plan.program.flags), tuple(max(cls.SLOTS, n) for n in slot_variants(words))
