"""Whether a stack of FFNs may be continued from a shorter one without changing a bit, found out by trying.

In exact arithmetic n + 1 FFNs in one call are n in one call and one in another. In floating point they are where a
kernel computes a row in the same way whatever was computed before it in the same call: a property of a library, a
machine and a shape, never of the data. So it is tried once per shape, on seeded random input, and taken only if every
bit agrees.

Rejected: a table of libraries known to behave. It would be wrong on the next machine, silently.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from engine.student.ffn import FFNPlan, FFNStack

_VALUES = 4096
"""Values compared, at least: equal by chance is then out of the question."""
_ROWS = 64


class Continuation:
    """Answers by trial, each remembered; on one device, in one precision (autocast is the caller's)."""

    def __init__(self) -> None:
        self._known: dict[Hashable, bool] = {}

    def is_exact(self, stack: FFNStack, plan: FFNPlan, like: Tensor) -> bool:
        """Whether two FFNs in one call are one and one more, bit for bit, on input shaped like `like` [..., H]."""
        if plan.stack == 1:
            return True
        rows = like.shape[:-1].numel()  # all of them for Kronecker weights: how those are multiplied depends on it
        shape = (rows if plan.kron else min(_ROWS, rows), like.shape[-1])
        key = (*shape, plan.program.digest, plan.inner, plan.kron)
        if key not in self._known:
            self._known[key] = _agree(stack, plan, shape, like)
        return self._known[key]


def _agree(stack: FFNStack, plan: FFNPlan, shape: tuple[int, ...], like: Tensor) -> bool:
    """Tried on at least `_VALUES` seeded normal values."""
    generator = torch.Generator().manual_seed(0)
    compared = 0
    while compared < _VALUES:
        x = torch.randn(shape, generator=generator, dtype=torch.float32).to(like.device, like.dtype)
        whole = stack.part(x, plan, 0, 2)
        if not torch.equal(whole, stack.part(stack.part(x, plan, 0, 1), plan, 1, 2)):
            return False
        compared += whole.numel()
    return True
