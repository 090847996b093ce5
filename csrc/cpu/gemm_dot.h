// AVX-512 bfloat16 dot products: the part of gemm_bf16.h that multiplies, in the shape of gemm_f32.h's micro-kernel.

struct ProductScope {
  ~ProductScope() {}
};

// a and b step through words; a's rows are `stride` words apart (read along), or its columns are neighbours (ACROSS).
template <int ROWS, int VECTORS, bool ACROSS>
__attribute__((noinline)) void multiply(int64_t words, const float* a, int64_t stride, const float* b,
                                        const float* bias, float* c) {
  F acc[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = load(bias + j * kLanes);
  for (int64_t k = 0; k < words; ++k) {
    __m512bh bv[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) bv[j] = (__m512bh)load(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      if (i < kMicroVectors) __builtin_prefetch(b + kPrefetchSteps * kTileColumns + i * kLanes);
      const __m512bh av = (__m512bh)set1(ACROSS ? a[i] : a[i * stride]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], av, bv[j]);
    }
    a += ACROSS ? stride : 1;
    b += kTileColumns;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) store(c + i * kTileColumns + j * kLanes, acc[i][j]);
}

template <bool ACROSS>
inline void multiply_rows(int rows, bool wide, int64_t words, const float* a, int64_t stride, const float* b,
                          const float* bias, float* c) {
  if (wide) {
    if (rows > 8) return multiply<12, 2, ACROSS>(words, a, stride, b, bias, c);
    if (rows > 4) return multiply<8, 2, ACROSS>(words, a, stride, b, bias, c);
    return multiply<4, 2, ACROSS>(words, a, stride, b, bias, c);
  }
  if (rows > 4) return multiply<12, 1, ACROSS>(words, a, stride, b, bias, c);
  return multiply<4, 1, ACROSS>(words, a, stride, b, bias, c);
}

inline void product(const bf16* a, int64_t stride, int64_t r, int n, const bf16* packed, int64_t depth, int64_t column,
                    int64_t width, const float* bias, float* tile) {
  const auto* words = reinterpret_cast<const float*>(a + r * stride);
  const auto* panel = reinterpret_cast<const float*>(packed + column * padded_depth(depth));
  for (int i = 0; i < n; i += kMicroRows)
    multiply_rows<false>(n - i < kMicroRows ? n - i : kMicroRows, width - column > kTileColumns / 2, (depth + 1) / 2,
                         words + i * stride / 2, stride / 2, panel, bias, tile + i * kTileColumns);
}

inline int64_t left_words(int64_t width) { return padded_depth(width) + 16; }
inline int64_t left_elements(int64_t tokens, int64_t width) { return (tokens + kTileRows) * left_words(width); }
inline void store_left(const float* tile, int rows, int64_t row, int64_t column, int64_t, int64_t width, int64_t,
                       bf16* left) {
  const int64_t stride = left_words(width);
  auto* to = reinterpret_cast<float*>(left) + row / 2 * stride + column;
  for (int k = 0; k < (rows + 1) / 2; ++k, to += stride) {
    _mm512_storeu_si512(to, word_row(tile, rows, k, 0).plane[0]);
    _mm512_storeu_si512(to + 16, word_row(tile, rows, k, 16).plane[0]);
  }
}

inline void outer(const bf16* left, int64_t width, const bf16* right, int64_t tokens, int64_t capacity, int64_t i0,
                  int64_t i1, int64_t j0, int64_t columns, float* c, int64_t c_stride, bool accumulate) {
  float tile[kMicroRows * kTileColumns];
  const auto* words = reinterpret_cast<const float*>(left);
  const auto* panel = reinterpret_cast<const float*>(right + j0 * capacity);
  for (int64_t i = i0; i < i1; i += kMicroRows) {
    const int rows = static_cast<int>(i1 - i < kMicroRows ? i1 - i : kMicroRows);
    float* out = c + i * c_stride + j0;
    multiply_rows<true>(rows, columns > kTileColumns / 2, (tokens + 1) / 2, words + i, left_words(width), panel, kZeros,
                        tile);
    add_gradient(tile, rows, columns, out, c_stride, accumulate);
  }
}
