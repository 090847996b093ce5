// exp, sigmoid, tanh, erf to float32 accuracy. Included inside an ISA namespace; elementary_fast.h offers the same
// names.
//
// Against the float64 value rounded to float32 (tests/kernels/test_cpu_math.py, over every exponent): exp 1 ulp,
// sigmoid 2.5, tanh 2.5, expm1 2.5, log(1 + e^-t) 2.5, erf 2; without fused multiply-add up to twice that.
//
// Chosen: one exponential for everything, reduced by n ln 2 in two parts, minimax polynomial of degree 6. Rejected:
// rational tanh (fewer operations, 3 to 5 ulp) and table lookups (fast with AVX-512 permutes only).

// x = n ln 2 + r with |r| <= ln(2) / 2; adding and subtracting 1.5 * 2^23 rounds to an integer.
inline F exp_reduce(F x, F& n) {
  const F magic = set1(12582912.0f);
  n = fma(x, set1(1.44269504088896341f), magic) - magic;
  const F r = fnma(n, set1(0.693145751953125f), x);
  return fnma(n, set1(1.42860682030941723e-6f), r);
}
// e^r - 1: fit of (e^r - 1 - r) / r^2, error below 2^-26 |r|.
inline F expm1_reduced(F r) {
  F q = set1(0.001393814105540514f);
  q = fma(q, r, set1(0.008366548456251621f));
  q = fma(q, r, set1(0.041666433215141296f));
  q = fma(q, r, set1(0.1666654348373413f));
  q = fma(q, r, set1(0.5f));
  return fma(r * r, q, r);
}
// e^x for x <= 0, subnormal results included.
inline F exp_negative(F x) {
  F n;
  const F r = exp_reduce(max_second(set1(-110.0f), x), n);
  return scale(expm1_reduced(r) + set1(1.0f), n);
}
// e^x - 1 for |x| <= 80.
inline F expm1_moderate(F x) {
  F n;
  const F r = exp_reduce(x, n);
  const F s = pow2(n);
  return fma(s, expm1_reduced(r), s - set1(1.0f));
}
inline F expm1_negative(F x) { return expm1_moderate(max_second(set1(-40.0f), min_second(zero(), x))); }

// sigmoid(a), relatively accurate on both sides, and 1 - sigmoid(a).
inline void sigmoid_parts(F a, F& s, F& complement) {
  const F e = exp_negative(minus_absolute(a));
  const F big = reciprocal(set1(1.0f) + e);
  const F small = e * big;
  const M negative = lt(a, zero());
  s = select(negative, small, big);
  complement = select(negative, big, small);
}
inline F tanh_value(F a) {
  const F t = max_second(set1(-9.1f), min_second(set1(9.1f), a));
  const F e = expm1_moderate(t + t);
  return e * reciprocal(e + set1(2.0f));
}
// tanh(a), and 1 - tanh(a)^2 = (1 - |tanh|)(1 + |tanh|) without the cancellation of the left form.
inline void tanh_both(F a, F& f, F& d) {
  const F t = min_second(set1(40.0f), absolute(a));
  const F e = expm1_moderate(t + t);
  const F r = reciprocal(e + set1(2.0f));
  const F magnitude = min_second(set1(1.0f), e * r);
  f = copysign(magnitude, a);
  d = (r + r) * (magnitude + set1(1.0f));
}
// log(1 + e) for 0 <= e <= 1: fit of log(1 + e) / e, error below 2^-27.
inline F log1p_unit(F e) {
  F p = set1(-0.0032440233044326305f);
  p = fma(p, e, set1(0.019851453602313995f));
  p = fma(p, e, set1(-0.05695951730012894f));
  p = fma(p, e, set1(0.10603653639554977f));
  p = fma(p, e, set1(-0.15305592119693756f));
  p = fma(p, e, set1(0.1967593878507614f));
  p = fma(p, e, set1(-0.24954134225845337f));
  p = fma(p, e, set1(0.3332996368408203f));
  p = fma(p, e, set1(-0.4999990165233612f));
  return fma(e * e, p, e);
}
// Odd polynomial below 0.9, 1 - exp(polynomial) above: fits of erf(t) / t - 1 in t^2 and of log(erfc(t)) / t + 1.
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
// The normal distribution function from (1 + erf(a / sqrt(2))) / 2, which reaches 0 and 1 by itself here.
inline F gelu_cdf(F, F c) { return c; }
