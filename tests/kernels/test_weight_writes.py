"""Every write to a weight whose packed form is kept is noticed, through whatever channel and however small."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from kernels import FusedFFN
from kernels.backends.packed_weights import DTYPE_CODES
from kernels.dispatch import load_backend
from kernels.runtime.instruction_sets import usable_isas

CPU = load_backend("cpu")
pytestmark = pytest.mark.skipif(isinstance(CPU, str), reason=f"no CPU kernels: {CPU}")

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def packed(monkeypatch):
    """What the backend keeps, empty before and after; weights of any size."""
    monkeypatch.setattr(CPU.packed, "least_bytes", 0)
    CPU.packed.clear()
    yield CPU.packed
    CPU.packed.clear()


def ffn(dtype=torch.float32, seed=0) -> FusedFFN:
    torch.manual_seed(seed)
    return FusedFFN(37, 37, "tanh(linear(gelu(linear(x,wb1)),wb2))").to(dtype).eval()


def fresh(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What `module` gives when nothing is kept: a copy of it, met for the first time."""
    return copy.deepcopy(module)(x)


def key(matrix: torch.Tensor, isa: int) -> tuple[int, ...]:
    """A matrix in memory, as `PackedWeights` names it."""
    return (matrix.data_ptr(), isa, *matrix.shape, matrix.stride(0), DTYPE_CODES[matrix.dtype])


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
    in_place, through_data, through_numpy, other_storage, transposed_storage, optimizer, one_element, one_bit,
    one_neuron, block, pruned, signs, rows_swapped, rows_turned, columns_swapped, neighbours_exchange_bits,
    inference_mode, swapped, numpy_element,
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
        (sums,) = packed.sums([key(weight, CPU._isa[torch.float32])])
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
                assert packed.sums([key(m, isa) for m in (matrix, given, matrix)])[1] == expected
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
