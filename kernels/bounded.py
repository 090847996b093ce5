"""Bounds of caches whose keys are expressions or programs: a search makes thousands of them, each seen once or twice.

`Bounded` is a dictionary that forgets what was used longest ago. Rejected for it: `functools.lru_cache`. It keys on all
arguments of a function, tensors included, and fills an entry at once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

EXPRESSIONS = 2048
"""Entries of a cache keyed by expressions. An entry holds its expression's tree, 1 to 2 KB; what is asked again soon is
asked within one proposal, whose pool has some hundred expressions."""

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
