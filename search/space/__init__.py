"""The search space: rules of expressions, random valid expressions, mutations, the parameter budget, encoding."""

from search.space.space import NoNeighbour, SearchSpace

__all__ = ["NoNeighbour", "SearchSpace"]
