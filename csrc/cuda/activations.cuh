// What the operators of ../activations.h are made of, for one float of one thread. exp, tanh, erf, expm1 and log1p are
// CUDA's full-precision functions (1 to 2 ulp, no fast-math).
#pragma once

#include "device.h"
#include "opcodes.h"

namespace ffnas {
namespace cuda {

#define FFNAS_FUNCTION FFNAS_DEVICE

using F = float;
using M = bool;

FFNAS_DEVICE F set1(float a) { return a; }
FFNAS_DEVICE F zero() { return 0.0f; }
FFNAS_DEVICE F fma(F a, F b, F c) { return fmaf(a, b, c); }
FFNAS_DEVICE F select(M m, F a, F b) { return m ? a : b; }
FFNAS_DEVICE M lt(F a, F b) { return a < b; }
FFNAS_DEVICE M le(F a, F b) { return a <= b; }
FFNAS_DEVICE M gt(F a, F b) { return a > b; }
FFNAS_DEVICE M eq(F a, F b) { return a == b; }
FFNAS_DEVICE M is_nan(F a) { return a != a; }
FFNAS_DEVICE F max_second(F a, F b) { return a > b ? a : b; }  // b if either is NaN
FFNAS_DEVICE F minus_absolute(F a) { return -fabsf(a); }

FFNAS_DEVICE F exp_negative(F a) { return expf(a); }
FFNAS_DEVICE F expm1_negative(F a) { return expm1f(a); }
FFNAS_DEVICE F log1p_unit(F e) { return log1pf(e); }
FFNAS_DEVICE F erf_value(F a) { return erff(a); }
FFNAS_DEVICE F tanh_value(F a) { return tanhf(a); }
FFNAS_DEVICE F gelu_cdf(F, F c) { return c; }

FFNAS_DEVICE void sigmoid_parts(F a, F& s, F& complement) {
  const F e = expf(-fabsf(a));
  const F big = reciprocal(1.0f + e);
  const F small = e * big;
  s = a < 0.0f ? small : big;
  complement = a < 0.0f ? big : small;
}
// 1 - f^2 = 4 e / (1 + e)^2 with e = exp(-2 |a|), without the left form's cancellation.
FFNAS_DEVICE void tanh_both(F a, F& f, F& d) {
  const F e = expf(-2.0f * fabsf(a));
  const F r = reciprocal(1.0f + e);
  f = tanhf(a);
  d = 4.0f * e * r * r;
}

#include "../activations.h"

}  // namespace cuda
}  // namespace ffnas
