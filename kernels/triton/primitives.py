"""Exponential and reciprocal: one instruction each on a GPU, plain Triton under the interpreter.

`ex2.approx.ftz` and `rcp.approx.ftz` (2 and 1 units in the last place, subnormal results are 0) are the hardware's own;
without `.ftz`, and for a division, the compiler adds range checks and scalings that triple the cost of an activation.
Triton's interpreter cannot run assembly, hence the second definition: it differs by a rounding.

Used as: 2^x for any x, and 1 / x for x >= 1 or infinite.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are tensors
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.launch import interpreted


@triton.jit
def _probe(x):
    return x


if interpreted(_probe):

    @triton.jit
    def power_of_two(x):
        return tl.exp2(x)

    @triton.jit
    def reciprocal(x):
        return 1.0 / x

else:

    @triton.jit
    def power_of_two(x):
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def reciprocal(x):
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
