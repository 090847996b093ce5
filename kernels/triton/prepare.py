"""Compiling every interpreting kernel of a shape family ahead of its first call.

    prepare(x, w1, b1, w2, b2, ln_weight, ln_bias, p_drop=0.1)

After it, no expression compiles anything in calls with tensors of those shapes, strides and dtypes: the kernels come
from the forms an expression can take (serial or parallel, which segments there are, which of them read x) and from the
number of slots, not from the expression. `programs` gives one expression of every form.

Without it each kernel is compiled, or loaded from Triton's cache on disk, at its first use.

Rejected: shipping compiled kernels. They are tied to a Triton version, a driver and an architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

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


def prepare(
    x: Tensor,
    w1: Sequence[Tensor],
    b1: Sequence[Tensor],
    w2: Sequence[Tensor],
    b2: Sequence[Tensor],
    ln_weight: Sequence[Tensor] = (),
    ln_bias: Sequence[Tensor] = (),
    *,
    p_drop: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    training: bool = True,
    arch: int | None = None,
) -> int:
    """Compiles what calls with such tensors can need; the arguments are those of `kernels.ffn.ops.fused_ffn_stack`.

    Args:
        p_drop: as the calls will have it; only whether it is 0 matters.
        compute_dtype: of the products, where autocast will choose another than x's.
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

    seed = torch.zeros(1, dtype=torch.int64, device=x.device) if p_drop else None
    dtype = compute_dtype or x.dtype
    for program in programs():
        if not program.rule.allows(x.shape[1], w1[0].shape[0]):
            continue
        call = FFNCall(
            x, w1, b1, w2, b2, ln_weight, ln_bias, program.tensor, int(program.flags), p_drop, seed, 1e-12, dtype
        )
        passes = [recipe(call, False, None)]
        if training:
            passes += [recipe(call, True, None), recipe(call, True, [True] * (1 + len(call.parameters)))]
        for made, slots in product(passes, SLOT_VARIANTS):
            if made is not None:
                with torch.cuda.device(x.device.index if x.is_cuda else -1):
                    compile_recipe(program.words, made, arch, count, generated=False, slots=slots)
    return asked
