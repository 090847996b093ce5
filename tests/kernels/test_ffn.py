"""Accuracy of the op: random expressions at odd sizes against the float64 reference, values and all gradients.

The tolerance rule is that of `ffn_accuracy`.
"""

from __future__ import annotations

from random import Random

import pytest
import torch
from ffn_accuracy import Accuracy
from ffn_cases import RELEASED, Case, random_case, tensors

from kernels.dispatch import available_backends, use_backend
from kernels.ffn.ops import fused_ffn
from kernels.language.expression import parse_expression

CHUNKS = 10
PER_CHUNK = 200
SMALL = (1, 2, 7, 16, 33, 45)
LARGE = (135, 270, 540, 541)
TOKENS = (1, 3, 7, 33)


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny calls: on a busy machine a thread pool spends its time waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def usable_backends() -> list[str]:
    reasons = available_backends()
    return [name for name in ("reference", "cpu") if reasons[name] is None]


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_expressions(chunk):
    """2,000 in all, every hundredth at large sizes; half of them float32 and half bfloat16."""
    rng = Random(1000 + chunk)
    accuracy = Accuracy(usable_backends())
    for k in range(PER_CHUNK):
        case = random_case(rng, LARGE if k % 100 == 0 else SMALL, TOKENS)
        accuracy.check(case, chunk * PER_CHUNK + k, torch.bfloat16 if (k + chunk) % 2 else torch.float32)
    accuracy.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("inner", [540, 270, 180, 135, 541])
def test_released_expressions(inner, dtype):
    accuracy = Accuracy(usable_backends())
    for k, text in enumerate(RELEASED):
        policy = "pad" if inner > 540 else "truncate"
        accuracy.check(Case(parse_expression(text), policy, 67, 540, inner), k + 1, dtype)
    accuracy.finish()


def test_layer_norm_over_one_column_is_its_bias():
    inputs = tensors(Case(parse_expression(RELEASED[0]), "truncate", 5, 1, 3), 0, torch.float32)
    for backend in usable_backends():
        with use_backend(backend, strict=True):
            assert torch.equal(fused_ffn(*inputs, RELEASED[0]), inputs[6].expand(5, 1))
