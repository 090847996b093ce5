// AMX: the part of gemm_bf16.h that multiplies. Tile registers 0..3 accumulate 32 x 32, 4..5 hold A, 6..7 hold B.

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile registers are configured per thread, by everybody for himself: held around a task's products.
struct ProductScope {
  ProductScope() {
    // static: GCC's intrinsic names only the first 8 bytes as read, so stores to a local could be dropped
    static constexpr TileConfig config = {};
    _tile_loadconfig(&config);
  }
  ~ProductScope() { _tile_release(); }
};

// tile[32][32] = sum over `steps` of A (two tiles, a_second apart) times B (two tiles of words, one after the other);
// the second A tile only if `tall`, the second B tile only if `wide`.
template <bool TALL, bool WIDE>
inline void multiply_tiles(int64_t steps, const bf16* a, int64_t a_row_bytes, int64_t a_step, int64_t a_second,
                           const bf16* b, float* tile) {
  _tile_zero(0);
  if (WIDE) _tile_zero(1);
  if (TALL) _tile_zero(2);
  if (TALL && WIDE) _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += 32 * kTileColumns) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, a_row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (WIDE) {
      _tile_loadd(7, b + 512, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (TALL) {
      _tile_loadd(5, a + a_second, a_row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (WIDE) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, tile, 4 * kTileColumns);
  if (WIDE) _tile_stored(1, tile + 16, 4 * kTileColumns);
  if (TALL) _tile_stored(2, tile + 16 * kTileColumns, 4 * kTileColumns);
  if (TALL && WIDE) _tile_stored(3, tile + 16 * kTileColumns + 16, 4 * kTileColumns);
}

inline void multiply_any(bool tall, bool wide, int64_t steps, const bf16* a, int64_t a_row_bytes, int64_t a_step,
                         int64_t a_second, const bf16* b, float* tile) {
  if (tall && wide) return multiply_tiles<true, true>(steps, a, a_row_bytes, a_step, a_second, b, tile);
  if (tall) return multiply_tiles<true, false>(steps, a, a_row_bytes, a_step, a_second, b, tile);
  if (wide) return multiply_tiles<false, true>(steps, a, a_row_bytes, a_step, a_second, b, tile);
  return multiply_tiles<false, false>(steps, a, a_row_bytes, a_step, a_second, b, tile);
}

inline void product(const bf16* a, int64_t stride, int64_t r, int n, const bf16* packed, int64_t depth, int64_t column,
                    int64_t width, const float* bias, float* tile) {
  for (int i = 0; i < n; i += 32)
    multiply_any(n - i > 16, width - column > 16, padded_depth(depth) / 32, a + (r + i) * stride, 2 * stride, 32,
                 16 * stride, packed + column * padded_depth(depth), tile + i * kTileColumns);
  if (bias != kZeros) add_bias(tile, bias, n);  // starting from tiles full of bias takes longer
}

inline int64_t left_elements(int64_t tokens, int64_t width) { return round_up(tokens, 32) * padded_depth(width); }
inline void store_left(const float* tile, int rows, int64_t row, int64_t column, int64_t, int64_t, int64_t capacity,
                       bf16* left) {
  F words[16];
  for (int first = 0; first < rows; first += 32) {
    auto* to = reinterpret_cast<float*>(left + column * capacity + (row + first) * 32);
    for (int half = 0; half < 2; ++half, to += 256) {
      for (int k = 0; k < 16; ++k)
        words[k] = (F)word_row(tile + first * kTileColumns, rows - first, k, 16 * half);
      transpose(words);
      for (int i = 0; i < 16; ++i) store(to + 16 * i, words[i]);
    }
  }
}

inline void outer(const bf16* left, int64_t, const bf16* right, int64_t tokens, int64_t capacity, int64_t i0, int64_t i1,
                  int64_t j0, int64_t columns, float* c, int64_t c_stride, bool accumulate) {
  alignas(64) float tile[32 * kTileColumns];
  for (int64_t i = i0; i < i1; i += 32) {
    const int rows = static_cast<int>(i1 - i < 32 ? i1 - i : 32);
    float* out = c + i * c_stride + j0;
    multiply_any(rows > 16, columns > 16, (tokens + 31) / 32, left + i * capacity, 64, 1024, 512, right + j0 * capacity,
                 tile);
    add_gradient(tile, rows, columns, out, c_stride, accumulate);
  }
}
