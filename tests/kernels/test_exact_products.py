"""Products whose left operand stays in registers, on integers: results are exact, and must be so in every repetition.

On Hopper such products (attention's probabilities times values, differences of scores times keys) read registers while
later instructions already run; assemblers have been reported to reuse those registers too early. Inputs are small
integers, and factors powers of two, so that every sum is exact in float32 and a result is one rounding of it: a single
lost operand shows. `ffnas doctor` names a newer assembler where one is installed.
"""

from __future__ import annotations

import pytest
import torch
from triton_places import INTERPRETER, passes_under_the_interpreter, triton_device  # noqa: F401  a fixture

from kernels.attention.ops import fused_attention
from kernels.losses.ops import attention_score_mse
from kernels.reference.philox import dropout_mask

LENGTH, SAMPLES, HEADS = 64, 1 if INTERPRETER else 4, 2
"""Powers of two: rows of probabilities 1 / LENGTH, and shares of pairs."""
REPEATS = 1 if INTERPRETER else 50  # the interpreter has nothing to race
DTYPES = [torch.float16] if INTERPRETER else [torch.float16, torch.bfloat16]


@pytest.mark.skipif(INTERPRETER, reason="this is the child process")
def test_under_the_interpreter():
    passes_under_the_interpreter(__file__)


def integers(width, largest, seed):
    """[SAMPLES, HEADS, LENGTH, width] float64 integers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, (SAMPLES, HEADS, LENGTH, width), generator=generator).double()


def check(run, inputs, expected, dtype, device):
    """`run` gives exactly the rounded `expected`, every time."""
    leaves = [t.to(device, dtype).requires_grad_() for t in inputs]
    wanted = [t.to(dtype) for t in expected]
    for repeat in range(REPEATS):
        for k, (own, exact) in enumerate(zip(run(*leaves), wanted, strict=True)):
            wrong = (own.detach().to("cpu", dtype) != exact).sum().item()
            assert not wrong, f"result {k}, repetition {repeat}: {wrong} of {exact.numel()} numbers are wrong"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 45, 64])
def test_probabilities_times_values(device, dtype, width):
    """Scores are 0 whatever q and k are, so probabilities are 1 / LENGTH, and dropout of one half makes them differ."""
    q, k, v, weight = (integers(width, 4, seed) for seed in range(4))
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.bool, device=device)
    p = dropout_mask((SAMPLES, HEADS, LENGTH, LENGTH), 0.5, 7).double() * 2 / LENGTH
    assert 0 < (p == 0).double().mean() < 1
    moved = weight.to(device, dtype)

    def run(q, k, v):
        context, _ = fused_attention(q, k, v, mask, scale=0.0, p_drop=0.5, seed=7)
        return [context, torch.autograd.grad(context, v, moved)[0]]

    check(run, (q, k, v), (p @ v, p.mT @ weight), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "teacher"), [(16, 16), (45, 64), (64, 64)])
def test_differences_of_scores_times_keys(device, dtype, width, teacher):
    q, k = integers(width, 1, 0), integers(width, 1, 1)
    q_t, k_t = integers(teacher, 1, 2), integers(teacher, 1, 3)
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.bool, device=device)
    difference = q @ k.mT - q_t @ k_t.mT
    assert difference.abs().max() <= 256  # exact in 8 bits
    share = 2.0 / (SAMPLES * HEADS * LENGTH * LENGTH)
    fixed = [t.to(device, dtype) for t in (q_t, k_t)]

    def run(q, k):
        loss = attention_score_mse(q, k, *fixed, mask, scale_s=1.0, scale_t=1.0, method="tiled")
        return torch.autograd.grad(loss, (q, k))

    check(run, (q, k), (share * difference @ k, share * difference.mT @ q), dtype, device)
