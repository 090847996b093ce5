"""The sentinel: do the fused kernels agree with plain PyTorch on this machine, for this model, on this data?

At the beginning of a phase its first batch is computed twice, with the backends as chosen and with `reference`, from
the same random numbers: loss terms and gradients, or logits. Where they differ by more than rounding one line says so,
and the reference serves from there on. Generators are put back and gradients dropped: no result changes. On a CPU a
phase of fewer than `SHORT` steps is left out once one of its kind (on text, on the task, ...) has been compared.

Limits (relative): float32 losses 1e-4, gradients 1e-2 of their norm; bf16 losses 3e-2, gradients 0.3. Above a limit in
bf16 the reference in fp32 decides: kernels may be `ROUNDING` times as far from it as the reference in bf16 is. Where
the limits come from: docs/decisions/0018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.autocast import without_autocast
from engine.errors import UserError
from engine.exhaustion import free_memory, is_out_of_memory
from engine.loss_terms import LOGGED
from engine.objective import KDLoss
from engine.states import EncoderStates
from kernels.dispatch import ORDER, preferred_backend, retire, use_backend

ROUNDING = 2.0
"""How many times farther than the bf16 reference, from the fp32 one, results above a limit may be."""

LIMITS = {"fp32": (1e-4, 1e-2), "bf16": (3e-2, 0.3)}
"""Per precision the largest relative difference of a loss (or of logits), and of the gradient."""

FLOOR = 1e-6
"""Losses and gradient norms below this are compared absolutely: a difference of nothing from nothing is no defect."""

SHORT = 20
"""Steps of a phase on a CPU below which one comparison of its kind is enough for a run."""

_Measured = tuple[str, Tensor, bool]
"""What it is, its value (flat, float64), and whether it is a gradient."""


@dataclass(frozen=True)
class Sentinel:
    """Compares backends and falls back to the reference.

    Args:
        device: where the models run.
        precision: `"fp32"` or `"bf16"`, of the student.
        note: takes the one line about a disagreement.
        compared: kinds of phases that were compared.
    """

    device: torch.device
    precision: str
    note: Callable[[str], None]
    compared: set[str] = field(default_factory=set)

    def wants(self, kind: str, steps: int) -> bool:
        """Whether a phase of `steps` steps is to be compared; `kind` is what it trains on, with which losses."""
        return steps >= SHORT or kind not in self.compared or self.device.type != "cpu"

    def training(
        self, where: str, model: nn.Module, loss: Callable[[], KDLoss], *, kind: str = "", steps: int = SHORT
    ) -> bool:
        """Whether losses and gradients of one batch agree, as far as they are compared; falls back if not.

        Args:
            where: the phase, for the message.
            model: in the mode it trains in.
            loss: the objective on the phase's first batch; called twice.
            kind, steps: of the phase, see `wants`.
        """
        if not self.wants(kind, steps):
            return True
        self.compared.add(kind)
        parameters = [p for p in model.parameters() if p.requires_grad]

        def measure() -> list[_Measured]:
            terms = loss()
            gradients = torch.autograd.grad(terms.total, parameters, allow_unused=True)
            flat = torch.cat([g.detach().flatten().double() for g in gradients if g is not None])
            values = [(f"loss {n}", getattr(terms, n).detach().double().flatten(), False) for n in LOGGED]
            return [*values, ("gradient", flat, True)]

        return self._compare(where, measure)

    def scoring(self, where: str, logits: Callable[[], Tensor]) -> bool:
        """Whether the logits of one batch agree; falls back if not."""
        return self._compare(where, lambda: [("logits", logits().detach().double().flatten(), False)])

    def _compare(self, where: str, measure: Callable[[], list[_Measured]]) -> bool:
        name = preferred_backend(self.device.type)
        if name == "reference":
            return True
        try:
            own = self._undisturbed(measure)
            with use_backend("reference"):
                reference = self._undisturbed(measure)
            suspects = self._suspects(own, reference)
            if suspects and self.precision == "bf16":
                suspects = self._beyond_rounding(suspects, own, reference, measure)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            free_memory()  # the reference needs more: an unchecked phase is better than none
            self.note(f"sentinel: {where}: no memory for the comparison with the reference, left out")
            return True
        if not suspects:
            return True
        what, (apart, limit) = next(iter(suspects.items()))
        self._fall_back(name, f"{where}: {what} differs by {apart:.1e}, allowed is {limit:.1g}")
        return False

    def _suspects(self, own: list[_Measured], reference: list[_Measured]) -> dict[str, tuple[float, float]]:
        """What differs by more than its limit: difference and limit."""
        differences = {}
        for (what, value, is_gradient), (_, expected, _) in zip(own, reference, strict=True):
            limit = LIMITS[self.precision][is_gradient]
            apart = _difference(value, expected)
            if apart > limit:
                differences[what] = (apart, limit)
        return differences

    def _beyond_rounding(
        self,
        suspects: dict[str, tuple[float, float]],
        own: list[_Measured],
        reference: list[_Measured],
        measure: Callable[[], list[_Measured]],
    ) -> dict[str, tuple[float, float]]:
        """Those of the suspects that rounding to bf16 does not explain: distance from fp32 and what is allowed."""
        with use_backend("reference"), without_autocast():
            exact = self._undisturbed(measure)
        beyond = {}
        for (what, value, _), (_, rounded, _), (_, expected, _) in zip(own, reference, exact, strict=True):
            if what not in suspects:
                continue
            apart, allowed = _difference(value, expected), ROUNDING * _difference(rounded, expected)
            if not apart <= allowed:
                beyond[what] = (apart, allowed)
        return beyond

    def _fall_back(self, name: str, problem: str) -> None:
        for backend in {*ORDER[self.device.type], name} - {"reference"}:
            retire(backend, "its results differ from the reference's on this machine")
        self.note(
            f"sentinel: backend {name!r} disagrees with the reference in {problem}; the reference is used from here on"
            " (slower, right). Please report it with the output of `ffnas doctor`"
        )

    def _undisturbed(self, measure: Callable[[], list[_Measured]]) -> list[_Measured]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return measure()


def check_teacher(name: str, states: EncoderStates) -> None:
    """Raises `UserError` unless every answer of the teacher is finite."""
    parts: dict[str, Sequence[Tensor]] = {
        "embeddings": [states.embeddings],
        "hidden states": states.hidden,
        "queries": states.queries,
        "keys": states.keys,
        "logits": [] if states.logits is None else [states.logits],
    }
    for what, tensors in parts.items():
        if not all(t.isfinite().all().item() for t in tensors):
            raise UserError(
                f"teacher {name!r}: its {what} are NaN or infinite on the first batch: its weights are damaged, or"
                " too large for bf16 (try --teacher_precision fp32)"
            )


def _difference(value: Tensor, expected: Tensor) -> float:
    """||value - expected|| / ||expected||, 0 where both are equally not finite, inf where one is."""
    if value.shape != expected.shape:
        return math.inf
    finite = expected.isfinite()
    if not torch.equal(finite, value.isfinite()):
        return math.inf
    value, expected = value[finite], expected[finite]
    return float((value - expected).norm() / expected.norm().clamp_min(FLOOR))
