// exp, sigmoid, tanh, erf for the kernels with bfloat16 products: relative error below 2^-12, a fraction of a bfloat16
// rounding (2^-9), at half the operations of elementary.h. AVX-512 only. Included inside an ISA namespace.

// 2^t: fit of 2^f on [0, 1), error below 2^-13; scalef takes the integer part from t itself.
inline F exp2_fast(F t) {
  const F f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F p = set1(0.07802478224039078f);
  p = fma(p, f, set1(0.2260667234659195f));
  p = fma(p, f, set1(0.6958337426185608f));
  p = fma(p, f, set1(0.9999251961708069f));
  return _mm512_scalef_ps(p, t);
}
constexpr float kLog2E = 1.44269504088896341f;
inline F exp_negative(F x) { return exp2_fast(x * set1(kLog2E)); }

// log(1 + e) for 0 <= e <= 1: fit of log(1 + e) / e, error below 2^-14.
inline F log1p_unit(F e) {
  F p = set1(0.041347283869981766f);
  p = fma(p, e, set1(-0.15742716193199158f));
  p = fma(p, e, set1(0.30630090832710266f));
  p = fma(p, e, set1(-0.4969778060913086f));
  return e * fma(p, e, set1(0.9999432563781738f));
}

// Fit of (2^f - 1) / f on [-1/2, 1/2], error below 2^-16.
inline F expm1_negative(F x) {
  const F t = max_second(set1(-60.0f), min_second(zero(), x) * set1(kLog2E));
  const F n = round_even(t);
  const F f = t - n;
  F q = set1(0.009618079289793968f);
  q = fma(q, f, set1(0.05583721771836281f));
  q = fma(q, f, set1(0.24023252725601196f));
  q = fma(q, f, set1(0.6931368708610535f));
  const F s = pow2(n);
  return fma(s * f, q, s - set1(1.0f));
}

// An infinite e^-a gives 0 and, in the products it enters, what the exact functions give.
inline void sigmoid_parts(F a, F& s, F& complement) {
  const F e = exp2_fast(a * set1(-kLog2E));
  s = _mm512_rcp14_ps(e + set1(1.0f));
  complement = min_second(set1(3e38f), e) * s;
}
// x P(x^2) / Q(x^2): fit on [-5, 5], error below 2^-18; saturates at 1 - 2^-13.
inline F tanh_value(F a) {
  const F x = max_second(set1(-5.0f), min_second(set1(5.0f), a));
  const F s = x * x;
  const F p = fma(fma(set1(0.0016371102537959814f), s, set1(0.11661774665117264f)), s, set1(0.9999979734420776f));
  F q = fma(set1(6.446156476158649e-05f), s, set1(0.018303819000720978f));
  q = fma(fma(q, s, set1(0.44993484020233154f)), s, set1(1.0f));
  return x * p * _mm512_rcp14_ps(q);
}
inline void tanh_both(F a, F& f, F& d) {
  f = tanh_value(a);
  d = fnma(f, f, set1(1.0f));
}
// As tanh, on [-2.8, 2.8]: error below 2^-14, saturates at 1 - 2^-13.
inline F erf_value(F a) {
  const F x = max_second(set1(-2.8f), min_second(set1(2.8f), a));
  const F s = x * x;
  const F p = fma(fma(set1(0.029582351446151733f), s, set1(0.17079204320907593f)), s, set1(1.1283432245254517f));
  F q = fma(set1(0.003597656963393092f), s, set1(0.08901848644018173f));
  q = fma(fma(q, s, set1(0.4841647744178772f)), s, set1(1.0f));
  return x * p * _mm512_rcp14_ps(q);
}
// The normal distribution function from (1 + erf(a / sqrt(2))) / 2, which stops at 2^-14 and would be multiplied by a:
// 0 from where |a| times it is below 2^-12.
inline F gelu_cdf(F a, F c) { return select(lt(a, set1(-4.0f)), zero(), c); }
