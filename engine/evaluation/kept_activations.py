"""Activations kept between computations that share them, within a budget of bytes.

An entry is *pinned* while the walk that made it is below it and will need it again, *idle* afterwards. When room is
needed, idle entries go first: the largest, of those the deepest, of those the one unused for longest (what lies deep
is shared by few). Then pinned ones, the shallowest first: a depth-first walk returns to it last. Whoever misses an
entry computes it again.

Rejected: copying entries to slower memory. On the CPU there is none; on an accelerator most activations are computed
faster than they are copied back.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False, slots=True)
class _Entry:
    tensor: Tensor
    size: int
    depth: int
    pinned: bool
    used: int


class ActivationStore:
    """Tensors by key, at most `budget_bytes` of them.

    Args:
        budget_bytes: what the kept tensors may occupy; 0 keeps nothing.

    Attributes:
        used_bytes, peak_bytes: occupied now, and at most so far.
        misses: times a pinned entry was given up.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes={budget_bytes}: must be >= 0")
        self.budget_bytes = budget_bytes
        self.used_bytes = self.peak_bytes = self.misses = 0
        self._entries: dict[Hashable, _Entry] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor, or None where it was never kept or was given up."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._clock += 1
        entry.used = self._clock
        return entry.tensor

    def put(self, key: Hashable, tensor: Tensor, depth: int) -> None:
        """Keeps a tensor, pinned, giving up others for it; does nothing if it is larger than the whole budget."""
        self.drop(key)
        size = tensor.numel() * tensor.element_size()
        if size > self.budget_bytes:
            return
        while self.used_bytes + size > self.budget_bytes:
            self._give_up()
        self._clock += 1
        self._entries[key] = _Entry(tensor, size, depth, True, self._clock)
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def pin(self, key: Hashable) -> None:
        """Marks an entry, if it is there, as needed by the walk in progress."""
        if key in self._entries:
            self._entries[key].pinned = True

    def release(self, key: Hashable) -> None:
        """Marks an entry, if it is there, as idle."""
        if key in self._entries:
            self._entries[key].pinned = False

    def drop(self, key: Hashable) -> None:
        """Forgets an entry, if it is there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.used_bytes -= entry.size

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self.used_bytes = 0

    def _give_up(self) -> None:
        key, entry = min(self._entries.items(), key=lambda item: _order(item[1]))
        self.misses += entry.pinned
        self.drop(key)


def _order(entry: _Entry) -> tuple[int, ...]:
    if entry.pinned:
        return (1, entry.depth, entry.used, 0)
    return (0, -entry.size, -entry.depth, entry.used)
