"""The C++ backend on each instruction set this machine runs, across the sizes where its code paths change."""

from random import Random

import pytest
import torch
from ffn_accuracy import Accuracy
from ffn_cases import RELEASED, Case, error, random_case, tensors, with_gradients
from torch.nn import functional as F

from kernels.backends.cpu import CpuBackend
from kernels.dispatch import available_backends, load_backend, use_backend
from kernels.ffn.ops import fused_ffn, fused_ffn_stack
from kernels.language.expression import parse_expression
from kernels.language.operators import UNARY
from kernels.reference.ffn import ffn
from kernels.runtime.instruction_sets import ISAS, usable_isas

if available_backends()["cpu"] is not None:
    pytest.skip(f"no C++ backend: {available_backends()['cpu']}", allow_module_level=True)

BACKEND: CpuBackend = load_backend("cpu")
USABLE = usable_isas(BACKEND._library)
SERVES = {
    "generic": torch.float32,
    "avx2": torch.float32,
    "avx512": torch.float32,
    "avx512bf16": torch.bfloat16,
    "amx": torch.bfloat16,
    "amx_fp32": torch.float32,
    "neon": torch.float32,
}
WIDTHS = (1, 7, 16, 31, 32, 33, 45, 64, 97)
TOKENS = (1, 4, 5, 8, 9, 24, 25, 48, 95, 97, 200)
"""Around the rows and columns of a micro-kernel, a tile and a block, and the few tokens that need no packed weights."""


@pytest.fixture
def on(monkeypatch):
    """Makes the backend use one instruction set for all products."""

    def use(name):
        if ISAS.index(name) not in USABLE:
            pytest.skip(f"this machine or build has no {name}")
        monkeypatch.setattr(BACKEND, "_isa", dict.fromkeys((torch.float32, torch.bfloat16), ISAS.index(name)))
        return SERVES[name]

    return use


@pytest.mark.parametrize("name", ISAS)
def test_random_expressions(on, name):
    dtype = on(name)
    rng = Random(7)
    accuracy = Accuracy(["cpu"])
    for k in range(80):
        accuracy.check(random_case(rng, WIDTHS, TOKENS), k, dtype)
    accuracy.finish()


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512", "amx_fp32"])
def test_float32_products_serve_bfloat16(on, name):
    on(name)
    accuracy = Accuracy(["cpu"])
    for k, text in enumerate(RELEASED):
        accuracy.check(Case(parse_expression(text), "truncate", 33, 45, 31), k + 1, torch.bfloat16)
    accuracy.finish()


@pytest.mark.parametrize("name", ["amx", "amx_fp32"])
def test_every_operator_beside_the_products(on, name):
    """One operator between the products and one after them: what AMX kernels do while tiles multiply."""
    dtype = on(name)
    accuracy = Accuracy(["cpu"])
    for k, (first, second) in enumerate(zip(UNARY, UNARY[1:] + UNARY[:1], strict=True)):
        for tokens, hidden, inner in ((33, 45, 31), (113, 97, 80), (200, 64, 33)):
            expression = parse_expression(f"{second}(linear({first}(linear(x,wb1)),wb2))")
            case = Case(expression, "truncate", tokens, hidden, inner)
            accuracy.check(case, k, dtype)
            inputs = [t.detach() for t in tensors(case, k, dtype)]
            with use_backend("cpu", strict=True):
                unsaved = fused_ffn(*inputs, expression)
                saved = fused_ffn(*(t.requires_grad_() for t in inputs), expression)
            assert torch.equal(unsaved, saved), expression
    accuracy.finish()


@pytest.mark.parametrize("name", ["avx512bf16", "amx"])
def test_every_operator_under_autocast(on, name):
    """float32 tensors with bfloat16 products; the exact value for operands rounded once is the measure."""
    on(name)
    for k, (first, second) in enumerate(zip(UNARY, UNARY[1:] + UNARY[:1], strict=True)):
        expression = parse_expression(f"{second}(linear({first}(linear(x,wb1)),wb2))")
        inputs = [t.detach() for t in tensors(Case(expression, "truncate", 113, 97, 80), k, torch.float32)]
        exact = ffn(*(t.double() for t in inputs), expression)
        with torch.autocast("cpu", torch.bfloat16):
            with use_backend("cpu", strict=True):
                got = fused_ffn(*inputs, expression)
                saved = fused_ffn(*(t.requires_grad_() for t in inputs), expression)
            with use_backend("reference", strict=True), torch.no_grad():
                eager = fused_ffn(*inputs, expression)
        assert got.dtype == torch.float32
        assert torch.equal(got, saved)
        assert error(got, exact) <= 2 * error(eager, exact) + 2**-20, expression


