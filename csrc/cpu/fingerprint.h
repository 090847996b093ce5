// What tells whether a matrix is the one that was packed: two sums over all of its bytes. Included inside an ISA
// namespace.
//
// A word of 8 bytes, v, at place i counts into both:
//
//     plain   v                          differs for certain where one word does
//     mixed   low(t) high(t), t = v xor key(i)     the halves of 32 bits multiplied, as NH and XXH3 do
//
// The key goes up with the place, so words that change places count. Writes of several words pass both with a
// probability of about 2^-32 (mixed) times that of the plain sums being equal, whatever was written, unless it was made
// with the keys in mind. Read at the speed of memory: one multiplication for two float32 elements.
//
// Sums do not depend on how the bytes are shared among threads.

constexpr int64_t kFingerprintBlock = 64;                              // bytes, eight words
constexpr int64_t kFingerprintPiece = 1024 * kFingerprintBlock;       // bytes a task reads
constexpr int kWords = 8;
constexpr uint64_t kFingerprintKey[kWords] = {0x9E3779B97F4A7C15u, 0xBF58476D1CE4E5B9u, 0x94D049BB133111EBu,
                                              0xD6E8FEB86659FD93u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u,
                                              0x27D4EB2F165667C5u, 0x85EBCA77C2B2AE63u};
constexpr uint64_t kFingerprintStep[kWords] = {0xA0761D6478BD642Fu, 0xE7037ED1A0B428DBu, 0x8EBC6AF09C88C6E3u,
                                               0x589965CC75374CC3u, 0x1D8E4E27C47D124Fu, 0xEB44ACCAB455D165u,
                                               0x2127599BF4325C37u, 0x9FB21C651E98DF25u};

#if defined(__AVX512F__)
constexpr int kWordsAtOnce = 8;
using Words = __m512i;
inline Words load_words(const void* p) { return _mm512_loadu_si512(p); }
inline Words add_words(Words a, Words b) { return _mm512_add_epi64(a, b); }
inline Words mix_words(Words v, Words key) {
  const Words t = _mm512_xor_si512(v, key);
  return _mm512_mul_epu32(t, _mm512_srli_epi64(t, 32));
}
inline void store_words(void* p, Words v) { _mm512_storeu_si512(p, v); }
#elif defined(__AVX2__)
constexpr int kWordsAtOnce = 4;
using Words = __m256i;
inline Words load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Words add_words(Words a, Words b) { return _mm256_add_epi64(a, b); }
inline Words mix_words(Words v, Words key) {
  const Words t = _mm256_xor_si256(v, key);
  return _mm256_mul_epu32(t, _mm256_srli_epi64(t, 32));
}
inline void store_words(void* p, Words v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
#else
constexpr int kWordsAtOnce = 1;
using Words = uint64_t;
inline Words load_words(const void* p) {
  Words v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Words add_words(Words a, Words b) { return a + b; }
inline Words mix_words(Words v, Words key) {
  const Words t = v ^ key;
  return (t & 0xFFFFFFFFu) * (t >> 32);
}
inline void store_words(void* p, Words v) { __builtin_memcpy(p, &v, sizeof v); }
#endif

// Adds the sums over `bytes` bytes, the first of which is that of block `block` of the matrix.
inline void add_fingerprint(const char* data, int64_t bytes, int64_t block, uint64_t sums[2]) {
  constexpr int kParts = kWords / kWordsAtOnce;
  Words key[kParts], step[kParts], plain[kParts], mixed[kParts];
  uint64_t words[kWords] = {};
  for (int p = 0; p < kParts; ++p) plain[p] = mixed[p] = load_words(words + p * kWordsAtOnce);
  for (int w = 0; w < kWords; ++w) words[w] = kFingerprintKey[w] + static_cast<uint64_t>(block) * kFingerprintStep[w];
  for (int p = 0; p < kParts; ++p) {
    key[p] = load_words(words + p * kWordsAtOnce);
    step[p] = load_words(kFingerprintStep + p * kWordsAtOnce);
  }
  const auto take = [&](const char* from) {
    for (int p = 0; p < kParts; ++p) {
      const Words v = load_words(from + 8 * p * kWordsAtOnce);
      plain[p] = add_words(plain[p], v);
      mixed[p] = add_words(mixed[p], mix_words(v, key[p]));
      key[p] = add_words(key[p], step[p]);
    }
  };
  int64_t at = 0;
  for (; at + kFingerprintBlock <= bytes; at += kFingerprintBlock) take(data + at);
  if (at < bytes) {
    char last[kFingerprintBlock] = {};
    __builtin_memcpy(last, data + at, static_cast<size_t>(bytes - at));
    take(last);
  }
  for (int s = 0; s < 2; ++s) {
    for (int p = 0; p < kParts; ++p) store_words(words + p * kWordsAtOnce, s == 0 ? plain[p] : mixed[p]);
    for (int w = 0; w < kWords; ++w) sums[s] += words[w];
  }
}

// The two sums of every matrix, in parallel over pieces of them all.
inline void fingerprints(const MatrixBytes* matrices, int64_t count, uint64_t* sums) {
  const auto pieces = [](const MatrixBytes& m) {  // of one row
    return most((m.width + kFingerprintPiece - 1) / kFingerprintPiece, 1);
  };
  const auto rows_at_once = [](const MatrixBytes& m) { return most(kFingerprintPiece / most(m.width, 1), 1); };
  const auto tasks = [&](const MatrixBytes& m) { return (m.rows + rows_at_once(m) - 1) / rows_at_once(m) * pieces(m); };
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += tasks(matrices[i]);
  __builtin_memset(sums, 0, static_cast<size_t>(2 * count) * sizeof(uint64_t));
  auto task = [&](int64_t t) {
    int64_t i = 0;
    while (t >= tasks(matrices[i])) t -= tasks(matrices[i++]);
    const MatrixBytes& m = matrices[i];
    const int64_t begin = t % pieces(m) * kFingerprintPiece, first = t / pieces(m) * rows_at_once(m);
    const int64_t blocks = (m.width + kFingerprintBlock - 1) / kFingerprintBlock;
    uint64_t own[2] = {};
    for (int64_t r = first; r < least(first + rows_at_once(m), m.rows); ++r)
      add_fingerprint(m.data + r * m.stride + begin, least(m.width - begin, kFingerprintPiece),
                      r * blocks + begin / kFingerprintBlock, own);
    for (int s = 0; s < 2; ++s) __atomic_fetch_add(sums + 2 * i + s, own[s], __ATOMIC_RELAXED);
  };
  parallel_tasks(total, task);
}
