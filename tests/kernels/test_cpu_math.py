"""The C++ backend's vector functions against float64: the bounds csrc/cpu/elementary*.h and activations.h state.

Errors are in ulp: units of the last place of the float64 value rounded to float32, subnormal spacing at least. Inputs
cover every exponent of both signs, densely around the places where formulas change over, NaN and infinities apart.
"""

import ctypes

import numpy as np
import pytest
import torch

from kernels.dispatch import available_backends, load_backend
from kernels.language.operators import OPERATORS, UNARY
from kernels.runtime.instruction_sets import ISAS, usable_isas

if available_backends()["cpu"] is not None:
    pytest.skip(f"no C++ backend: {available_backends()['cpu']}", allow_module_level=True)

LIBRARY = load_backend("cpu")._library
_POINTER = ctypes.c_void_p
LIBRARY.ffnas_unary.argtypes = [ctypes.c_int, ctypes.c_int32, ctypes.c_int32, _POINTER, _POINTER, ctypes.c_int64]
EXACT = [isa for isa in usable_isas(LIBRARY) if ISAS[isa] in ("generic", "avx2", "avx512", "amx_fp32")]
FAST = [isa for isa in usable_isas(LIBRARY) if ISAS[isa] in ("avx512bf16", "amx")]
VALUE, GRADIENT, PAIR_SLOPE, PAIR_VALUE = range(4)

ULP = {
    "sigmoid": 2.5, "tanh": 2.5, "elu": 2.5, "gelu": 4.0, "swish": 4.0, "gelu_erf": 4.0, "relu": 0.0, "leaky_relu": 0.5,
    "relu2": 0.5, "softplus": 3.0, "identity": 0.0,
}  # fmt: skip
"""Value bounds; without fused multiply-add (generic) twice that."""


def conditioning(name, value):
    """What is allowed beside the ulps, absolute: gelu's exponent -2 k a (1 + c a^2) is rounded before it is raised;
    gelu_erf's 1 + erf cancels for negative a, as PyTorch's own does; a subnormal sigmoid has few bits to multiply."""
    subnormal = 2.0**-148 * np.abs(X.astype(np.float64))
    with np.errstate(over="ignore", invalid="ignore"):
        if name == "gelu":
            return subnormal + np.nan_to_num(2.0**-23 * np.abs(value) * (1 + 2 * X.astype(np.float64) ** 2))
        if name == "gelu_erf":
            return 2.0**-23 * np.abs(X.astype(np.float64))
    return subnormal if name == "swish" else np.zeros_like(value)


def inputs():
    exponents = np.arange(-126, 128, dtype=np.int32)
    mantissas = np.random.default_rng(0).uniform(1, 2, (254, 64))
    wide = np.ldexp(mantissas, exponents[:, None]).ravel()
    dense = np.linspace(-100, 100, 200_001)
    near = np.concatenate(
        [np.linspace(c - 0.01, c + 0.01, 2001) for c in (0.0, 0.9, 9.1, -9.1, 40.0, -40.0, 87.0, -87.0)]
    )
    values = np.concatenate([wide, -wide, dense, near, [0.0, -0.0]])
    return values.astype(np.float32)


X = inputs()


def run(isa, name, mode, x=X):
    out = np.empty_like(x)
    LIBRARY.ffnas_unary(isa, OPERATORS[name].opcode, mode, x.ctypes.data, out.ctypes.data, x.size)
    return out


def exact(name, x=X):
    """(value, derivative) in float64 by PyTorch; gelu as a * sigmoid, since 1 + tanh cancels in float64 too."""
    a = torch.from_numpy(x.astype(np.float64)).requires_grad_()
    if name == "gelu":
        value = a * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * a * (1 + 0.044715 * a**2))
    else:
        value = OPERATORS[name].forward(a)
    (slope,) = torch.autograd.grad(value.sum(), a)
    return value.detach().numpy(), slope.numpy()


def isa_ids(isas):
    return [pytest.param(isa, id=ISAS[isa]) for isa in isas]


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("isa", isa_ids(EXACT))
def test_values_are_within_their_bound(isa, name):
    value, _ = exact(name)
    factor = 2 if ISAS[isa] == "generic" else 1
    with np.errstate(over="ignore"):  # relu2
        rounded = value.astype(np.float32)
    spacing = np.spacing(np.abs(np.where(np.isfinite(rounded), rounded, 0))).astype(np.float64)
    allowed = factor * (ULP[name] * spacing + conditioning(name, value)) + spacing / 2
    got = run(isa, name, VALUE)
    assert (np.isinf(got) == np.isinf(rounded)).all()
    finite = np.isfinite(rounded)
    assert (np.abs(got.astype(np.float64) - value) <= allowed)[finite].all()


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("isa", isa_ids(EXACT))
def test_derivatives_are_within_their_bound(isa, name):
    """In units of 2^-23: the bound of the value, and for the product rule's sum as much again."""
    _, slope = exact(name)
    got = run(isa, name, GRADIENT).astype(np.float64)
    moderate = np.abs(X) < 1e18  # a * a overflows beyond, in PyTorch too
    allowed = (2 * ULP[name] + 1) * (2 if ISAS[isa] == "generic" else 1) * 2.0**-23
    assert np.abs(got - slope)[moderate].max() <= allowed
    for mode in (PAIR_SLOPE, PAIR_VALUE):
        alone = run(isa, name, GRADIENT if mode == PAIR_SLOPE else VALUE)
        together = run(isa, name, mode)
        close = np.abs(together.astype(np.float64) - alone) <= allowed * np.maximum(1, np.abs(alone))
        assert (close | (together == alone) | ~moderate).all()


@pytest.mark.parametrize("isa", isa_ids(EXACT))
def test_tanh_slope_keeps_relative_accuracy_where_it_vanishes(isa):
    x = np.linspace(-30, 30, 60_001, dtype=np.float32)
    want = 1 / np.cosh(x.astype(np.float64)) ** 2
    assert (np.abs(run(isa, "tanh", GRADIENT, x) - want) / want).max() <= 16 * 2.0**-23


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("isa", isa_ids(FAST))
def test_fast_functions_are_a_fraction_of_a_bfloat16_rounding(isa, name):
    """Kernels with bfloat16 products: 2^-11 of max(|f|, 1), a quarter of bfloat16's own rounding (2^-9)."""
    value, slope = exact(name)
    moderate = np.abs(X) < 1e18
    error = np.abs(run(isa, name, VALUE) - value) / np.maximum(1, np.abs(value))
    assert error[moderate].max() <= 2.0**-11
    error = np.abs(run(isa, name, GRADIENT) - slope) / np.maximum(1, np.abs(slope))
    assert error[moderate].max() <= 2.0**-10


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("isa", isa_ids(EXACT + FAST))
def test_nan_and_infinities(isa, name):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0] * 7, dtype=np.float32)  # odd length: vectors and a remainder
    with np.errstate(invalid="ignore"):
        # in float64: float32's vector code gives NaN for gelu_erf(inf)
        got, want = run(isa, name, VALUE, x), OPERATORS[name].forward(torch.from_numpy(x).double()).numpy()
    if isa in FAST:
        np.testing.assert_allclose(got, want, atol=2.0**-11)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-6)
