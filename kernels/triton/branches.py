"""How a Triton kernel chooses a unary operator by its number: branches generated from the operator table.

    unary(op, a)      f(a)                     op: the operator's opcode
    dual(op, a, g)    (f'(a) * g, f(a))        op: its opcode + `microcode.DERIVATIVE`

Both are binary trees of comparisons, four deep for eleven operators: a chain would compare up to eleven times a step.
The last leaf answers for every number above it; there are none, since `kernels.triton.microcode` translates only
opcodes of the table.

Rejected: a recursive Triton function over a tuple of functions. Triton does not hash functions inside tuples, so a
kernel would be taken from its cache after an operator had changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from types import ModuleType

from kernels.language.operators import OPERATORS, Operator
from kernels.triton import elementary
from kernels.triton.generated import load_module
from kernels.triton.microcode import DERIVATIVE

_HEAD = '''"""Choosing an operator by its number (ffnas, generated; see kernels.triton.branches)."""

import triton
import triton.language as tl  # noqa: F401 - Triton's interpreter looks for it

from kernels.triton.elementary import (
{imports}
)


@triton.jit
def unary(op, a):
{unary}
    return f


@triton.jit
def dual(op, a, g):
{dual}
    return d, f
'''


def source(rows: Sequence[Operator]) -> str:
    """The text of the module for these unary operators, in the order of their opcodes.

    Raises:
        ImportError: `kernels.triton.elementary` lacks one of their functions.
    """
    names = sorted(name for row in rows for name in (row.name, f"{row.name}_dual"))
    missing = [name for name in names if not hasattr(elementary, name)]
    if missing:
        raise ImportError(f"kernels/triton/elementary.py has no {', '.join(missing)}: every unary operator needs both")
    return _HEAD.format(
        imports="\n".join(f"    {name}," for name in names),
        unary="\n".join(_tree(rows, 0, lambda row: f"f = {row.name}(a)")),
        dual="\n".join(_tree(rows, DERIVATIVE, lambda row: f"d, f = {row.name}_dual(a, g)")),
    )


def _tree(rows: Sequence[Operator], offset: int, leaf: Callable[[Operator], str]) -> list[str]:
    """Lines that run the leaf of the row whose opcode + offset is `op`."""
    if len(rows) == 1:
        return [f"    {leaf(rows[0])}"]
    middle = (len(rows) + 1) // 2
    low, high = (_tree(half, offset, leaf) for half in (rows[:middle], rows[middle:]))
    inner = [*(f"    {line}" for line in low), "    else:", *(f"    {line}" for line in high)]
    return [f"    if op < {rows[middle].opcode + offset}:", *inner]


def _load() -> ModuleType:
    rows = sorted((row for row in OPERATORS.values() if row.arity == 1), key=lambda row: row.opcode)
    text = source(rows)
    return load_module(f"ffnas_operators_{hashlib.sha256(text.encode()).hexdigest()[:24]}", text)


_MODULE = _load()
unary = _MODULE.unary
dual = _MODULE.dual
