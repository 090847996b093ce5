"""Compiling every interpreting kernel of a shape family ahead of its first call.

    compile_ahead(call)

After it, no expression compiles anything in calls with tensors of its shapes, strides and dtypes: the kernels come
from the forms an expression can take (serial or parallel, which segments there are, which of them read x) and from the
number of slots, not from the expression. `programs` gives one expression of every form.

Without it each kernel is compiled, or loaded from Triton's cache on disk, at its first use.

Rejected: shipping compiled kernels. They are tied to a Triton version, a driver and an architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from kernels.call import FFNCall
from kernels.language.lowering import lower
from kernels.language.program import Program
from kernels.triton.microcode import SLOT_VARIANTS
from kernels.triton.recipe import compile_recipe, recipe


def programs() -> Iterator[Program]:
    """One program of every form: pre, mid and post with and without operators, mid and post with and without x."""
    for pre, mid, post in product(("x", "tanh(x)"), ("{}", "gelu({})", "mul({},x)"), ("{}", "tanh({})", "add({},x)")):
        yield lower(post.format(f"linear({mid.format(f'linear({pre},wb1)')},wb2)"))
    for first, second, post in product(("x", "tanh(x)"), ("x", "sigmoid(x)"), ("{}", "mul({},x)")):
        yield lower(post.format(f"add(gelu(linear({first},wb1)),linear({second},wb2))"))


def compile_ahead(like: FFNCall, *, training: bool = True, arch: int | None = None) -> int:
    """Compiles what calls with such tensors can need.

    Args:
        like: a call as they will be. Its program does not matter, and of p_drop only whether it is 0.
        training: whether backward will run, with gradients for every input.
        arch: see `kernels.triton.recipe.compile_recipe`; None compiles for the device of x, whichever it is.

    Returns:
        How many kernels were asked for, repetitions included; 0 where tensors are not 16-byte aligned, for which
        kernels are compiled at their first use.
    """
    asked = 0

    def count(*_: object) -> None:
        nonlocal asked
        asked += 1

    device = like.x.device
    for program in programs():
        if not program.rule.allows(like.hidden, like.inner):
            continue
        call = replace(like, program=program.tensor, flags=int(program.flags))
        passes = [recipe(call, False, None)]
        if training:
            passes += [recipe(call, True, None), recipe(call, True, [True] * (1 + len(call.parameters)))]
        for made, slots in product(passes, SLOT_VARIANTS):
            if made is not None:
                with torch.cuda.device(device.index if device.type == "cuda" else -1):
                    compile_recipe(program.words, made, arch, count, generated=False, slots=slots)
    return asked
