"""The machine of `kernels.triton.microcode`, run over tiles inside a Triton kernel.

`interpret` has the interface every evaluator has, so that kernels take it, or a generated one, as a constant:

    evaluate(code, x, a, b, g, columns, hidden, SEGMENT, SLOTS, GRADIENTS, OUTPUTS) -> (value, dx, da, db)

    code            the device words of the program (int32)
    x, a, b, g      float32 tiles of one shape: the input registers; any tile where the segment does not read one
    columns         the tile's column numbers, broadcastable to it; hidden is H (only `select` reads them)
    SEGMENT         which of the nine, counted from where `code` points to
    SLOTS           slots the machine has
    GRADIENTS       whether the segment may contain derivatives
    OUTPUTS         bits 0..3: which of value, dx, da, db the caller uses; the others come back as any tile

All branches depend on words read from memory, equal for all threads: a step costs its operation, a few scalar
instructions, and the moves of what it fetches and stores. Tiles are kept small by the callers (16 elements a thread or
fewer), since every tile of the state stays in registers.

Rejected: selects instead of branches. Every step would pay for all operators.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are tensors, pointers and scalars of any type
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.branches import dual, unary
from kernels.triton.elementary import max_factor, maximum, selected
from kernels.triton.microcode import DERIVATIVE, FIRST_UNARY

# Kernels may read module constants only as `tl.constexpr`.
_FIRST_UNARY = tl.constexpr(FIRST_UNARY)
_FIRST_DUAL = tl.constexpr(FIRST_UNARY + DERIVATIVE)


@triton.jit
def _input(r, x, a, b, g, acc):
    if r < 2:
        if r == 0:
            t = x
        else:
            t = a
    elif r < 4:
        if r == 2:
            t = b
        else:
            t = g
    elif r == 4:
        t = tl.full(acc.shape, 1.0, tl.float32)
    else:
        t = acc
    return t


@triton.jit
def _pick4(r, t0, t1, t2, t3):
    if r < 2:
        if r == 0:
            t = t0
        else:
            t = t1
    elif r == 2:
        t = t2
    else:
        t = t3
    return t


@triton.jit
def _plain(op, acc, v, columns, hidden, GRADIENTS: tl.constexpr):
    if op < 4:
        if op == 1:
            r = acc + v
        elif op == 2:
            r = acc * v
        else:
            r = maximum(acc, v)
    elif op < 7:
        outside = tl.where(op == 4, 0.0, tl.where(op == 5, 1.0, float("-inf")))
        r = tl.where(columns < hidden, acc, outside)
    elif GRADIENTS:
        if op == 7:
            r = max_factor(acc, v)
        elif op == 8:
            r = selected(acc, v)
        else:
            r = acc
    else:
        r = acc
    return r


@triton.jit
def _register(
    r,
    x,
    a,
    b,
    g,
    acc,
    s0,
    s1,
    s2,
    s3,
    s4,
    s5,
    s6,
    s7,
    s8,
    s9,
    s10,
    s11,
    s12,
    s13,
    s14,
    s15,
    SLOTS: tl.constexpr,
):
    """The tile in register r of the microcode."""
    if r < 8:
        t = _input(r, x, a, b, g, acc)
    elif SLOTS == 2:
        if r == 8:
            t = s0
        else:
            t = s1
    elif r < 12:
        t = _pick4(r - 8, s0, s1, s2, s3)
    elif SLOTS == 6:
        if r == 12:
            t = s4
        else:
            t = s5
    elif r < 16:
        t = _pick4(r - 12, s4, s5, s6, s7)
    elif r < 20:
        t = _pick4(r - 16, s8, s9, s10, s11)
    else:
        t = _pick4(r - 20, s12, s13, s14, s15)
    return t


@triton.jit
def interpret(
    code, x, a, b, g, columns, hidden,
    SEGMENT: tl.constexpr, SLOTS: tl.constexpr, GRADIENTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """See the module; SLOTS is an element of `microcode.SLOT_VARIANTS`."""
    # The state: acc, v and the slots, tiles of one shape. Slots start as acc only because a name needs a value before
    # the loop; no program reads one it has not written (`kernels.language.validation`).
    entry = code + SEGMENT * 8
    count = tl.load(entry + 1)
    acc = _input(tl.load(entry + 6), x, a, b, g, x)
    v = acc
    s0 = acc
    s1 = acc
    s2 = acc
    s3 = acc
    s4 = acc
    s5 = acc
    s6 = acc
    s7 = acc
    s8 = acc
    s9 = acc
    s10 = acc
    s11 = acc
    s12 = acc
    s13 = acc
    s14 = acc
    s15 = acc
    words = entry + tl.load(entry)
    word = tl.load(words)
    for step in tl.range(0, count, num_stages=1):
        following = tl.load(words + step + 1)  # one ahead: its latency hides behind the operation
        op = word & 255
        r = ((word >> 8) & 255) - 1
        if r >= 0:
            v = _register(
                r, x, a, b, g, acc, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, SLOTS
            )
        if op == 0:
            acc = v
        elif op < _FIRST_UNARY:
            acc = _plain(op, acc, v, columns, hidden, GRADIENTS)
        elif op < _FIRST_DUAL:
            acc = unary(op, acc)
        elif GRADIENTS:
            acc, v = dual(op, v, acc)
        target = ((word >> 16) & 255) - 1
        if target >= 0:
            kept = acc
            if GRADIENTS:  # noqa: SIM102 - only the outer condition is known to the compiler
                if word >= 1 << 24:
                    kept = v
            if target == 0:
                s0 = kept
            elif target == 1:
                s1 = kept
            elif SLOTS > 2:
                if target == 2:
                    s2 = kept
                elif target == 3:
                    s3 = kept
                elif target == 4:
                    s4 = kept
                elif target == 5:
                    s5 = kept
                elif SLOTS > 6:
                    if target == 6:
                        s6 = kept
                    elif target == 7:
                        s7 = kept
                    elif target == 8:
                        s8 = kept
                    elif target == 9:
                        s9 = kept
                    elif target == 10:
                        s10 = kept
                    elif target == 11:
                        s11 = kept
                    elif target == 12:
                        s12 = kept
                    elif target == 13:
                        s13 = kept
                    elif target == 14:
                        s14 = kept
                    else:
                        s15 = kept
        word = following
    value = acc
    dx = acc
    da = acc
    db = acc
    if OUTPUTS & 1:
        r = tl.load(entry + 2)
        value = _register(
            r, x, a, b, g, acc, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, SLOTS
        )
    if OUTPUTS & 2:
        r = tl.load(entry + 3)
        dx = _register(r, x, a, b, g, acc, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, SLOTS)
    if OUTPUTS & 4:
        r = tl.load(entry + 4)
        da = _register(r, x, a, b, g, acc, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, SLOTS)
    if OUTPUTS & 8:
        r = tl.load(entry + 5)
        db = _register(r, x, a, b, g, acc, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, SLOTS)
    return value, dx, da, db
