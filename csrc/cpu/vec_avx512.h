// Vectors of 16 floats: AVX-512 (F, BW, DQ, VL). Included inside `namespace ffnas::FFNAS_ISA`.
//
// The three vec_*.h files offer the same names; everything above them is written once. Arithmetic uses the compiler's
// operators on vector types (+ - * /); contraction is off, so a fused multiply-add happens exactly where fma() is.
// n in loadn/storen is the number of valid lanes, 0 <= n <= kLanes; the other lanes read as 0 and are not written.

using F = __m512;
using M = __mmask16;
constexpr int kLanes = 16;

inline M lanes_below(int n) { return static_cast<M>((1u << n) - 1u); }

inline F set1(float a) { return _mm512_set1_ps(a); }
inline F zero() { return _mm512_setzero_ps(); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F loadn(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes_below(n), p); }
inline F keep_lanes(F a, int n) { return _mm512_maskz_mov_ps(lanes_below(n), a); }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
// Past the caches, to a multiple of the vector's size; other threads may read it after finish_streams.
inline void stream(float* p, F a) { _mm512_stream_ps(p, a); }
inline void finish_streams() { _mm_sfence(); }
inline void storen(float* p, F a, int n) { _mm512_mask_storeu_ps(p, lanes_below(n), a); }

inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
inline F min_second(F a, F b) { return _mm512_min_ps(a, b); }       // b where either is NaN
inline F max_second(F a, F b) { return _mm512_max_ps(a, b); }       // b where either is NaN

inline M lt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline M le(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline M gt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline M eq(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline M is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
inline F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }  // m ? a : b

inline F absolute(F a) { return _mm512_abs_ps(a); }
inline F minus_absolute(F a) {
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN)));
}
inline F copysign(F magnitude, F sign) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign), _mm512_castps_si512(magnitude), 0xCA));
}
inline F round_even(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// 2^n for integral -126 <= n <= 127.
inline F pow2(F n) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
}
// The integral e with 2^e <= a < 2^(e + 1), for normal a > 0.
inline F exponent(F a) { return _mm512_getexp_ps(a); }
// p * 2^n for integral n in [-252, 252], rounded once when the result is subnormal.
inline F scale(F p, F n) { return _mm512_scalef_ps(p, n); }

// 1 / a within 1 ulp for normal a with a normal inverse.
inline F reciprocal(F a) {
  const F r = _mm512_rcp14_ps(a);
  return fma(r, fnma(a, r, set1(1.0f)), r);
}
inline F square_root(F a) { return _mm512_sqrt_ps(a); }

inline float sum(F a) { return _mm512_reduce_add_ps(a); }

// bfloat16: round to nearest even, NaN stays NaN; the hardware's conversion, used where products are bfloat16 too, also
// flushes subnormals to zero.
inline F widen(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
#ifdef FFNAS_BF16_PRODUCTS
inline __m256i narrow(F a) { return (__m256i)_mm512_cvtneps_pbh(a); }
#else
inline __m256i narrow(F a) {
  const __m512i u = _mm512_castps_si512(a);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7FFF)));
  const __m512i q = _mm512_mask_mov_epi32(r, is_nan(a), _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(q, 16));
}
#endif
inline F load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F loadn(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(lanes_below(n), p)); }
inline void store(bf16* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
inline void stream(bf16* p, F a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
inline void storen(bf16* p, F a, int n) { _mm256_mask_storeu_epi16(p, lanes_below(n), narrow(a)); }

// Rows become columns.
inline void transpose(F (&r)[16]) {
  F t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int h = 0; h < 16; h += 8)
    for (int i = 0; i < 4; ++i) {
      t[h + i] = _mm512_shuffle_f32x4(r[h + i], r[h + i + 4], 0x88);
      t[h + i + 4] = _mm512_shuffle_f32x4(r[h + i], r[h + i + 4], 0xDD);
    }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
  }
}
