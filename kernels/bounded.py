"""A dictionary that forgets what was used longest ago, for caches whose keys are programs: a search makes thousands.

Rejected: `functools.lru_cache`. It keys on all arguments of a function, tensors included, and fills an entry at once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Bounded(OrderedDict[K, V]):
    """At most `size` entries. `get` and `[]` count as use.

    Args:
        size: most entries, >= 1.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def get(self, key: K, default: V | None = None) -> V | None:  # type: ignore[override]
        """The entry, now the youngest, or `default`."""
        if key not in self:
            return default
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self.size:
            self.popitem(last=False)
