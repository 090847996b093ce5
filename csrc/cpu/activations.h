// Activations and their derivatives on vectors of floats. Included inside `namespace ffnas::FFNAS_ISA`.
//
// Bounds against the float64 value rounded to float32 (tests/kernels/test_cpu_math.py measures them over every
// exponent): exp, sigmoid, tanh, elu, erf 2.5 ulp; products with them (gelu, swish) 4 ulp of max(|f|, 2^-24 |a|);
// derivatives 4 ulp of max(|f'|, 1/4). The ISA without fused multiply-add is held to twice that.
//
// Chosen: one degree-6 exponential for everything, reduced by n ln 2 in two parts. Rejected: rational tanh (as many
// operations with its division, 3 to 5 ulp) and table lookups (fast with AVX-512 permutes only).

inline F exp_reduce(F x, F& n) {
  n = round_even(x * set1(1.44269504088896341f));
  const F r = fnma(n, set1(0.693145751953125f), x);
  return fnma(n, set1(1.42860682030941723e-6f), r);
}
// e^r - 1 for |r| <= ln(2) / 2: minimax fit of (e^r - 1 - r) / r^2, error below 2^-26 |r|.
inline F expm1_reduced(F r) {
  F q = set1(0.001393814105540514f);
  q = fma(q, r, set1(0.008366548456251621f));
  q = fma(q, r, set1(0.041666433215141296f));
  q = fma(q, r, set1(0.1666654348373413f));
  q = fma(q, r, set1(0.5f));
  return fma(r * r, q, r);
}
// e^x for x <= 0, subnormal results included; NaN stays NaN.
inline F exp_negative(F x) {
  F n;
  const F r = exp_reduce(max_second(set1(-110.0f), x), n);
  return scale(expm1_reduced(r) + set1(1.0f), n);
}
// e^x - 1 for x in [-87, 87].
inline F expm1_moderate(F x) {
  F n;
  const F r = exp_reduce(x, n);
  const F s = pow2(n);
  return fma(s, expm1_reduced(r), s - set1(1.0f));
}
// From e^-|a|: sigmoid(a), relatively accurate on both sides; its complement is 1 - sigmoid.
inline void sigmoid_parts(F a, F& s, F& complement) {
  const F e = exp_negative(zero() - absolute(a));
  const F big = reciprocal(set1(1.0f) + e);
  const F small = e * big;
  const M negative = lt(a, zero());
  s = select(negative, small, big);
  complement = select(negative, big, small);
}
inline F tanh_value(F a) {
  const F t = min_second(set1(9.1f), absolute(a));
  const F e = expm1_moderate(t + t);
  return copysign(e * reciprocal(e + set1(2.0f)), a);
}
// erf(t): odd polynomial below 0.9, 1 - exp(polynomial) above (fits of erf(t)/t - 1 in t^2 and log erfc(t) / t + 1).
inline F erf_value(F a) {
  const F t = absolute(a);
  const F s = a * a;
  F p = set1(-0.0005926078301854432f);
  p = fma(p, s, set1(0.004980852361768484f));
  p = fma(p, s, set1(-0.026758654043078423f));
  p = fma(p, s, set1(0.11281619220972061f));
  p = fma(p, s, set1(-0.3761247992515564f));
  p = fma(p, s, set1(0.12837915122509003f));
  const F near = fma(p, a, a);
  const F u = min_second(set1(4.0f), t);
  F q = set1(-1.1230014024476986e-05f);
  q = fma(q, u, set1(0.0003227940178476274f));
  q = fma(q, u, set1(-0.0036424295976758003f));
  q = fma(q, u, set1(0.023762019351124763f));
  q = fma(q, u, set1(-0.10623684525489807f));
  q = fma(q, u, set1(-0.6351513266563416f));
  q = fma(q, u, set1(-0.12864848971366882f));
  const F far = set1(1.0f) - exp_negative(fma(q, u, zero() - u));
  return select(lt(t, set1(0.9f)), near, copysign(far, a));
}

// One struct per unary operator: value f(a); both f(a) and f'(a); gradient f'(a) * b with autograd's selections.
struct Smooth {
  template <class Op>
  static F product(F a, F b) {
    F f, d;
    Op::both(a, f, d);
    return d * b;
  }
};

