"""Canonical form."""

from __future__ import annotations

from kernels.expression import Expression


def canonicalize(expr: Expression) -> Expression:
    """Canonical form of `expr`."""
    return expr
