"""Weights that stay packed between inference passes: the same bits, never stale, bounded, gone with their model."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from kernels import FusedFFN, FusedFFNStack, dispatch, fused_ffn
from kernels.attention.linear import fused_linear_norm, fused_linears
from kernels.backends import packed_weights
from kernels.backends.cpu import CpuBackend
from kernels.backends.packed_weights import ENVIRONMENT, MOST_TOKENS, PackedWeights, _Entry, limit_bytes
from kernels.build import library_path
from kernels.call import BackendUnavailable
from kernels.dispatch import load_backend
from kernels.runtime.instruction_sets import ENVIRONMENT as ISA
from kernels.runtime.instruction_sets import ISAS as ISA_NAMES
from kernels.runtime.instruction_sets import usable_isas

CPU = load_backend("cpu")
pytestmark = pytest.mark.skipif(isinstance(CPU, str), reason=f"no CPU kernels: {CPU}")

CHAIN = "tanh(linear(gelu(linear(x,wb1)),wb2))"
EXPRESSIONS = (CHAIN, "linear(relu(mul(linear(x,wb1),x)),wb2)", "add(linear(x,wb1),linear(tanh(x),wb2))")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def packed(monkeypatch):
    """What the backend keeps, empty before and after; weights of any size."""
    monkeypatch.setattr(CPU.packed, "least_bytes", 0)
    CPU.packed.clear()
    yield CPU.packed
    entries = CPU.packed._entries.values()
    assert CPU.packed.kept_bytes == sum(e.packed.numel() for e in entries if e.packed is not None)
    CPU.packed.clear()


def ffn(hidden=37, inner=37, expression=CHAIN, dtype=torch.float32, seed=0) -> FusedFFN:
    torch.manual_seed(seed)
    return FusedFFN(hidden, inner, expression).to(dtype).eval()


def fresh(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What `module` gives when nothing is kept: a copy of it, met for the first time."""
    return copy.deepcopy(module)(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("hidden", [16, 37, 96])
@pytest.mark.parametrize("tokens", [1, 5, 33, 47, 48, 97, 300])
@torch.no_grad()
def test_kept_weights_give_the_same_bits(packed, dtype, expression, hidden, tokens):
    module, x = ffn(hidden, hidden, expression, dtype), torch.randn(tokens, hidden).to(dtype)
    first = module(x)
    assert packed.kept_bytes == 0
    second, third = module(x), module(x)
    assert (packed.kept_bytes > 0) == (tokens > (4 if CPU.isa(dtype) in ("avx512bf16", "amx") else 8))
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.parametrize("isa", usable_isas(CPU._library) if not isinstance(CPU, str) else [])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_on_every_instruction_set(monkeypatch, isa, dtype):
    monkeypatch.setenv(ISA, ISA_NAMES[isa])
    backend = CpuBackend(library_path())
    backend.packed.least_bytes = 0
    monkeypatch.setitem(dispatch._loaded, "cpu", backend)
    stack = FusedFFNStack(3, 50, 23, CHAIN).to(dtype).eval()
    x = torch.randn(61, 50).to(dtype)
    first = stack(x)
    assert torch.equal(first, stack(x))
    assert backend.packed.kept_bytes > 0
    assert torch.equal(first, stack(x))


@torch.no_grad()
def test_a_loaded_state_and_a_cast_are_noticed(packed):
    module, other, x = ffn(), ffn(seed=1), torch.randn(20, 37)
    for _ in range(3):
        module(x)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), fresh(other, x))
    for _ in range(3):
        module(x)
    module.to(torch.bfloat16)
    low = x.bfloat16()
    for _ in range(3):
        assert torch.equal(module(low), fresh(module, low))