struct Gelu : Smooth {
  static void sigmoid_of_inner(F a, F& s, F& complement) {
    const F k = set1(static_cast<float>(2.0 * kGeluTanhScale * kGeluTanhCubic));
    sigmoid_parts(a * fma(a * a, k, set1(static_cast<float>(2.0 * kGeluTanhScale))), s, complement);
  }
  static F value(F a) {
    F s, c;
    sigmoid_of_inner(a, s, c);
    return a * s;
  }
  static void both(F a, F& f, F& d) {
    F s, c;
    sigmoid_of_inner(a, s, c);
    f = a * s;
    const F slope = fma(a * a, set1(static_cast<float>(6.0 * kGeluTanhScale * kGeluTanhCubic)),
                        set1(static_cast<float>(2.0 * kGeluTanhScale)));
    d = fma(f * c, slope, s);
  }
  static F gradient(F a, F b) { return product<Gelu>(a, b); }
};

struct Sigmoid : Smooth {
  static F value(F a) {
    F s, c;
    sigmoid_parts(a, s, c);
    return s;
  }
  static void both(F a, F& f, F& d) {
    F c;
    sigmoid_parts(a, f, c);
    d = f * c;
  }
  static F gradient(F a, F b) { return product<Sigmoid>(a, b); }
};

struct Tanh : Smooth {
  static F value(F a) { return tanh_value(a); }
  static void both(F a, F& f, F& d) {
    f = tanh_value(a);
    d = fnma(f, f, set1(1.0f));
  }
  static F gradient(F a, F b) { return product<Tanh>(a, b); }
};

struct Swish : Smooth {
  static F value(F a) { return a * Sigmoid::value(a); }
  static void both(F a, F& f, F& d) {
    F s, c;
    sigmoid_parts(a, s, c);
    f = a * s;
    d = s * fma(a, c, set1(1.0f));
  }
  static F gradient(F a, F b) { return product<Swish>(a, b); }
};

struct GeluErf : Smooth {
  static F cdf(F a) { return fma(set1(0.5f), erf_value(a * set1(0.70710678118654752f)), set1(0.5f)); }
  static F value(F a) { return a * cdf(a); }
  static void both(F a, F& f, F& d) {
    const F c = cdf(a);
    f = a * c;
    const F density = exp_negative(a * a * set1(-0.5f)) * set1(0.39894228040143268f);
    d = fma(a, density, c);
  }
  static F gradient(F a, F b) { return product<GeluErf>(a, b); }
};

struct Relu {
  static F value(F a) { return select(lt(a, zero()), zero(), a); }
  static void both(F a, F& f, F& d) {
    f = value(a);
    d = select(le(a, zero()), zero(), set1(1.0f));
  }
  static F gradient(F a, F b) { return select(le(a, zero()), zero(), b); }
};

struct LeakyRelu {
  static F slope() { return set1(static_cast<float>(kLeakyReluSlope)); }
  static F value(F a) { return select(gt(a, zero()), a, a * slope()); }
  static void both(F a, F& f, F& d) {
    f = value(a);
    d = select(gt(a, zero()), set1(1.0f), slope());
  }
  static F gradient(F a, F b) { return select(gt(a, zero()), b, b * slope()); }
};

struct Elu {
  static F expm1_clamped(F a) { return expm1_moderate(max_second(set1(-40.0f), min_second(zero(), a))); }
  static F value(F a) { return select(gt(a, zero()), a, expm1_clamped(a)); }
  static void both(F a, F& f, F& d) {
    f = value(a);
    d = select(le(a, zero()), exp_negative(a), set1(1.0f));
  }
  static F gradient(F a, F b) { return select(le(a, zero()), b * exp_negative(a), b); }
};

inline F maximum(F a, F b) { return select(is_nan(a), a, max_second(a, b)); }
// Gradient c of max(a, b) for a; ties are split in half.
inline F maximum_gradient(F a, F b, F c) {
  return select(lt(a, b), zero(), select(eq(a, b), c * set1(0.5f), c));
}
