"""The search space: rules of expressions, random valid expressions, mutations, the parameter budget, encoding.

Names are resolved on first use (PEP 562), so that checking a configuration loads no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.space.space import NoNeighbour, SearchSpace

__all__ = ["NoNeighbour", "SearchSpace"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'search.space' has no attribute {name!r}")
    from search.space import space

    return getattr(space, name)
