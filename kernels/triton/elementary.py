"""The operators of `kernels.language.operators` as Triton functions on float32 tiles: `NAME(a)` and `NAME_dual(a, g)`.

`NAME_dual` returns (f'(a) * g, f(a)): gradient, dual and pair instructions of a program are all this one function, and
a compiler drops the half that is not used. Values at kinks, infinities and NaN are those of PyTorch's autograd.

Error: one exponential (about 2 units in the last place times the size of its argument) and one reciprocal (1 unit);
tanh and elu keep relative accuracy near 0 by a polynomial (tanh: below 0.55, odd, degree 11, 4e-9; elu: -0.5 to 0,
degree 7, 1e-10; both fitted at Chebyshev nodes); softplus has log(1 + e) / e as a polynomial of degree 9 (5e-9).

Multiply-adds are written as `fma`, and kernels are compiled with `enable_fp_fusion=False`: contraction by the compiler
would depend on what stands around an operator, and the two tiers could not give equal results.

Rejected: `tanh.approx` and libdevice. The first has 11 bits, too few for float32; the second does not run under
Triton's interpreter, so that nothing could be checked without a GPU.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are tensors, pointers and scalars of any type
from __future__ import annotations

import triton
import triton.language as tl

from kernels.language.operators import GELU_TANH_CUBIC, GELU_TANH_SCALE, LEAKY_RELU_SLOPE
from kernels.triton.primitives import power_of_two, reciprocal

# Kernels may read module constants only as `tl.constexpr`.
LOG2_E = tl.constexpr(1.4426950408889634)
GELU_SLOPE = tl.constexpr(2 * GELU_TANH_SCALE)
"""Twice sqrt(2 / pi): (1 + tanh(u)) / 2 is sigmoid(2 u)."""
GELU_CUBIC = tl.constexpr(GELU_TANH_CUBIC)
SLOPE = tl.constexpr(LEAKY_RELU_SLOPE)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _exp(a):
    return power_of_two(a * LOG2_E)


@triton.jit
def sigmoid(a):
    return reciprocal(1.0 + power_of_two(a * -LOG2_E))


@triton.jit
def sigmoid_dual(a, g):
    s = sigmoid(a)
    return g * (s * (1.0 - s)), s


@triton.jit
def tanh(a):
    s = a * a
    p = tl.fma(s, -0.00661023, 0.02130939)
    p = tl.fma(s, p, -0.05390943)
    p = tl.fma(s, p, 0.13333114)
    p = tl.fma(s, p, -0.33333332)
    small = tl.fma(s * p, a, a)
    t = power_of_two(tl.abs(a) * (-2.0 * LOG2_E))
    large = (1.0 - t) * reciprocal(1.0 + t)
    large = tl.where(a < 0.0, -large, large)
    return tl.where(tl.abs(a) < 0.55, small, large)


@triton.jit
def tanh_dual(a, g):
    t = tanh(a)
    return g * tl.fma(-t, t, 1.0), t


@triton.jit
def _gelu_sigmoid(a):
    """sigmoid(2 u), with 2 u = GELU_SLOPE (a + GELU_CUBIC a^3)."""
    e = power_of_two(a * tl.fma(a * a, -GELU_SLOPE * GELU_CUBIC * LOG2_E, -GELU_SLOPE * LOG2_E))
    return reciprocal(1.0 + e)


@triton.jit
def gelu(a):
    return a * _gelu_sigmoid(a)


@triton.jit
def gelu_dual(a, g):
    s = _gelu_sigmoid(a)
    slope = tl.fma(a * a, 3.0 * GELU_SLOPE * GELU_CUBIC, GELU_SLOPE)
    return g * tl.fma(a * (s * (1.0 - s)), slope, s), a * s


@triton.jit
def relu(a):
    return tl.where(a <= 0.0, 0.0, a)


@triton.jit
def relu_dual(a, g):
    return tl.where(a <= 0.0, 0.0, g), relu(a)


@triton.jit
def leaky_relu(a):
    return tl.where(a > 0.0, a, SLOPE * a)


@triton.jit
def leaky_relu_dual(a, g):
    return tl.where(a > 0.0, g, SLOPE * g), leaky_relu(a)


@triton.jit
def _expm1_near_zero(a):
    p = tl.fma(a, 1.64809677e-04, 1.37061873e-03)
    p = tl.fma(a, p, 8.32867180e-03)
    p = tl.fma(a, p, 4.16661249e-02)
    p = tl.fma(a, p, 1.66666644e-01)
    p = tl.fma(a, p, 0.5)
    return tl.fma(a * a, p, a)


@triton.jit
def elu(a):
    below = tl.where(a > -0.5, _expm1_near_zero(a), _exp(a) - 1.0)
    return tl.where(a <= 0.0, below, a)


@triton.jit
def elu_dual(a, g):
    return tl.where(a <= 0.0, g * _exp(a), g), elu(a)


@triton.jit
def swish(a):
    return a * sigmoid(a)


@triton.jit
def swish_dual(a, g):
    s = sigmoid(a)
    return g * (s * tl.fma(a, 1.0 - s, 1.0)), a * s


@triton.jit
def gelu_erf(a):
    return a * tl.fma(tl.erf(a * SQRT_HALF), 0.5, 0.5)


@triton.jit
def gelu_erf_dual(a, g):
    cdf = tl.fma(tl.erf(a * SQRT_HALF), 0.5, 0.5)
    density = power_of_two(a * a * (-0.5 * LOG2_E)) * INVERSE_SQRT_2PI
    return g * tl.fma(a, density, cdf), a * cdf


@triton.jit
def relu2(a):
    r = relu(a)
    return r * r


@triton.jit
def relu2_dual(a, g):
    return tl.where(a <= 0.0, 0.0, a * g + a * g), relu2(a)


@triton.jit
def _softplus_of(a, e):
    """max(a, 0) + log(1 + e), with e = exp(-|a|) at most 1."""
    p = tl.fma(e, -0.0032440233, 0.019851454)
    p = tl.fma(e, p, -0.056959517)
    p = tl.fma(e, p, 0.10603654)
    p = tl.fma(e, p, -0.15305592)
    p = tl.fma(e, p, 0.19675939)
    p = tl.fma(e, p, -0.24954134)
    p = tl.fma(e, p, 0.33329964)
    p = tl.fma(e, p, -0.49999902)
    return tl.where(a <= 0.0, 0.0, a) + tl.fma(e * e, p, e)


@triton.jit
def softplus(a):
    return _softplus_of(a, power_of_two(tl.abs(a) * -LOG2_E))


@triton.jit
def softplus_dual(a, g):
    e = power_of_two(tl.abs(a) * -LOG2_E)
    big = reciprocal(1.0 + e)
    return g * tl.where(a < 0.0, e * big, big), _softplus_of(a, e)


@triton.jit
def identity(a):
    return a


@triton.jit
def identity_dual(a, g):
    return g, a


@triton.jit
def maximum(a, b):
    """NaN if either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_factor(a, b):
    """What multiplies the gradient of max(a, b) for a; NaN operands pass it."""
    return tl.where(a < b, 0.0, tl.where(a == b, 0.5, 1.0))


@triton.jit
def selected(factor, g):
    """factor * g, with 0 where the factor is 0, whatever g is."""
    return tl.where(factor == 0.0, 0.0, factor * g)
