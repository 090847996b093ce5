// Products on bfloat16 units with float32 accumulation, on AMX tiles (FFNAS_AMX) or AVX-512's bfloat16 dot products.
// Included inside an ISA namespace; the interface is that of gemm_f32.h.
//
// An operand is kept as kPlanes bfloat16 planes that add up to it:
//   1  bfloat16 products: its value rounded to nearest even by the hardware, which also flushes subnormals to zero
//   3  float32 products (FFNAS_SPLIT_PRODUCTS, AMX only): cut into 8 + 8 + 8 bits of its significand, without loss
//
// Layouts, in pairs of neighbouring depth elements (one 32-bit word w = (k, k + 1)), which both instructions consume:
//   row block A   row-major, zero-padded to padded_depth; the planes of 32 elements one after the other
//   weight B      panels of kTileColumns columns; dot products: [padded_depth / 2][kTileColumns] of words,
//                 AMX: per 32 of depth and plane two tiles of 16 x 16 words, what a tile register takes
//   right         the same, depth being tokens
//   left          dot products: [tokens / 2][width] of words, read across as gemm_f32.h does
//                 AMX: per 32 columns, 32 tokens and plane two tiles of 16 columns x 16 words
//
// Measured on one core of a Sapphire Rapids, 540 x 540, 96 rows, warm: AMX 1660 GFLOP/s, oneDNN brgemm (AMX) 1500;
// whole bfloat16 nn.Linear 350. Three planes: 340 GFLOP/s of float32 products, whose peak on multiply-adds is about
// 180, at half to nine tenths of eager's error. Subnormal numbers count as 0, as bfloat16's do. On that machine dot
// products run at half the rate of float32 multiply-adds; on AMD at twice.
//
// Rejected: two planes and three products. Twice as fast, but 2^-16 is not float32's accuracy.

using Element = bf16;
#ifdef FFNAS_SPLIT_PRODUCTS
constexpr int kPlanes = 3;
#else
constexpr int kPlanes = 1;
#endif
// See gemm_f32.h. More rows gain at most 1 %; with 256 the shared scratch of bfloat16 at widths like 540 fits one huge
// page.
constexpr int64_t kChunkRows = 256;
constexpr bool kLeftIsOperand = false;
constexpr int32_t kOperandType = kBFloat16;
#ifdef FFNAS_AMX
constexpr int kRowUnit = 32;  // token rows that left and right are filled up to with zeros
constexpr int64_t kPlaneWords = 512;
inline int64_t word_at(int64_t k, int64_t j) {
  return k / 16 * (kPlanes * kPlaneWords) + j / 16 * 256 + k % 16 * 16 + j % 16;
}
#else
constexpr int kRowUnit = 2;
constexpr int64_t kPlaneWords = 0;  // there is one plane
inline int64_t word_at(int64_t k, int64_t j) { return k * kTileColumns + j; }
#endif
alignas(64) constexpr float kZeros[kTileColumns] = {};
// Words of a panel from word row to word row, at the same column.
constexpr int64_t kWordRowStride = kRowUnit == 32 ? 16 : kTileColumns;
static_assert(kTileColumns == 32 && kLanes == 16);

inline int64_t padded_depth(int64_t k) { return (k + 31) / 32 * 32; }
// Where column c (a multiple of 32) of a row block begins.
inline int64_t operand_column(int64_t c) { return kPlanes * c; }
// An odd number of cache lines, so that rows do not compete for the same sets.
inline int64_t operand_stride(int64_t k) { return (operand_column(padded_depth(k)) / 32 | 1) * 32; }
inline int64_t panel_elements(int64_t k) { return kPlanes * padded_depth(k) * kTileColumns; }
inline bool operand_is_exact(int32_t dtype) { return kPlanes == 1 && dtype == kBFloat16; }

// 32 bfloat16 values, or 16 words, of every plane.
struct Planes {
  __m512i plane[kPlanes];
};

// `low` and `high` rounded or cut to planes: 32 values in order, or 16 words with `low` in the low halves.
#ifdef FFNAS_SPLIT_PRODUCTS
// x without loss as the sum of three floats whose low halves are zero. Cutting, unlike rounding, cannot overflow.
inline void cut(F x, F (&part)[3]) {
  const __m512i high_half = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000u));
  part[0] = (F)((__m512i)x & high_half);
  const F rest = x - part[0];
  part[1] = (F)((__m512i)rest & high_half);
  part[2] = rest - part[1];
}
inline Planes planes_of(F low, F high) {
  alignas(64) static const uint16_t order[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  F a[3], b[3];
  cut(low, a);
  cut(high, b);
  Planes result;
  for (int p = 0; p < 3; ++p)
    result.plane[p] = _mm512_permutex2var_epi16((__m512i)a[p], _mm512_load_si512(order), (__m512i)b[p]);
  return result;
}
inline Planes words_of(F low, F high) {
  F a[3], b[3];
  cut(low, a);
  cut(high, b);
  Planes result;
  for (int p = 0; p < 3; ++p)
    result.plane[p] = _mm512_mask_mov_epi16(_mm512_srli_epi32((__m512i)a[p], 16), 0xAAAAAAAAu, (__m512i)b[p]);
  return result;
}
#else
inline Planes planes_of(F low, F high) { return {{(__m512i)_mm512_cvtne2ps_pbh(high, low)}}; }
inline Planes words_of(F low, F high) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return {{_mm512_permutexvar_epi16(_mm512_load_si512(order), planes_of(low, high).plane[0])}};
}
#endif
template <class T>
inline F load_some(const T* p, int64_t left) {
  return left > 0 ? load_part(p, left) : zero();
}

