"""Triton source generated from one program: its segments as straight-line code.

The source comes from running a program's microcode (`kernels.triton.microcode`) on names instead of tiles: the same
operations in the same order as the interpreting machine, so that both tiers give the same bits.

Rejected: one generated kernel per place of use. Kernels take the evaluator as a constant; only that differs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import lru_cache

from kernels.language.operators import OPERATORS
from kernels.language.program import Segment
from kernels.triton.generated import load_module
from kernels.triton.microcode import (
    ADD,
    DERIVATIVE,
    MAX,
    MAX_FACTOR,
    MUL,
    SELECTED,
    SELECTS,
    MicroSegment,
    run_steps,
    translate,
)

_UNARY = {row.opcode: row.name for row in OPERATORS.values() if row.arity == 1}
_PLAIN = {
    ADD: "{0} + {1}",
    MUL: "{0} * {1}",
    MAX: "maximum({0}, {1})",
    MAX_FACTOR: "max_factor({0}, {1})",
    SELECTED: "selected({0}, {1})",
}
_SELECT = "tl.where(columns < hidden, {0}, {1})"
_OUTSIDE = ("0.0", "1.0", 'float("-inf")')
_HEADER = '''"""Segments of one program (ffnas, generated; see kernels.triton.codegen): {name}."""

import triton
import triton.language as tl

from kernels.triton.elementary import {imports}
'''


def program_hash(words: tuple[int, ...]) -> str:
    """24 hexadecimal digits that stand for a validated program."""
    return hashlib.sha256(",".join(map(str, words)).encode()).hexdigest()[:24]


def source(words: tuple[int, ...]) -> str:
    """The module's text for a validated program: one function per segment, and `evaluate`, which chooses among them."""
    names = sorted({*_UNARY.values(), *(f"{n}_dual" for n in _UNARY.values()), "max_factor", "maximum", "selected"})
    bodies = [_function(k, segment) for k, segment in zip(Segment, translate(words), strict=True)]
    text = "\n\n".join([*bodies, _chooser()])
    used = [n for n in names if re.search(rf"\b{n}\(", text)]
    imports = "(\n" + "".join(f"    {n},\n" for n in used) + ")" if used else "selected  # noqa: F401"
    return _HEADER.format(name=program_hash(words), imports=imports) + "\n\n" + text


def _function(k: Segment, segment: MicroSegment) -> str:
    lines: list[str] = []

    def assign(expression: str, *, pair: bool = False) -> tuple[str, str]:
        name = f"t{len(lines)}"
        lines.append(f"    {name}, {name}v = {expression}" if pair else f"    {name} = {expression}")
        return name, f"{name}v"

    def plain(template: str) -> Callable[[str, str], tuple[str, str]]:
        return lambda acc, v: (assign(template.format(acc, v))[0], v)

    operations: dict[int, object] = {op: plain(template) for op, template in _PLAIN.items()}
    for n, outside in enumerate(_OUTSIDE):
        operations[SELECTS + n] = plain(_SELECT.format("{0}", outside))
    for opcode, name in _UNARY.items():
        operations[opcode] = plain(name + "({0})")
        operations[opcode + DERIVATIVE] = lambda acc, v, name=name: assign(f"{name}_dual({v}, {acc})", pair=True)
    outputs = run_steps(segment, ["x", "a", "b", "g", "tl.full(x.shape, 1.0, tl.float32)"], operations)
    values = ", ".join("x" if o is None else str(o) for o in outputs)
    head = f"@triton.jit\ndef _{k.name.lower()}(x, a, b, g, columns, hidden):\n"
    return head + "".join(f"{line}\n" for line in lines) + f"    return {values}\n"


def _chooser() -> str:
    text = "@triton.jit\ndef evaluate(\n    code, x, a, b, g, columns, hidden,\n"
    text += "    SEGMENT: tl.constexpr, SLOTS: tl.constexpr, GRADIENTS: tl.constexpr, OUTPUTS: tl.constexpr,\n):\n"
    for k in Segment:
        text += f"    {'if' if k == 0 else 'elif'} SEGMENT == {int(k)}:\n"
        text += f"        value, dx, da, db = _{k.name.lower()}(x, a, b, g, columns, hidden)\n"
    return text + "    return value, dx, da, db\n"


@lru_cache(maxsize=1024)
def load(words: tuple[int, ...]) -> Callable[..., object]:
    """The generated `evaluate` of a validated program; written and imported at the first call, then cached.

    Raises:
        OSError: the cache folder cannot be written.
    """
    return load_module(f"ffnas_generated_{program_hash(words)}", source(words)).evaluate
