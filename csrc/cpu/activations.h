// The unary operators and their derivatives on vectors of floats, and max. Included inside an ISA namespace, after
// elementary.h or elementary_fast.h, whose bounds they inherit: a product like gelu(a) = a * sigmoid(..) adds 1.5 ulp, and
// its deep negative tail the rounding of the exponent (absolute error below 2^-23 |f| (1 + 2 a^2)).
// Derivatives are accurate to the same bound times max(|f'|, 1).

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
    tanh_both(a, f, d);
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
  static F cdf(F a) { return gelu_cdf(a, fma(set1(0.5f), erf_value(a * set1(0.70710678118654752f)), set1(0.5f))); }
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
  static F value(F a) { return select(gt(a, zero()), a, expm1_negative(a)); }
  static void both(F a, F& f, F& d) {
    f = value(a);
    d = select(le(a, zero()), exp_negative(a), set1(1.0f));
  }
  static F gradient(F a, F b) { return select(le(a, zero()), b * exp_negative(a), b); }
};

struct Relu2 {
  static F value(F a) {
    const F r = Relu::value(a);
    return r * r;
  }
  static void both(F a, F& f, F& d) {
    f = value(a);
    d = select(le(a, zero()), zero(), a + a);
  }
  static F gradient(F a, F b) { return select(le(a, zero()), zero(), a * b + a * b); }
};

struct Softplus : Smooth {
  static F value(F a) {
    return max_second(zero(), a) + log1p_unit(exp_negative(minus_absolute(a)));
  }
  static void both(F a, F& f, F& d) {
    const F e = exp_negative(minus_absolute(a));
    const F big = reciprocal(set1(1.0f) + e);
    f = max_second(zero(), a) + log1p_unit(e);
    d = select(lt(a, zero()), e * big, big);
  }
  static F gradient(F a, F b) { return Sigmoid::value(a) * b; }
};

struct Identity {
  static F value(F a) { return a; }
  static void both(F a, F& f, F& d) {
    f = a;
    d = set1(1.0f);
  }
  static F gradient(F, F b) { return b; }
};

inline F maximum(F a, F b) { return select(is_nan(a), a, max_second(a, b)); }
// Gradient c of max(a, b) for a; ties are split in half.
inline F maximum_gradient(F a, F b, F c) {
  return select(lt(a, b), zero(), select(eq(a, b), c * set1(0.5f), c));
}
