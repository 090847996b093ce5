// The unary operators and their derivatives on single floats, and max.
//
// Formulas and selections are those of csrc/cpu/activations.h; exp, tanh, erf and expm1 are CUDA's full-precision
// functions (1 to 2 ulp, no fast-math). Smooth operators share one exponential between f and f'. `both` gives f(a) and
// a d with gradient f'(a) * b == d * b bit for bit, NaN and infinities included; relu and relu2 alone must select, as
// 0 * inf is NaN, and relu2 must not overflow before it multiplies.
#pragma once

#include "../opcodes.h"
#include "device.h"

namespace ffnas {
namespace cuda {

// sigmoid(a), relatively accurate on both sides, and 1 - sigmoid(a).
FFNAS_DEVICE void sigmoid_parts(float a, float& s, float& complement) {
  const float e = expf(-fabsf(a));
  const float big = reciprocal(1.0f + e);
  const float small = e * big;
  s = a < 0.0f ? small : big;
  complement = a < 0.0f ? big : small;
}

struct Gelu {
  static FFNAS_DEVICE void sigmoid_of_inner(float a, float& s, float& complement) {
    constexpr float kScale = static_cast<float>(2.0 * kGeluTanhScale);
    constexpr float kCubic = static_cast<float>(2.0 * kGeluTanhScale * kGeluTanhCubic);
    sigmoid_parts(a * fmaf(a * a, kCubic, kScale), s, complement);
  }
  static FFNAS_DEVICE float value(float a) {
    float s, c;
    sigmoid_of_inner(a, s, c);
    return a * s;
  }
  static FFNAS_DEVICE void both(float a, float& f, float& d) {
    constexpr float kScale = static_cast<float>(2.0 * kGeluTanhScale);
    constexpr float kCubic = static_cast<float>(6.0 * kGeluTanhScale * kGeluTanhCubic);
    float s, c;
    sigmoid_of_inner(a, s, c);
    f = a * s;
    d = fmaf(f * c, fmaf(a * a, kCubic, kScale), s);
  }
};

struct Sigmoid {
  static FFNAS_DEVICE float value(float a) {
    float s, c;
    sigmoid_parts(a, s, c);
    return s;
  }
  static FFNAS_DEVICE void both(float a, float& f, float& d) {
    float c;
    sigmoid_parts(a, f, c);
    d = f * c;
  }
};

struct Tanh {
  static FFNAS_DEVICE float value(float a) { return tanhf(a); }
  static FFNAS_DEVICE void both(float a, float& f, float& d) {
    // 1 - f^2 = 4 e / (1 + e)^2 with e = exp(-2 |a|), without the left form's cancellation
    const float e = expf(-2.0f * fabsf(a));
    const float r = reciprocal(1.0f + e);
    f = tanhf(a);
    d = 4.0f * e * r * r;
  }
};

struct Relu {
  static FFNAS_DEVICE float value(float a) { return a < 0.0f ? 0.0f : a; }
  static FFNAS_DEVICE void both(float a, float& f, float& d) {
    f = value(a);
    d = a <= 0.0f ? 0.0f : 1.0f;
  }
};

struct LeakyRelu {
  static FFNAS_DEVICE float value(float a) { return a > 0.0f ? a : a * static_cast<float>(kLeakyReluSlope); }
  static FFNAS_DEVICE void both(float a, float& f, float& d) {
    f = value(a);
    d = a > 0.0f ? 1.0f : static_cast<float>(kLeakyReluSlope);
  }
};

struct Elu {
  static FFNAS_DEVICE float value(float a) { return a > 0.0f ? a : expm1f(a); }
  static FFNAS_DEVICE void both(float a, float& f, float& d) {
    f = value(a);
    d = a <= 0.0f ? expf(a) : 1.0f;
  }
};

struct Swish {
  static FFNAS_DEVICE float value(float a) { return a * Sigmoid::value(a); }
  static FFNAS_DEVICE void both(float a, float& f, float& d) {
    float s, c;
    sigmoid_parts(a, s, c);
    f = a * s;
    d = s * fmaf(a, c, 1.0f);
  }
};

struct GeluErf {
  static FFNAS_DEVICE float cdf(float a) { return fmaf(0.5f, erff(a * 0.70710678118654752f), 0.5f); }
  static FFNAS_DEVICE float value(float a) { return a * cdf(a); }
  static FFNAS_DEVICE void both(float a, float& f, float& d) {
    const float c = cdf(a);
    f = a * c;
    d = fmaf(a, expf(a * a * -0.5f) * 0.39894228040143268f, c);
  }
};

struct Relu2 {
  static FFNAS_DEVICE float value(float a) {
    const float r = Relu::value(a);
    return r * r;
  }
  static FFNAS_DEVICE void both(float a, float& f, float& d) {
    f = value(a);
    d = a <= 0.0f ? 0.0f : a + a;
  }
  static FFNAS_DEVICE float gradient(float a, float b) { return a <= 0.0f ? 0.0f : a * b + a * b; }
};

struct Softplus {
  static FFNAS_DEVICE float value(float a) { return (a < 0.0f ? 0.0f : a) + log1pf(expf(-fabsf(a))); }
  static FFNAS_DEVICE void both(float a, float& f, float& d) {
    const float e = expf(-fabsf(a));
    const float big = reciprocal(1.0f + e);
    f = (a < 0.0f ? 0.0f : a) + log1pf(e);
    d = a < 0.0f ? e * big : big;
  }
};

struct Identity {
  static FFNAS_DEVICE float value(float a) { return a; }
  static FFNAS_DEVICE void both(float a, float& f, float& d) {
    f = a;
    d = 1.0f;
  }
};

FFNAS_DEVICE float maximum(float a, float b) { return a != a || a > b ? a : b; }
// Gradient c of max(a, b) for a; ties are split in half.
FFNAS_DEVICE float maximum_gradient(float a, float b, float c) { return a < b ? 0.0f : a == b ? c * 0.5f : c; }

}  // namespace cuda
}  // namespace ffnas
