// Vectors of 32-bit integers, as many as a vector of floats has, and the dot product of eight-bit codes in their words.
// Included inside an ISA namespace after its vec_*.h.
//
// A word of 32 bits holds kPerWord codes of a row or of a weight's output, neighbours along the depth: four bytes where
// the processor multiplies unsigned bytes by signed ones, else two 16-bit numbers. The byte product of plain AVX2 is
// not used: it adds two products in 16 bits and saturates.

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__AMX_INT8__)
using Code = uint8_t;
using WeightCode = int8_t;
constexpr int kPerWord = 4;
#else
using Code = int16_t;
using WeightCode = int16_t;
constexpr int kPerWord = 2;
#endif

#if defined(__AVX512F__)
using I = __m512i;
inline I set1_i(int32_t a) {
  return _mm512_set1_epi32(a);
}
inline I load_i(const int32_t* p) {
  return _mm512_loadu_si512(p);
}
inline void store_i(int32_t* p, I a) {
  _mm512_storeu_si512(p, a);
}
inline I minus_i(I a, I b) {
  return _mm512_sub_epi32(a, b);
}
inline I times_i(I a, I b) {
  return _mm512_mullo_epi32(a, b);
}
inline F to_float(I a) {
  return _mm512_cvtepi32_ps(a);
}
// Codes of 16 numbers that are already divided by the scale; NaN gives 0.
inline void store_codes(Code* p, F a, I zero_code) {
  const I code = _mm512_max_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(a), zero_code), _mm512_setzero_si512());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(code));
}
#ifdef __AVX512VNNI__
inline I dot(I sum, I codes, I weights) {
  return _mm512_dpbusd_epi32(sum, codes, weights);
}
#endif
// The least and the largest lane, NaN where one is.
inline float least_lane(F a) {
  return is_nan(a) != 0 ? __builtin_nanf("") : _mm512_reduce_min_ps(a);
}
inline float largest_lane(F a) {
  return _mm512_reduce_max_ps(a);
}

#elif defined(__AVX2__)
using I = __m256i;
inline I set1_i(int32_t a) {
  return _mm256_set1_epi32(a);
}
inline I load_i(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline void store_i(int32_t* p, I a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
}
inline I minus_i(I a, I b) {
  return _mm256_sub_epi32(a, b);
}
inline I times_i(I a, I b) {
  return _mm256_mullo_epi32(a, b);
}
inline F to_float(I a) {
  return _mm256_cvtepi32_ps(a);
}
inline void store_codes(Code* p, F a, I zero_code) {
  const I code =
      _mm256_min_epi32(_mm256_max_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(a), zero_code), _mm256_setzero_si256()),
                       _mm256_set1_epi32(255));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
  if (sizeof(Code) == 2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
  else
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
#ifdef __AVXVNNI__
inline I dot(I sum, I codes, I weights) {
  return _mm256_dpbusd_avx_epi32(sum, codes, weights);
}
#else
inline I dot(I sum, I codes, I weights) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, weights));
}
#endif

#else
using I = M;
inline I set1_i(int32_t a) {
  return I{a, a, a, a};
}
inline I load_i(const int32_t* p) {
  I a;
  __builtin_memcpy(&a, p, sizeof(I));
  return a;
}
inline void store_i(int32_t* p, I a) {
  __builtin_memcpy(p, &a, sizeof(I));
}
inline I minus_i(I a, I b) {
  return a - b;
}
inline I times_i(I a, I b) {
  return a * b;
}
inline F to_float(I a) {
  return __builtin_convertvector(a, F);
}
inline void store_codes(Code* p, F a, I zero_code) {
  const F rounded = round_even(a) + to_float(zero_code);
  for (int i = 0; i < kLanes; ++i)
    p[i] = static_cast<Code>(rounded[i] > 255.0f ? 255.0f : rounded[i] > 0.0f ? rounded[i] : 0.0f);
}
inline I dot(I sum, I codes, I weights) {
  return sum + ((codes << 16) >> 16) * ((weights << 16) >> 16) + (codes >> 16) * (weights >> 16);
}
#endif

#if !defined(__AVX512F__)
inline float least_lane(F a) {
  float lane[kLanes], found = 0.0f;
  store(lane, a);
  for (float v : lane) found = v < found || v != v ? v : found;
  return found;
}
inline float largest_lane(F a) {
  float lane[kLanes], found = 0.0f;
  store(lane, a);
  for (float v : lane) found = v > found ? v : found;
  return found;
}
#endif