@pytest.mark.parametrize("name", [isa for isa in ISAS if SERVES[isa] == torch.float32])
@pytest.mark.parametrize("hidden", [5, 33, 540])
def test_statistics_of_awkward_rows(on, name, hidden):
    """LayerNorm's sums are about the mean of a row's first values, wherever the mean of all of them is."""
    on(name)
    noise = torch.randn(hidden, generator=torch.Generator().manual_seed(1))
    step = torch.zeros(hidden)
    step[: min(32, hidden // 2)] = 1.0
    spike = torch.zeros(hidden)
    spike[-1] = 1e4
    rows = [noise, noise.sort().values, 100 + noise, noise + 1e3 * step, noise - 1e3 * step, noise + spike]
    x = torch.stack([*rows, noise + spike.flip(0), 1e-3 * noise, 1e15 * noise])
    zeros = (torch.zeros(7, hidden), torch.zeros(7), torch.zeros(hidden, 7), torch.zeros(hidden))
    norm = (torch.rand(hidden) + 0.5, torch.randn(hidden))
    text = "linear(relu(linear(x,wb1)),wb2)"  # of zero weights: LayerNorm's input is x
    with use_backend("cpu", strict=True):
        got = fused_ffn(x, *zeros, *norm, text)
    exact = F.layer_norm(x.double(), (hidden,), *(t.double() for t in norm), 1e-12)
    # x is exact; the mean is rounded to an ulp of the largest element, here in deviations, and the variance cancels by
    # at most width / 32
    scale = x.double().abs().amax(1, keepdim=True) / x.double().std(1, keepdim=True, unbiased=False)
    assert ((got - exact).abs() <= 2**-23 * (4 + scale + hidden / 32) * (1 + exact.abs())).all()
    overflowing = 1e25 * x[:1]  # finite, but their squares are not
    with use_backend("cpu", strict=True):
        got = fused_ffn(overflowing, *zeros, *norm, text)
    assert torch.equal(got[0], norm[1])  # an infinite variance leaves the bias; eager says NaN at some widths


@pytest.mark.parametrize("name", ["avx512", "amx_fp32"])
def test_infinities_meet_zeros_of_cut_operands(on, name):
    """Values with few bits have parts that are 0, and 0 times infinity is NaN where the whole numbers give infinity."""
    on(name)
    generator = torch.Generator().manual_seed(3)
    weights = torch.tensor([1.0, -0.5, 1.0 + 2**-20, 0.3])
    x = torch.randn(70, 45, generator=generator)
    w1 = weights[torch.randint(4, (40, 45), generator=generator)]
    w2 = torch.randn(45, 40, generator=generator)
    x[3, 5], x[9, 1], x[9, 2], x[11, 0], x[65, 44] = torch.inf, torch.inf, -torch.inf, torch.nan, -torch.inf
    w1[7, 30], w1[8, :2] = -torch.inf, 0.0
    inputs = (x, w1, torch.randn(40), w2, torch.randn(45))
    text = "linear(relu(linear(x,wb1)),wb2)"
    weight = torch.ones(70, 45)
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = with_gradients(lambda *i: ffn(*i, None, None, parse_expression(text), return_ln=False), leaves, weight)
    with use_backend("cpu", strict=True):
        got = with_gradients(lambda *i: fused_ffn(*i, None, None, text, return_ln=False), leaves, weight)
    for own, eager in zip(got, expected, strict=True):
        torch.testing.assert_close(own, eager, rtol=1e-4, atol=1e-4, equal_nan=True)


def stacked(inputs, n):
    """Arguments of a stack of n FFNs with different weights."""
    x, *parameters = (t.detach() for t in inputs)
    return [x, *([p + 0.01 * k for k in range(n)] for p in parameters)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("text", [RELEASED[0], RELEASED[4], "max(linear(x,wb1),linear(x,wb2))"])
@pytest.mark.parametrize("tokens", [3, 200])
def test_a_stack_equals_its_layers_bit_for_bit(tokens, text, dtype):
    inner = 64 if text.startswith("max") else 33
    x, *groups = stacked(tensors(Case(parse_expression(text), "truncate", tokens, 64, inner), 3, dtype), 3)
    with use_backend("cpu", strict=True):
        stack = fused_ffn_stack(x, *groups, text)
        one = x
        for layer in range(3):
            one = fused_ffn(one, *(g[layer] for g in groups), text)
    assert torch.equal(stack, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    """Outputs and gradients of activations: the same arithmetic per row. Sums over tokens may be split differently."""
    inputs = tensors(Case(parse_expression(RELEASED[3]), "truncate", 500, 45, 33), 5, dtype)
    weight = torch.randn(500, 45, generator=torch.Generator().manual_seed(5))
    results = {}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with use_backend("cpu", strict=True):
                results[threads] = with_gradients(
                    lambda *i: fused_ffn(*i, RELEASED[3], p_drop=0.1, seed=9), inputs, weight
                )
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3):
        assert torch.equal(results[1][0], results[threads][0])
        assert torch.equal(results[1][1], results[threads][1])
        for a, b in zip(results[1][2:], results[threads][2:], strict=True):
            torch.testing.assert_close(a, b, rtol=2**-7 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


def test_the_environment_limits_the_instruction_set(monkeypatch):
    monkeypatch.setenv("FFNAS_CPU_ISA", "generic")
    assert usable_isas(BACKEND._library) == [0]
    monkeypatch.setenv("FFNAS_CPU_ISA", "avx1024")
    with pytest.raises(Exception, match="FFNAS_CPU_ISA='avx1024' is none of generic, avx2"):
        usable_isas(BACKEND._library)
