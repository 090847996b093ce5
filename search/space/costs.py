"""What architectures of one student cost: parameters, FLOPs, activation memory, latency.

All by formula or from a table, in microseconds, so that every proposal can be costed. Rejected: measuring candidates as
they come; proposals would depend on the clock, and a resumed run would not be the undisturbed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engine.architecture.architecture import Architecture
from engine.architecture.flops import count_flops
from engine.architecture.memory import MIB, peak_activation_bytes
from engine.architecture.params import count_parameters
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from engine.latency.table import LatencyTable

SCORE = "score"
UNITS = {"params": "", "flops": "", "memory_mb": "MiB", "latency_ms": "ms"}
"""Costs an architecture can have, with their units."""
OBJECTIVES = {"params": "params", "flops": "flops", "memory": "memory_mb", "latency": "latency_ms"}
"""Objectives beside the score, and the cost each makes small."""


@dataclass(frozen=True)
class Costs:
    """Costs of architectures.

    Attributes:
        shape: sizes of the student; `fit_dense` counts as parameters where it has a teacher width.
        policy: width policy.
        sequence_length, batch_size: of the pass that FLOPs (per sequence) and memory are counted for.
        table: latency under its own conditions, None where latency is not asked for.
    """

    shape: ModelShape
    policy: str = "truncate"
    sequence_length: int = 128
    batch_size: int = 1
    table: LatencyTable | None = None

    def of(self, arch: Architecture) -> dict[str, float]:
        """Every cost that is known, by the names of `UNITS`."""
        names = [name for name in UNITS if name != "latency_ms" or self.table is not None]
        return {name: self.cost(name, arch) for name in names}

    def cost(self, name: str, arch: Architecture) -> float:
        """One cost; `memory_mb` in MiB, `latency_ms` in milliseconds.

        Raises:
            UserError: latency without a table.
        """
        if name == "params":
            return count_parameters(arch, self.shape)
        if name == "flops":
            return count_flops(arch, self.shape, self.sequence_length)
        if name == "memory_mb":
            sizes = {"sequence_length": self.sequence_length, "batch_size": self.batch_size}
            return peak_activation_bytes(arch, self.shape, **sizes, policy=self.policy) / MIB
        if self.table is None:
            raise UserError("latency: there is no latency table: build one with ffnas latency --build-table")
        return self.table.predict(arch)

    def objectives(self, names: list[str]) -> list[Callable[[Architecture], float]]:
        """A function for each of these objectives beside the score, all to be made small."""
        return [partial(self.cost, OBJECTIVES[n]) for n in names if n != SCORE]


def text(name: str, value: float) -> str:
    """A cost for people: `15 737 724 parameters`, `3.05 GFLOPs`, `7.9 ms`."""
    if name == "params":
        return f"{value:,.0f} parameters".replace(",", " ")
    if name == "flops":
        unit, size = next((u, s) for u, s in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if value >= s or u == "k")
        return f"{value / size:.3g} {unit}FLOPs"
    return f"{value:.3g} {UNITS[name]}"