template <class T>
inline void copy_operand_row(const T* x, int64_t width, bf16* a) {
  for (int64_t j = 0; j < width; j += 32, a += 32 * kPlanes) {
    const Planes v = planes_of(load_some(x + j, width - j), load_some(x + j + 16, width - j - 16));
    for (int p = 0; p < kPlanes; ++p) _mm512_storeu_si512(a + 32 * p, v.plane[p]);
  }
}

inline void store_operand(const float* tile, int rows, int64_t columns, bf16* a, int64_t stride) {
  const __mmask32 valid = columns >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << columns) - 1u);
  for (int r = 0; r < rows; ++r, tile += kTileColumns, a += stride) {
    const Planes v = planes_of(load(tile), load(tile + 16));
    for (int p = 0; p < kPlanes; ++p) _mm512_storeu_si512(a + 32 * p, _mm512_maskz_mov_epi16(valid, v.plane[p]));
  }
}

// One panel of B[k][j] = w[first + j, k] (transposed: forward) or w[k, first + j] (backward).
template <class T>
void pack_panel(const T* w, int64_t stride, int64_t depth, int64_t first, int64_t columns, bool transposed, bf16* b) {
  // 32 of depth x 16 columns at a time; two neighbours in depth share a 32-bit word, as the products read them. A
  // transposed weight has them side by side in a row already, otherwise two rows are joined.
  F rows[kPlanes][16];
  for (int64_t k = 0; k < padded_depth(depth); k += 32)
    for (int j = 0; j < kTileColumns; j += 16) {
      float* to = reinterpret_cast<float*>(b) + word_at(k / 2, j);
      for (int i = 0; i < 16; ++i) {
        F low = zero(), high = zero();
        if (transposed && j + i < columns) {
          const T* row = w + (first + j + i) * stride + k;
          low = load_some(row, depth - k);
          high = load_some(row + 16, depth - k - 16);
        } else if (!transposed) {
          const T* pair = w + (k + 2 * i) * stride + first + j;
          if (k + 2 * i < depth) low = load_some(pair, columns - j);
          if (k + 2 * i + 1 < depth) high = load_some(pair + stride, columns - j);
        }
        const Planes v = transposed ? planes_of(low, high) : words_of(low, high);
        for (int p = 0; p < kPlanes; ++p) rows[p][i] = (F)v.plane[p];
      }
      for (int p = 0; p < kPlanes; ++p) {
        if (transposed) transpose(rows[p]);
        for (int i = 0; i < 16; ++i) store(to + p * kPlaneWords + i * kWordRowStride, rows[p][i]);
      }
    }
}

// Word row k of a tile: its rows 2k and 2k + 1; rows past the last are zero.
inline Planes word_row(const float* tile, int rows, int k, int j) {
  const float* at = tile + 2 * k * kTileColumns + j;
  return words_of(2 * k < rows ? load(at) : zero(), 2 * k + 1 < rows ? load(at + kTileColumns) : zero());
}

inline int64_t right_elements(int64_t tokens, int64_t width) {
  return panel_elements(width) / kTileColumns * (tokens + kTileRows);
}
constexpr bool kRightIsTile = false;
inline float* right_tile(int64_t, int64_t, int64_t, bf16*) { return nullptr; }
inline void store_right(const float* tile, int rows, int64_t row, int64_t column, int64_t, int64_t capacity,
                        bf16* right) {
  auto* to = reinterpret_cast<float*>(right + kPlanes * column * capacity);
  const int64_t words = round_up(rows, kRowUnit) / 2;
  for (int k = 0; k < words; ++k)
    for (int j = 0; j < kTileColumns; j += kLanes) {
      const Planes v = word_row(tile, rows, k, j);
      for (int p = 0; p < kPlanes; ++p) _mm512_storeu_si512(to + p * kPlaneWords + word_at(row / 2 + k, j), v.plane[p]);
    }
}

// C[.., j0 ..) (+)= tile, `rows` x `columns` of it.
inline void add_gradient(const float* tile, int rows, int64_t columns, float* c, int64_t c_stride, bool accumulate) {
  for (int r = 0; r < rows; ++r, tile += kTileColumns, c += c_stride)
    for (int j = 0; j < kTileColumns && j < columns; j += kLanes) {
      const int n = static_cast<int>(columns - j < kLanes ? columns - j : kLanes);
      const F value = load(tile + j);
      storen(c + j, accumulate ? value + loadn(c + j, n) : value, n);
    }
}

#ifdef FFNAS_AMX
#include "gemm_amx.h"
#else
#include "gemm_dot.h"
#endif
