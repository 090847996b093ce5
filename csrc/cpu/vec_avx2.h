// Vectors of 8 floats: AVX2 with FMA. The same names as vec_avx512.h, which documents them.

using F = __m256;
using M = __m256;
constexpr int kLanes = 8;

inline __m256i lanes_below(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline F set1(float a) { return _mm256_set1_ps(a); }
inline F zero() { return _mm256_setzero_ps(); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F loadn(const float* p, int n) { return _mm256_maskload_ps(p, lanes_below(n)); }
inline F keep_lanes(F a, int n) { return _mm256_and_ps(a, _mm256_castsi256_ps(lanes_below(n))); }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
inline void stream(float* p, F a) { _mm256_stream_ps(p, a); }
inline void finish_streams() { _mm_sfence(); }
inline void storen(float* p, F a, int n) { _mm256_maskstore_ps(p, lanes_below(n), a); }

inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
inline F min_second(F a, F b) { return _mm256_min_ps(a, b); }
inline F max_second(F a, F b) { return _mm256_max_ps(a, b); }

inline M lt(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline M le(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
inline M gt(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline M eq(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline M is_nan(F a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
inline F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }

inline F absolute(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F minus_absolute(F a) { return _mm256_or_ps(_mm256_set1_ps(-0.0f), a); }
inline F copysign(F magnitude, F sign) {
  const F bit = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign));
}
inline F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline F pow2(F n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
inline F scale(F p, F n) {
  const F half = round_even(n * set1(0.5f));
  return p * pow2(half) * pow2(n - half);
}

inline F reciprocal(F a) { return set1(1.0f) / a; }
inline F square_root(F a) { return _mm256_sqrt_ps(a); }

inline float sum(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

inline F widen(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
inline __m128i narrow(F a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7FFF)));
  const __m256 q =
      _mm256_blendv_ps(_mm256_castsi256_ps(r), _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), is_nan(a));
  const __m256i h = _mm256_srli_epi32(_mm256_castps_si256(q), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}
inline F load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline F loadn(const bf16* p, int n) {
  bf16 part[kLanes] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
inline void store(bf16* p, F a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
inline void stream(bf16* p, F a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
inline void storen(bf16* p, F a, int n) {
  bf16 part[kLanes];
  store(part, a);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

inline void transpose(F (&r)[8]) {
  F t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
