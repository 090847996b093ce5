"""A recipe: what of a call decides which kernels it needs, as JSON; and the compilation of a recipe without a device.

Sizes, strides, dtypes and flags are kept; data, and the pointers themselves, are not. A recipe is run by giving the
driver (`kernels.triton.ffn`) meta tensors while kernels are only compiled (`kernels.triton.launch.compile_only`).
Pointers are taken to be 16-byte aligned, as those of whole tensors are: calls with other pointers have no recipe.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from kernels.call import FFNCall
from kernels.language.lowering import load_program
from kernels.triton import codegen, ffn
from kernels.triton.device_program import DeviceProgram, device_program
from kernels.triton.launch import Compiled, compile_only
from kernels.triton.layout import allows_tf32

_DTYPES = {str(t): t for t in (torch.float32, torch.float16, torch.bfloat16)}


def recipe(call: FFNCall, save: bool, needs: Sequence[bool] | None) -> dict[str, Any] | None:
    """The recipe of a call's forward pass or, with `needs`, of its backward pass; None where pointers are unaligned."""
    tensors = [call.x, *call.parameters]
    if any(t.data_ptr() % 16 for t in tensors):
        return None
    return {
        "tensors": [[list(t.shape), list(t.stride()), str(t.dtype)] for t in tensors],
        "layers": call.layers,
        "flags": call.flags,
        "p_drop": call.p_drop,
        "eps": call.eps,
        "compute": str(call.compute_dtype),
        "tf32": allows_tf32(),
        "save": save,
        "needs": None if needs is None else list(needs),
    }


def meta_call(words: Sequence[int], made: dict[str, Any]) -> FFNCall:
    """A call of the recipe's shapes, on the meta device."""
    tensors = [
        torch.empty_strided(shape, stride, dtype=_DTYPES[dtype], device="meta")
        for shape, stride, dtype in made["tensors"]
    ]
    n = made["layers"]
    groups = [tensors[1 + k : 1 + k + n] for k in range(0, len(tensors) - 1, n)]
    w1, b1, w2, b2, ln_weight, ln_bias = [*groups, [], []][:6]
    seed = torch.empty(1, dtype=torch.int64, device="meta") if made["p_drop"] else None
    program = load_program(torch.tensor(list(words), dtype=torch.int32))
    return FFNCall(
        tensors[0], w1, b1, w2, b2, ln_weight, ln_bias, program.tensor, int(program.flags), made["p_drop"], seed,
        made["eps"], _DTYPES[made["compute"]],
    )  # fmt: skip


def compile_recipe(
    words: Sequence[int], made: dict[str, Any], arch: int | None, seen: Compiled, *, generated: bool, slots: int = 0
) -> None:
    """Compiles every kernel the recipe's call launches, for sm_`arch` without a GPU (None: for the current device).

    Args:
        words: the program, validated here.
        seen: called with each kernel (`kernels.triton.launch.compile_only`).
        generated, slots: as of `run_recipe`.

    Given an architecture, replaces Triton's driver while it runs: for worker processes and command-line tools.
    """
    with compile_only(seen, arch):
        run_recipe(words, made, generated=generated, slots=slots)


def run_recipe(words: Sequence[int], made: dict[str, Any], *, generated: bool, slots: int = 0) -> None:
    """Runs the recipe's call over meta tensors, where launches are compiled or recorded (`kernels.triton.launch`).

    Args:
        words: the program, validated here.
        made: the recipe.
        generated: the specialized tier's kernels instead of the interpreting ones.
        slots: slots that interpreting kernels have at least.
    """
    call = meta_call(words, made)
    program = device_program(tuple(words), call.x.device)
    if generated:
        program = DeviceProgram(program.words, program.code, program.slots, codegen.load(program.words))
    elif slots:
        program = DeviceProgram(program.words, program.code, tuple(max(s, slots) for s in program.slots))
    earlier = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if made["tf32"] else "ieee"
    try:
        run(call, program, made["save"], made["needs"])
    finally:
        torch.backends.cuda.matmul.fp32_precision = earlier


def run(call: FFNCall, program: DeviceProgram, save: bool, needs: Sequence[bool] | None) -> None:
    """Runs forward, or backward where `needs` is given, of a call on the meta device."""
    if needs is None:
        ffn.forward(call, save, program)
    else:
        grad_out = torch.empty(call.x.shape, dtype=call.x.dtype, device=call.x.device)
        ffn.backward(call, grad_out, ffn.saved_like(call), needs, program)


def key(words: Sequence[int], made: dict[str, Any], arch: int) -> str:
    """Text that stands for (program, recipe, architecture)."""
    return json.dumps([codegen.program_hash(tuple(words)), made, arch], sort_keys=True)
