// The mathematics of the unary operators, and max: one struct per row of kernels/language/operators.py, which a
// switch over FFNAS_UNARY_OPERATORS (opcodes.h) looks up by its name. A row without a struct here does not compile.
//
// One text for CPU and GPU. It is included inside a namespace that has defined
//   F, M                 the numbers an operator works on, and what a comparison of two gives: vectors of floats and
//                        their masks (csrc/cpu/vec_*.h), or one float and a bool (csrc/cuda/activations.cuh)
//   FFNAS_FUNCTION       what stands before a function: `inline`, or CUDA's qualifiers
//   set1, zero, fma, select, lt, le, gt, eq, is_nan, max_second, minus_absolute, reciprocal
//   exp_negative(a)      e^a for a <= 0               expm1_negative(a)  e^a - 1 for a <= 0
//   log1p_unit(e)        log(1 + e) for 0 <= e <= 1   erf_value(a), tanh_value(a), gelu_cdf(a, cdf)
//   sigmoid_parts(a, s, c)  s = sigmoid(a), c = 1 - s, both relatively accurate
//   tanh_both(a, f, d)      f = tanh(a), d = 1 - f^2
//
// Every struct has
//   value(a)             f(a)
//   both(a, f, d)        f = f(a), d = f'(a): smooth operators share one exponential between the two
//   gradient(a, b, d)    f'(a) * b, given d = f'(a), with autograd's selections: relu and relu2 select, as 0 * inf is
//                        NaN, and relu2 must not overflow before it multiplies; for all others it is d * b
//
// Errors are those of the functions above: a product like gelu(a) = a * sigmoid(..) adds 1.5 ulp, and its deep negative
// tail the rounding of the exponent (absolute error below 2^-23 |f| (1 + 2 a^2)). Derivatives are accurate to the same
// bound times max(|f'|, 1).

struct Product {
  static FFNAS_FUNCTION F gradient(F, F b, F d) { return d * b; }
};

// a * sigmoid(2 u) with u = kGeluTanhScale (a + kGeluTanhCubic a^3), since (1 + tanh(u)) / 2 = sigmoid(2 u).
struct Gelu : Product {
  static FFNAS_FUNCTION void sigmoid_of_inner(F a, F& s, F& complement) {
    const F k = set1(static_cast<float>(2.0 * kGeluTanhScale * kGeluTanhCubic));
    sigmoid_parts(a * fma(a * a, k, set1(static_cast<float>(2.0 * kGeluTanhScale))), s, complement);
  }
  static FFNAS_FUNCTION F value(F a) {
    F s, c;
    sigmoid_of_inner(a, s, c);
    return a * s;
  }
  static FFNAS_FUNCTION void both(F a, F& f, F& d) {
    F s, c;
    sigmoid_of_inner(a, s, c);
    f = a * s;
    const F slope = fma(a * a, set1(static_cast<float>(6.0 * kGeluTanhScale * kGeluTanhCubic)),
                        set1(static_cast<float>(2.0 * kGeluTanhScale)));
    d = fma(f * c, slope, s);
  }
};

struct Sigmoid : Product {
  static FFNAS_FUNCTION F value(F a) {
    F s, c;
    sigmoid_parts(a, s, c);
    return s;
  }
  static FFNAS_FUNCTION void both(F a, F& f, F& d) {
    F c;
    sigmoid_parts(a, f, c);
    d = f * c;
  }
};

struct Tanh : Product {
  static FFNAS_FUNCTION F value(F a) { return tanh_value(a); }
  static FFNAS_FUNCTION void both(F a, F& f, F& d) { tanh_both(a, f, d); }
};

struct Swish : Product {
  static FFNAS_FUNCTION F value(F a) { return a * Sigmoid::value(a); }
  static FFNAS_FUNCTION void both(F a, F& f, F& d) {
    F s, c;
    sigmoid_parts(a, s, c);
    f = a * s;
    d = s * fma(a, c, set1(1.0f));
  }
};

struct GeluErf : Product {
  static FFNAS_FUNCTION F cdf(F a) {
    return gelu_cdf(a, fma(set1(0.5f), erf_value(a * set1(0.70710678118654752f)), set1(0.5f)));
  }
  static FFNAS_FUNCTION F value(F a) { return a * cdf(a); }
  static FFNAS_FUNCTION void both(F a, F& f, F& d) {
    const F c = cdf(a);
    f = a * c;
    const F density = exp_negative(a * a * set1(-0.5f)) * set1(0.39894228040143268f);
    d = fma(a, density, c);
  }
};

struct Relu {
  static FFNAS_FUNCTION F value(F a) { return select(lt(a, zero()), zero(), a); }
  static FFNAS_FUNCTION void both(F a, F& f, F& d) {
    f = value(a);
    d = select(le(a, zero()), zero(), set1(1.0f));
  }
  static FFNAS_FUNCTION F gradient(F a, F b, F) { return select(le(a, zero()), zero(), b); }
};

struct LeakyRelu : Product {
  static FFNAS_FUNCTION F slope() { return set1(static_cast<float>(kLeakyReluSlope)); }
  static FFNAS_FUNCTION F value(F a) { return select(gt(a, zero()), a, a * slope()); }
  static FFNAS_FUNCTION void both(F a, F& f, F& d) {
    f = value(a);
    d = select(gt(a, zero()), set1(1.0f), slope());
  }
};

struct Elu : Product {
  static FFNAS_FUNCTION F value(F a) { return select(gt(a, zero()), a, expm1_negative(a)); }
  static FFNAS_FUNCTION void both(F a, F& f, F& d) {
    f = value(a);
    d = select(le(a, zero()), exp_negative(a), set1(1.0f));
  }
};

struct Relu2 {
  static FFNAS_FUNCTION F value(F a) {
    const F r = Relu::value(a);
    return r * r;
  }
  static FFNAS_FUNCTION void both(F a, F& f, F& d) {
    f = value(a);
    d = select(le(a, zero()), zero(), a + a);
  }
  static FFNAS_FUNCTION F gradient(F a, F b, F) { return select(le(a, zero()), zero(), a * b + a * b); }
};

struct Softplus : Product {
  static FFNAS_FUNCTION F value(F a) { return max_second(zero(), a) + log1p_unit(exp_negative(minus_absolute(a))); }
  static FFNAS_FUNCTION void both(F a, F& f, F& d) {
    const F e = exp_negative(minus_absolute(a));
    const F big = reciprocal(set1(1.0f) + e);
    f = max_second(zero(), a) + log1p_unit(e);
    d = select(lt(a, zero()), e * big, big);
  }
};

struct Identity : Product {
  static FFNAS_FUNCTION F value(F a) { return a; }
  static FFNAS_FUNCTION void both(F a, F& f, F& d) {
    f = a;
    d = set1(1.0f);
  }
};

FFNAS_FUNCTION F maximum(F a, F b) { return select(is_nan(a), a, max_second(a, b)); }
// Gradient c of max(a, b) for a; ties are split in half.
FFNAS_FUNCTION F maximum_gradient(F a, F b, F c) {
  return select(lt(a, b), zero(), select(eq(a, b), c * set1(0.5f), c));
}
