"""Peak activation memory against PyTorch's memory profiler; published FLOPs; elementwise operations."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.flops import count_flops
from engine.architecture.memory import expression_live, fixed_live, peak_activation_bytes
from engine.architecture.shape import ModelShape
from kernels.language.expression import GELU_FFN
from kernels.reference.ffn import evaluate
from search.space import SearchSpace

RELEASED = (
    "tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2)), elu(linear2_1(gelu(linear2_1(x,wb1)),wb2)),"
    " sigmoid(linear1_2(relu(linear1_2(x,wb1)),wb2)), linear2_2(gelu(linear2_2(max(x,tanh(x)),wb1)),wb2),"
    " linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2), leaky_relu(linear2_3(gelu(linear2_3(x,wb1)),wb2))"
)


def gelu(layers, ffn_ratio=Fraction(1), stack=1):
    return Architecture((LayerSpec(GELU_FFN, stack, ffn_ratio),) * layers)


def twice(arch):
    return Architecture(tuple(layer for layer in arch.layers for _ in range(2)))


PUBLISHED = {
    "bert-base": (gelu(12), ModelShape(768, 12, 3072, embedding_size=None), 22.35),
    "tinybert6": (gelu(6), ModelShape(768, 6, 3072, embedding_size=None), 11.17),
    "tinybert4": (gelu(4), ModelShape(312, 4, 1200, embedding_size=None), 1.25),
    "efficientbert": (Architecture.parse(RELEASED), ModelShape(540, 6, 540), 3.05),
    "efficientbert-tiny": (Architecture.parse(RELEASED), ModelShape(360, 6, 360), 1.42),
    "efficientbert++": (twice(Architecture.parse(RELEASED)), ModelShape(360, 12, 360), 2.80),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_flops(name):
    arch, shape, giga = PUBLISHED[name]
    # they are given with three digits, so half a unit of the last one is at most 0.5 %
    assert count_flops(arch, shape) == pytest.approx(giga * 1e9, rel=0.005)


def peak_of(run):
    """Most bytes allocated and not yet freed while `run` runs, by PyTorch's memory profiler."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    changes = [e.nbytes() for e in events if e.name() == "[memory]"]
    return max(np.cumsum([0, *changes]))


@pytest.mark.parametrize("policy", ["truncate", "pad"])
def test_expression_memory_equals_the_profiled_peak(policy):
    hidden, inner, tokens = 96, 48 if policy == "truncate" else 144, 64
    shape = ModelShape(hidden, 1, inner, vocab_size=9, embedding_size=None)
    space = SearchSpace(shape, budget=(0, 1e9), ratios=(1,), policy=policy)
    x = torch.randn(tokens, hidden)
    weights = torch.randn(inner, hidden), torch.randn(inner), torch.randn(hidden, inner), torch.randn(hidden)
    for seed in range(12):
        expr = space.sample(np.random.default_rng(seed)).layers[0].expression
        with torch.no_grad():
            measured = peak_of(lambda e=expr: evaluate(e, x, *weights, policy))
        expected = 4 * tokens * expression_live(expr, hidden, inner, policy)
        assert measured == expected, str(expr)


def test_peak_is_the_worst_layer_and_scales_with_tokens():
    shape = ModelShape(100, 2, 400, embedding_size=20)
    small, large = LayerSpec(GELU_FFN, 1, Fraction(1, 4)), LayerSpec(GELU_FFN, 1, Fraction(1))
    # GELU at d = 400: input 100, and two tensors of 400 while the activation runs
    assert peak_activation_bytes(Architecture((small, large)), shape, sequence_length=7) == 4 * 7 * (100 + 800)
    assert peak_activation_bytes(Architecture((small, small)), shape, sequence_length=7) == 4 * 7 * fixed_live(shape)
    stacked = Architecture((LayerSpec(GELU_FFN, 4, Fraction(1)), small))
    assert peak_activation_bytes(stacked, shape, batch_size=3, bytes_per_element=2) == 2 * 3 * 128 * 900