def test_training_steps_between_evaluations(packed):
    module, x = ffn(), torch.randn(20, 37)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        module(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(module(x), fresh(module, x))


def test_calls_with_gradients_keep_nothing(packed):
    module, x = ffn(), torch.randn(20, 37)
    for _ in range(3):
        module(x).sum().backward()
    assert packed._entries == {}


@torch.no_grad()
def test_only_whole_parameters_are_kept(packed):
    module, x = ffn(37, 20), torch.randn(20, 37)
    views = [p[:10] if n == "dense1.weight" else p for n, p in module.named_parameters()]
    w1, b1, w2, b2, ln_weight, ln_bias = views
    for _ in range(3):
        fused_ffn(x, w1, b1[:10], w2[:, :10], b2, ln_weight, ln_bias, CHAIN)
        fused_ffn(x, *(p.detach() for p in module.parameters()), CHAIN)
    assert packed._entries == {}


def test_parameters_made_in_inference_mode_are_kept_too(packed):
    with torch.inference_mode():
        module, x = ffn(37, 20), torch.randn(20, 37)
        expected = module(x)
        for _ in range(3):
            assert torch.equal(module(x), expected)
        assert packed.kept_bytes > 0
        module.dense1.weight[4, 4] += 1.0
        assert torch.equal(module(x), fresh(module, x))
        assert not torch.equal(module(x), expected)


@torch.no_grad()
def test_small_weights_are_packed_in_every_call(packed, monkeypatch):
    monkeypatch.setattr(packed, "least_bytes", packed_weights.LEAST_BYTES)
    wide, narrow, x = ffn(300, 300), ffn(300, 200), torch.randn(20, 300)
    for _ in range(3):
        narrow(x)
    assert packed.kept_bytes == 0
    for _ in range(3):
        wide(x)
    assert len(packed._entries) == 2
    assert packed.kept_bytes > 0


@torch.no_grad()
def test_long_calls_pack_for_themselves(packed):
    module = ffn()
    for _ in range(3):
        module(torch.randn(MOST_TOKENS + 1, 37))
    assert packed.kept_bytes == 0


@torch.no_grad()
def test_what_is_kept_dies_with_the_model(packed):
    module, x = ffn(), torch.randn(20, 37)
    for _ in range(3):
        module(x)
    kept = packed.kept_bytes
    other = ffn(seed=1)
    for _ in range(3):
        other(x)
    assert packed.kept_bytes == 2 * kept
    del module
    gc.collect()
    assert packed.kept_bytes == kept
    assert len(packed._entries) == 2


@torch.no_grad()
def test_the_limit_holds_and_the_rest_is_packed_in_each_call(packed, monkeypatch):
    stack, x = FusedFFNStack(4, 37, 37, CHAIN).eval(), torch.randn(20, 37)
    first = stack(x)
    size = packed._library.ffnas_packed_bytes(packed.isa_for(CPU._isa[torch.float32], 20), 20, 37, 37)
    monkeypatch.setattr(packed, "_limit", 3 * size + 1)
    for _ in range(4):
        assert torch.equal(stack(x), first)
    assert packed.kept_bytes == 3 * size
    monkeypatch.setattr(packed, "_limit", 0)
    packed.clear()
    for _ in range(3):
        assert torch.equal(stack(x), first)
    assert packed._entries == {}


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf", ""])
def test_a_bad_limit_is_named(monkeypatch, text):
    monkeypatch.setenv(ENVIRONMENT, text)
    with pytest.raises(BackendUnavailable, match=f"{ENVIRONMENT}={text!r}"):
        limit_bytes()


def test_the_limit_is_read(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "0.5")
    assert limit_bytes() == 512 * 1024
    monkeypatch.delenv(ENVIRONMENT)
    assert limit_bytes() == 1024 * 2**20


@torch.no_grad()
def test_copies_and_pickles_carry_no_packed_weights(packed):
    module, x = ffn(), torch.randn(20, 37)
    size = len(pickle.dumps(module))
    for _ in range(3):
        module(x)
    assert len(pickle.dumps(module)) == size
    twin = copy.deepcopy(module)
    twin.dense1.weight.mul_(2.0)
    assert not torch.equal(twin(x), module(x))


@torch.no_grad()
def test_threads_share_what_is_kept(packed):
    module, x = ffn(), torch.randn(20, 37)
    expected, wrong = fresh(module, x), []

    def serve():
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(module(x), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("tokens", [1, 9, 33, 64, 65, 400])
@torch.no_grad()
def test_linear_layers_too(packed, dtype, tokens, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _check_linears(packed, dtype, tokens)
    finally:
        torch.set_num_threads(before)


def _check_linears(packed, dtype, tokens):
    torch.manual_seed(0)
    layers = [nn.Linear(50, n).to(dtype) for n in (50, 3, 70)]
    norm, x, residual = nn.LayerNorm(50).to(dtype), torch.randn(tokens, 50).to(dtype), torch.randn(tokens, 50).to(dtype)
    weights, biases = [m.weight for m in layers], [m.bias for m in layers]
    plain = [w.detach() for w in weights]
    expected = fused_linears(x, plain, biases)
    rows = [fused_linears(x[k : k + 70], plain, biases) for k in range(0, tokens, 70)]
    for layer, own in zip(expected, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(layer, torch.cat(own))
    normed = fused_linear_norm(x, plain[0], biases[0], residual, norm.weight, norm.bias)
    for _ in range(3):
        assert all(map(torch.equal, fused_linears(x, weights, biases), expected))
        assert torch.equal(fused_linear_norm(x, weights[0], biases[0], residual, norm.weight, norm.bias), normed)
    assert packed.kept_bytes > 0 or tokens <= 8
    weights[2].mul_(-1.0)
    changed = fused_linears(x, weights, biases)[2]
    assert not torch.equal(changed, expected[2])
    assert torch.equal(changed, fused_linears(x, plain[2:], biases[2:])[0])


def test_the_end_of_a_process_says_nothing(monkeypatch):
    """A parameter may die when our modules are already taken apart: nothing of them is touched then."""
    packed = PackedWeights(CPU._library, 1 << 20)
    weight = nn.Parameter(torch.zeros(64, 64))
    packed._store((0, 0), _Entry(weakref.ref(weight.untyped_storage()), (0, 0), None))
    dead = packed._entries[0, 0].storage
    with monkeypatch.context() as taken_apart:
        taken_apart.setattr(packed_weights, "_size", None)  # as the interpreter leaves a module's names
        packed._forget((0, 0), dead, ending=lambda: True)
        with pytest.raises(TypeError):
            packed._forget((0, 0), dead, ending=lambda: False)
