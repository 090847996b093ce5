// Vectors of 4 floats in the compiler's portable vector extension, for any processor. The same names as
// vec_avx512.h, which documents them. There is no fused multiply-add here: fma(a, b, c) rounds twice.

typedef float F __attribute__((vector_size(16)));
typedef int32_t M __attribute__((vector_size(16)));
constexpr int kLanes = 4;

inline F set1(float a) { return F{a, a, a, a}; }
inline F zero() { return F{0, 0, 0, 0}; }
inline F load(const float* p) {
  F a;
  __builtin_memcpy(&a, p, sizeof(F));
  return a;
}
inline F loadn(const float* p, int n) {
  F a = zero();
  for (int i = 0; i < n; ++i) a[i] = p[i];
  return a;
}
inline F keep_lanes(F a, int n) {
  for (int i = n; i < kLanes; ++i) a[i] = 0.0f;
  return a;
}
inline void store(float* p, F a) { __builtin_memcpy(p, &a, sizeof(F)); }
inline void stream(float* p, F a) { store(p, a); }
inline void finish_streams() {}
inline void storen(float* p, F a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a[i];
}

inline F fma(F a, F b, F c) { return a * b + c; }
inline F fnma(F a, F b, F c) { return c - a * b; }

inline M lt(F a, F b) { return a < b; }
inline M le(F a, F b) { return a <= b; }
inline M gt(F a, F b) { return a > b; }
inline M eq(F a, F b) { return a == b; }
inline M is_nan(F a) { return a != a; }
inline F select(M m, F a, F b) { return (F)((m & (M)a) | (~m & (M)b)); }
inline F min_second(F a, F b) { return select(lt(a, b), a, b); }
inline F max_second(F a, F b) { return select(gt(a, b), a, b); }

inline F absolute(F a) { return (F)((M)a & 0x7FFFFFFF); }
inline F minus_absolute(F a) { return (F)((M)a | INT32_MIN); }
inline F copysign(F magnitude, F sign) { return (F)(((M)magnitude & 0x7FFFFFFF) | ((M)sign & INT32_MIN)); }
// Exact for |a| < 2^22, which is all the callers need.
inline F round_even(F a) {
  const F magic = set1(12582912.0f);
  return (a + magic) - magic;
}

inline F pow2(F n) {
  M e;
  for (int i = 0; i < kLanes; ++i) e[i] = static_cast<int32_t>(n[i]) + 127;
  return (F)(e << 23);
}
inline F exponent(F a) {
  const M e = (M)a >> 23;
  F out = zero();
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<float>(e[i] - 127);
  return out;
}
inline F scale(F p, F n) {
  const F half = round_even(n * set1(0.5f));
  return p * pow2(half) * pow2(n - half);
}

inline F reciprocal(F a) { return set1(1.0f) / a; }
inline F square_root(F a) {
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}

inline float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }

inline F load(const bf16* p) {
  M u;
  for (int i = 0; i < kLanes; ++i) u[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16);
  return (F)u;
}
inline F loadn(const bf16* p, int n) {
  M u = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) u[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16);
  return (F)u;
}
inline void storen(bf16* p, F a, int n) {
  const M u = (M)a;
  for (int i = 0; i < n; ++i) {
    const uint32_t w = static_cast<uint32_t>(u[i]);
    const bool nan = (w & 0x7FFFFFFFu) > 0x7F800000u;
    p[i] = nan ? bf16{0x7FC0} : static_cast<bf16>((w + 0x7FFFu + ((w >> 16) & 1u)) >> 16);
  }
}
inline void store(bf16* p, F a) { storen(p, a, kLanes); }
inline void stream(bf16* p, F a) { store(p, a); }

inline void transpose(F (&r)[4]) {
  F t[4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) t[j][i] = r[i][j];
  for (int i = 0; i < 4; ++i) r[i] = t[i];
}
