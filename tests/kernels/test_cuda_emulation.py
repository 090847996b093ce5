"""The CUDA interpreter and functions, run through the emulation, and the emulation's own checks.

Random programs are compared with PyTorch operations in float64 (`kernels.language.execute`), instruction lists longer
than the packed area included. The emulation uses the C library's exp, tanh and erf where a GPU uses its own (both
within 2 ulp); everything else is the code the GPU runs.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from random import Random

import pytest
import torch
from cuda_cases import UNIT, complaints, stack
from cuda_emulation import emulation_path
from ffn_cases import random_case

from kernels.cuda import grouped, library, rows
from kernels.language.execute import run_segment
from kernels.language.lowering import lower
from kernels.language.operators import OPERATORS, UNARY
from kernels.language.program import Flag, Segment
from kernels.language.validation import checked_words

SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 3e38, -3e38, 88.8, -104.0, 1e-8]


@pytest.fixture(autouse=True)
def emulated():
    with library.emulated(emulation_path()):
        yield


def post(text, x, y, grad):
    """(value, dy, dx) of a bare post segment through the row kernels."""
    s = stack(text, 1, x.shape[1], 3, layer_norm=False)
    s.call.x = x
    out, _ = rows.forward(s.call, 0, x, y, None, None, False)
    dy, _, dx, *_ = rows.backward(s.call, 0, grad, x, y, None, None, None)
    return out, dy, dx


@pytest.mark.parametrize("name", UNARY)
def test_unary_operators_and_slopes(name):
    """Values within 4 units in the last place, of the value or of the terms that cancel in it (gelu's tail); slopes of
    the larger of slope and 1. Two functions of 2 units each, at worst.
    """
    y = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 0, 301), -torch.logspace(-30, 0, 301)])[None]
    out, dy, _ = post(f"{name}(linear(gelu(linear(x,wb1)),wb2))", torch.zeros_like(y), y, torch.ones_like(y))
    exact = y.double()
    value, slope = OPERATORS[name].forward(exact), OPERATORS[name].gradient(exact, torch.ones_like(exact))
    scale = value.abs()
    if name in ("gelu", "gelu_erf"):
        scale = torch.where(exact < 0, torch.maximum(scale * (1 + 2 * exact**2), exact.abs() * 2.0**-3), scale)
    assert ((out.double() - value).abs() <= 4 * 2 * UNIT[torch.float32] * scale + 1e-37).all()
    assert ((dy.double() - slope).abs() <= 8 * UNIT[torch.float32] * slope.abs().clamp_min(1)).all()


@pytest.mark.parametrize("name", [*(n for n in UNARY if n != "gelu_erf"), "add", "mul", "max"])
def test_special_values_come_out_as_pytorch_has_them(name):
    """NaN where PyTorch has NaN, the same infinities and zeros, also in gradients and for ties of max.

    Left out, where PyTorch disagrees with itself or saturates earlier: gelu_erf (NaN at infinity in its vectorized
    form), elu's slope at NaN (1 or NaN, by position), and infinite gradients through a sigmoid that has rounded to 1.
    """
    text = f"{name}({'' if name in UNARY else 'x,'}linear(gelu(linear(x,wb1)),wb2))"
    y = torch.tensor([SPECIAL * len(SPECIAL)])
    x = torch.tensor([[v for v in SPECIAL for _ in SPECIAL]])
    if name == "elu":
        y = y.nan_to_num(nan=-1.0, posinf=float("inf"), neginf=-float("inf"))
    for g in (1.0, float("nan"), 0.0) if name == "sigmoid" else (1.0, float("inf"), float("nan"), 0.0):
        grad = torch.full_like(y, g)
        out, dy, dx = post(text, x, y, grad)
        words = checked_words(lower(text).tensor)
        value, *_ = run_segment(words, Segment.POST, x, y)
        _, dx_exact, dy_exact, _ = run_segment(words, Segment.POST_BWD, x, y, None, grad)
        pairs = [(out, value), (dy, dy_exact), *([(dx, dx_exact)] if dx_exact is not None else [])]
        for own, expected in pairs:
            assert torch.equal(own.isnan(), expected.isnan())
            assert torch.equal(own.isinf(), expected.isinf())
            rest = expected.isfinite() & own.isfinite()
            assert torch.allclose(own[rest], expected[rest], rtol=1e-5, atol=1e-37)


def test_random_programs():
    """Whole FFNs at random: serial and parallel, both policies, d below and above H; cuda_cases.py has the rule."""
    rng = Random(7)
    found = []
    for seed in range(40):
        case = random_case(rng, (7, 16, 33), (9, 16))
        norm = seed % 4 != 0
        s = stack(
            str(case.expression), case.tokens, case.hidden, case.inner, policy=case.policy, layer_norm=norm,
            p_drop=0.2 if norm and seed % 3 == 0 else 0.0, seed=seed,
            dtype=(torch.float32, torch.float16)[seed % 2],
        )  # fmt: skip
        (out,), saved = grouped.forward([s.call], True)
        (gradients,) = grouped.backward([s.call], [s.grad_out], saved, [[True] * len(s.inputs)])
        bad = complaints(s, [out, *gradients])
        if bad and "relu" not in s.text and "max" not in s.text:  # a kink decided the other way is off by the jump
            found += bad
    assert not found, "\n".join(found)


def test_segments_longer_than_the_packed_area():
    """A post of several hundred instructions: the tail is read from memory, temporaries take many slots."""
    text = product = "linear(gelu(linear(x,wb1)),wb2)"
    for k in range(7):
        gate = f"{'tanh' if k % 2 else 'sigmoid'}({text.replace(product, 'x')})"
        text = f"add(mul({text},{gate}),x)"
    s = stack(text, 3, 9, 5, layer_norm=False, dtype=torch.float32)
    words = checked_words(s.call.program)
    y = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    out, _ = rows.forward(s.call, 0, s.call.x, y, None, None, False)
    dy, _, dx, *_ = rows.backward(s.call, 0, s.grad_out, s.call.x, y, None, None, None)
    leaves = [s.call.x.double().requires_grad_(), y.double().requires_grad_()]
    value, *_ = run_segment(words, Segment.POST, *leaves)
    expected = [value, *torch.autograd.grad(value, leaves, s.grad_out.double())]
    for own, exact in zip((out, dx, dy), expected, strict=True):
        assert torch.allclose(own.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.detach().abs().max()))
    assert words[8] > 192


def test_programs_are_read_from_memory_at_every_launch():
    from kernels.cuda.programs import device_program

    s = stack("tanh(linear(gelu(linear(x,wb1)),wb2))", 3, 9, 5, layer_norm=False)
    other = lower("sigmoid(linear(gelu(linear(x,wb1)),wb2))")
    copy = device_program(s.call.program, s.call.x.device)
    assert copy.words.data_ptr() == s.call.program.data_ptr()  # on the CPU there is nothing to copy
    y = torch.ones(3, 9)
    first, _ = rows.forward(s.call, 0, s.call.x, y, None, None, False)
    s.call.program = other.tensor
    second, _ = rows.forward(s.call, 0, s.call.x, y, None, None, False)
    assert torch.allclose(first, y.tanh())
    assert torch.allclose(second, y.sigmoid())
    assert Flag(other.flags) & Flag.POST_SINGLE


BROKEN = """
#include "{folder}/emulate.cpp"
using namespace ffnas::cuda;
void past_the_end() {{ shared_memory()[64] = 1; }}
void lost_barrier() {{ if (thread() < 7) sync_threads(); else sync_warp(); }}
void unwritten(float* out) {{ *out = reinterpret_cast<float*>(shared_memory())[3]; }}
FFNAS_EXPORT void past_the_end_run() {{ launch(past_the_end, 1, 32, 64, nullptr); }}
FFNAS_EXPORT void lost_barrier_run() {{ launch(lost_barrier, 1, 32, 64, nullptr); }}
FFNAS_EXPORT float unwritten_run() {{ float v = 0; launch(unwritten, 1, 32, 64, nullptr, &v); return v; }}
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Path of a library of kernels with mistakes in them."""
    from cuda_emulation import FLAGS

    from kernels.build import find_compiler, run_compiler, source_folder

    emulation_path()
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken.cpp").write_text(BROKEN.format(folder=source_folder() / "cuda" / "emulation"))
    assert run_compiler([find_compiler(), *FLAGS, str(folder / "broken.cpp"), "-o", str(folder / "broken.so")]) is None
    return folder / "broken.so"


def test_emulation_starts_shared_memory_as_nan(broken):
    opened = ctypes.CDLL(str(broken))
    opened.unwritten_run.restype = ctypes.c_float
    value = opened.unwritten_run()
    assert value != value


@pytest.mark.parametrize(("kernel", "message"), [("past_the_end", ""), ("lost_barrier", "not reached by all threads")])
def test_emulation_stops_at_mistakes(broken, kernel, message):
    code = f"import ctypes; ctypes.CDLL({str(broken)!r}).{kernel}_run()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode < 0
    assert message in result.stderr
