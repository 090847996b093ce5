"""Weights that stay packed between inference passes: the same bits, never stale, bounded, gone with their model."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from kernels import FusedFFN, FusedFFNStack, dispatch, fused_ffn
from kernels.attention.linear import fused_linear_norm, fused_linears
from kernels.backends import packed_weights
from kernels.backends.cpu import ENVIRONMENT as ISA
from kernels.backends.cpu import ISAS as ISA_NAMES
from kernels.backends.cpu import CpuBackend, usable_isas
from kernels.backends.packed_weights import ENVIRONMENT, MOST_TOKENS, PackedWeights, _Entry, limit_bytes
from kernels.build import library_path
from kernels.call import BackendUnavailable
from kernels.dispatch import load_backend

CPU = load_backend("cpu")
pytestmark = pytest.mark.skipif(isinstance(CPU, str), reason=f"no CPU kernels: {CPU}")

CHAIN = "tanh(linear(gelu(linear(x,wb1)),wb2))"
EXPRESSIONS = (CHAIN, "linear(relu(mul(linear(x,wb1),x)),wb2)", "add(linear(x,wb1),linear(tanh(x),wb2))")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def packed():
    """What the backend keeps, empty before and after."""
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
    monkeypatch.setitem(dispatch._loaded, "cpu", backend)
    stack = FusedFFNStack(3, 50, 23, CHAIN).to(dtype).eval()
    x = torch.randn(61, 50).to(dtype)
    first = stack(x)
    assert torch.equal(first, stack(x))
    assert backend.packed.kept_bytes > 0
    assert torch.equal(first, stack(x))


def in_place(weight):
    weight.mul_(1.5)


def through_data(weight):
    weight.data.copy_(torch.randn(weight.shape))


def through_numpy(weight):
    array = weight.detach().numpy()
    array *= -1


def other_storage(weight):
    weight.data = torch.randn(weight.shape)


def transposed_storage(weight):
    weight.data = torch.randn(weight.shape[::-1]).t().contiguous()


def optimizer(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1).step()
    weight.grad = None


def one_element(weight):
    weight.data[3, 5] = 0.0


def one_bit(weight):
    weight.data.view(torch.int32)[-1, -1] ^= 1


def one_neuron(weight):
    weight.data[7] = 0.0


def block(weight):
    weight.data[8:24, 8:24] = 0.0


def pruned(weight):
    weight.data.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.05)


def signs(weight):
    weight.data[::2].neg_()


def rows_swapped(weight):
    weight.data[[2, 9]] = weight.data[[9, 2]]


def rows_turned(weight):
    weight.data.copy_(weight.data.roll(1, 0))


def columns_swapped(weight):
    weight.data.copy_(weight.data.flip(1))


def neighbours_exchange_bits(weight):
    """Plain sums stay as they are."""
    bits = weight.data.view(torch.int32)
    bits[4, 0] += 1 << 10
    bits[4, 2] -= 1 << 10


def inference_mode(weight):
    with torch.inference_mode():
        weight.data[1, 1] += 1.0


def swapped(weight):
    torch.utils.swap_tensors(weight, nn.Parameter(torch.randn(weight.shape)))


def numpy_element(weight):
    weight.detach().numpy()[11, 13] *= 1.001


WRITES = (
    in_place, through_data, through_numpy, other_storage, transposed_storage, optimizer, one_element, one_bit, one_neuron,
    block, pruned, signs, rows_swapped, rows_turned, columns_swapped, neighbours_exchange_bits, inference_mode, swapped,
    numpy_element,
)  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda w: w.__name__)
@pytest.mark.parametrize("which", ["dense1", "dense2"])
@torch.no_grad()
def test_changed_weights_are_noticed(packed, write, which):
    module, x = ffn(), torch.randn(20, 37)
    for _ in range(3):
        before = module(x)
    assert packed.kept_bytes > 0
    write(getattr(module, which).weight)
    after = module(x)
    assert torch.equal(after, fresh(module, x))
    assert write is one_bit or not torch.equal(after, before)  # one bit may be less than rounding
    for _ in range(3):
        assert torch.equal(module(x), fresh(module, x))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_any_one_write_is_noticed(packed, dtype):
    """Every element, and structures that are easily missed by looking at some elements."""
    weight = nn.Parameter(torch.randn(17, 23).to(dtype), requires_grad=False)
    seen = {}

    def check(what):
        (sums,) = packed._sums([weight], CPU._isa[torch.float32])
        assert seen.setdefault(sums, what) == what, f"{what} looks like {seen[sums]}"

    check("as it was")
    original = weight.detach().clone()
    for row in range(17):
        for column in range(23):
            weight.data[row, column] += 1.0
            check((row, column))
            weight.data.copy_(original)
            check("as it was")
    for row in range(16):
        weight.data[row] = 0.0
        check(f"row {row}")
        weight.data.copy_(original)
        for other in range(row + 1, 17):
            weight.data[[row, other]] = original[[other, row]]
            check((row, "and", other))
            weight.data.copy_(original)
    for column in range(23):
        weight.data[:, column].neg_()
        check(f"column {column} turned")
        weight.data.copy_(original)


@pytest.mark.parametrize("isa", usable_isas(CPU._library) if not isinstance(CPU, str) else [])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 8), (33, 540), (5, 40000), (300, 257)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sums_are_those_of_their_definition(packed, isa, shape, dtype):
    """By hand in Python integers; any number of threads and any layout of the same rows."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = torch.zeros(shape[0], shape[1] + 3, dtype=dtype)
    wide[:, : shape[1]] = matrix
    for given in (matrix, wide[:, : shape[1]]):
        expected = _sums_by_hand(given)
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                assert packed._sums([matrix, given, matrix], isa)[1] == expected
            finally:
                torch.set_num_threads(before)


def _sums_by_hand(matrix):
    """The definition at the head of csrc/cpu/fingerprint.h, with its constants."""
    text = (Path(__file__).parents[2] / "csrc/cpu/fingerprint.h").read_text()
    keys, steps = (
        [int(word, 16) for word in re.findall(r"0x[0-9A-F]{15,16}", text.split(f"kFingerprint{name}[kWords]")[1])[:8]]
        for name in ("Key", "Step")
    )
    rows = [matrix.flatten()] if matrix.is_contiguous() else list(matrix)
    plain = mixed = block = 0
    for row in rows:
        data = row.contiguous().view(torch.uint8).numpy().tobytes()
        for begin in range(0, len(data), 64):
            for lane, at in enumerate(range(begin, begin + 64, 8)):
                v = int.from_bytes(data[at : at + 8].ljust(8, b"\0"), "little")
                t = v ^ (keys[lane] + block * steps[lane]) % 2**64
                plain += v
                mixed += (t % 2**32) * (t >> 32)
            block += 1
    return plain % 2**64, mixed % 2**64


@torch.no_grad()
def test_modules_may_swap_their_tensors(packed, monkeypatch):
    module, x = ffn(), torch.randn(20, 37)
    for _ in range(3):
        module(x)
    assert packed.kept_bytes > 0
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    parameter = module.dense1.weight
    module.to(torch.bfloat16)
    assert module.dense1.weight is parameter
    low = x.bfloat16()
    for _ in range(3):
        assert torch.equal(module(low), fresh(module, low))
    assert len(packed._entries) == 2  # those of the old memory are gone


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
        taken_apart.setattr(packed_weights, "_bytes", None)  # as the interpreter leaves a module's names
        packed._forget((0, 0), dead, ending=lambda: True)
        with pytest.raises(TypeError):
            packed._forget((0, 0), dead, ending=lambda: False)
