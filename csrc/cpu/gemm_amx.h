// AMX: the part of gemm_bf16.h that multiplies. Tile registers 0..3 accumulate 32 x 32, 4..5 hold A, 6..7 hold B.
//
// Tried on a Sapphire Rapids and not kept, each within 3 % of what is here or slower (whole FFN, forward and backward):
//   the interpreter's work on one panel in pieces of 2 to 8 rows between the tile steps of the next, so that vector
//   units and tile registers work at once: what a piece costs besides (short loops, stores that are read at once) is
//   what it saves. Work that the compiler knows does hide: forward_beside.h;
//   products cut along their depth so that a panel stays in L1; rows of A in whole tiles; huge pages under the row
//   blocks;
//   software prefetch of the caller's matrices a panel or a block ahead, in bursts or a few lines per tile step
//   (backward asks for the next few rows only): what LayerNorm then saves the products lose, memory being as busy as
//   they are;
//   loads of tiles and products taking turns instead of loads first;
//   adding one tile of a weight gradient to memory beside the products of the next.

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

// Where the rows of a left operand lie, in elements: 16 rows `row` apart make a tile, the next 16 are `second` behind,
// the next 32 of depth `step`, planes `plane` apart.
struct Left {
  const bf16* data;
  int64_t row, second, step, plane;
  const bf16* of(int i) const { return data + i / 16 * second + i % 16 * row; }
};
constexpr int64_t kPanelStep = 2 * kPlanes * kPlaneWords;  // of a packed panel, per 32 of depth

// One plane of A, 32 rows or 16, times one of B, 32 columns or 16, both in tile registers; then some of the work
// beside.
template <bool TALL, bool WIDE, class Work>
inline void multiply_planes(Work& work) {
  _tile_dpbf16ps(0, 4, 6);
  if (WIDE) _tile_dpbf16ps(1, 4, 7);
  if (TALL) _tile_dpbf16ps(2, 5, 6);
  if (TALL && WIDE) _tile_dpbf16ps(3, 5, 7);
  work.step();
}
constexpr int64_t kProductsPerStep = kPlanes == 1 ? 1 : 6;  // of planes, per 32 of depth

template <bool TALL>
inline void load_left(const Left& a, int plane) {
  _tile_loadd(4, a.data + plane * a.plane, 2 * a.row);
  if (TALL) _tile_loadd(5, a.data + plane * a.plane + a.second, 2 * a.row);
}
template <bool WIDE>
inline void load_right(const bf16* b, int plane) {
  _tile_loadd(6, b + plane * 2 * kPlaneWords, 64);
  if (WIDE) _tile_loadd(7, b + plane * 2 * kPlaneWords + 512, 64);
}

// Eight lines to L2: few enough at a time not to hold up the loads of tiles.
inline void prefetch_lines(const bf16* p) {
  for (int i = 0; i < 8; ++i) __builtin_prefetch(p + 32 * i, 0, 2);
}

// Work beside a product (forward_beside.h): nothing.
struct Nothing {
  void step() {}
};

// tile[32][32] = sum over `steps` of A times B; the second 16 rows only if TALL, the second 16 columns only if WIDE.
// Of three planes the products below 2^-24 of the result are left out; the others follow each other so that all but the
// first load planes of one operand only (2 to 3 % less with backward than loading both once more). Between the products
// vectors do some of `work`, which is returned as it is then; flat, so that its constants stay in registers.
template <bool TALL, bool WIDE, class Work>
__attribute__((flatten)) inline Work multiply_tiles(int64_t steps, Left a, const bf16* b, const bf16* next,
                                                    const float* bias, float* tile, Work work) {
  asm volatile("" ::: "memory");  // GCC does not know that tile loads read memory
  if (kPlanes == 1) {  // start from the bias, the same row 16 times; with three planes adding it afterwards is faster
    _tile_loadd(0, bias, 0);
    if (WIDE) _tile_loadd(1, bias + 16, 0);
    if (TALL) _tile_loadd(2, bias, 0);
    if (TALL && WIDE) _tile_loadd(3, bias + 16, 0);
  } else {
    _tile_zero(0);
    if (WIDE) _tile_zero(1);
    if (TALL) _tile_zero(2);
    if (TALL && WIDE) _tile_zero(3);
  }
  // Tile registers: 0..3 the four 16 x 16 quarters of the result, 4 and 5 rows 0..15 and 16..31 of A, 6 and 7 columns
  // 0..15 and 16..31 of B. One step is 32 of depth. With three planes, a = a0 + a1 + a2 and b = b0 + b1 + b2, it does
  // a0 b0, a2 b0, a1 b0, a1 b1, a0 b1, a0 b2 and fetches the next panel meanwhile.
  for (int64_t s = 0; s < steps; ++s, a.data += a.step, b += kPanelStep, next += kPanelStep) {
    load_right<WIDE>(b, 0);
    load_left<TALL>(a, 0);
    multiply_planes<TALL, WIDE>(work);
    if (kPlanes == 1) continue;
    prefetch_lines(next);
    load_left<TALL>(a, 2);
    multiply_planes<TALL, WIDE>(work);
    prefetch_lines(next + 256);
    load_left<TALL>(a, 1);
    multiply_planes<TALL, WIDE>(work);
    prefetch_lines(next + 512);
    load_right<WIDE>(b, 1);
    multiply_planes<TALL, WIDE>(work);
    prefetch_lines(next + 768);
    load_left<TALL>(a, 0);
    multiply_planes<TALL, WIDE>(work);
    load_right<WIDE>(b, 2);
    multiply_planes<TALL, WIDE>(work);
  }
  _tile_stored(0, tile, 4 * kTileColumns);
  if (WIDE) _tile_stored(1, tile + 16, 4 * kTileColumns);
  if (TALL) _tile_stored(2, tile + 16 * kTileColumns, 4 * kTileColumns);
  if (TALL && WIDE) _tile_stored(3, tile + 16 * kTileColumns + 16, 4 * kTileColumns);
  return work;
}

#ifdef FFNAS_SPLIT_PRODUCTS
// The planes of an infinity, and zeros among the planes of what it meets, make NaN where the product of the whole
// numbers has infinities; those elements are computed again from the whole numbers.
inline float whole(const bf16* p, int64_t plane) {
  const auto value = [&](int64_t at) {
    const uint32_t bits = static_cast<uint32_t>(p[at]) << 16;
    float v;
    __builtin_memcpy(&v, &bits, 4);
    return v;
  };
  const float first = value(0);
  return __builtin_isfinite(first) ? first + (value(plane) + value(2 * plane)) : first;
}

__attribute__((noinline)) inline void repair(int rows, int columns, int64_t steps, const Left& a, const bf16* b,
                                             float* tile) {
  const auto left = [&](int i, int64_t k) { return whole(a.of(i) + k / 32 * a.step + k % 32, a.plane); };
  const auto right = [&](int64_t k, int j) {
    return whole(b + k / 32 * kPanelStep + j / 16 * 512 + k % 32 / 2 * 32 + j % 16 * 2 + k % 2, 2 * kPlaneWords);
  };
  const int64_t depth = 32 * steps;
  bool infinite_row[32] = {}, infinite_column[32] = {};
  for (int64_t k = 0; k < depth; ++k) {
    for (int i = 0; i < rows; ++i) infinite_row[i] |= __builtin_isinf(left(i, k)) != 0;
    for (int j = 0; j < columns; ++j) infinite_column[j] |= __builtin_isinf(right(k, j)) != 0;
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) {
      float& out = tile[i * kTileColumns + j];
      if (!__builtin_isnan(out) || !(infinite_row[i] || infinite_column[j])) continue;
      out = 0.0f;
      for (int64_t k = 0; k < depth; ++k) out += left(i, k) * right(k, j);
    }
}
inline bool any_nan(const float* tile, int rows, int columns) {
  M found = 0;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; j += kLanes) found |= is_nan(load(tile + i * kTileColumns + j));
  return found != 0;
}
inline void repair_if_nan(int rows, int columns, int64_t steps, const Left& a, const bf16* b, float* tile) {
  if (any_nan(tile, rows, columns)) repair(rows, columns, steps, a, b, tile);
}
#else
inline void repair_if_nan(int, int, int64_t, const Left&, const bf16*, float*) {}
#endif

// Up to 32 rows and columns.
inline void multiply_any(int rows, bool wide, int64_t steps, const Left& a, const bf16* b, const bf16* next,
                         const float* bias, float* tile) {
  const Nothing none;
  if (rows > 16)
    wide ? multiply_tiles<true, true>(steps, a, b, next, bias, tile, none)
         : multiply_tiles<true, false>(steps, a, b, next, bias, tile, none);
  else
    wide ? multiply_tiles<false, true>(steps, a, b, next, bias, tile, none)
         : multiply_tiles<false, false>(steps, a, b, next, bias, tile, none);
  repair_if_nan(rows, wide ? 32 : 16, steps, a, b, tile);
}

// product() with `work` done beside its full tiles; three planes leave the bias to the work.
template <class Work>
inline Work product_beside(const bf16* a, int64_t stride, int64_t r, int n, const bf16* packed, int64_t depth,
                           int64_t column, int64_t width, const float* bias, float* tile, Work work) {
  const int64_t steps = padded_depth(depth) / 32;
  const bf16* panel = packed + kPlanes * column * padded_depth(depth);
  const bool wide = width - column > 16;
  for (int i = 0; i < n; i += 32, tile += 32 * kTileColumns) {
    const Left left{a + (r + i) * stride, stride, 16 * stride, 32 * kPlanes, 32};
    const bf16* next = panel + panel_elements(depth) + (r + i) / 32 % kPlanes * 2 * kPlaneWords;
    if (wide && n - i > 16) {
      work = multiply_tiles<true, true>(steps, left, panel, next, bias, tile, work);
      repair_if_nan(32, 32, steps, left, panel, tile);
    } else {
      multiply_any(static_cast<int>(least(n - i, 32)), wide, steps, left, panel, next, bias, tile);
    }
  }
  return work;
}

inline void product(const bf16* a, int64_t stride, int64_t r, int n, const bf16* packed, int64_t depth, int64_t column,
                    int64_t width, const float* bias, float* tile) {
  product_beside(a, stride, r, n, packed, depth, column, width, bias, tile, Nothing{});
  if (kPlanes > 1 && bias != kZeros) add_bias(tile, bias, n);
}

inline int64_t left_elements(int64_t tokens, int64_t width) {
  return kPlanes * round_up(tokens, 32) * padded_depth(width);
}
inline void store_left(const float* tile, int rows, int64_t row, int64_t column, int64_t, int64_t, int64_t capacity,
                       bf16* left) {
  // 32 tokens at a time: two tokens of a column make one 32-bit word, since the product's depth, here the tokens, runs
  // in pairs through a tile register. Rows of words are turned over, so that columns of the matrix become rows of A.
  F words[kPlanes][16];
  for (int first = 0; first < rows; first += 32) {
    auto* to = reinterpret_cast<float*>(left + kPlanes * (column * capacity + (row + first) * 32));
    for (int half = 0; half < 2; ++half, to += 256) {
      for (int k = 0; k < 16; ++k) {
        const Planes v = word_row(tile + first * kTileColumns, rows - first, k, 16 * half);
        for (int p = 0; p < kPlanes; ++p) words[p][k] = (F)v.plane[p];
      }
      for (int p = 0; p < kPlanes; ++p) {
        transpose(words[p]);
        for (int i = 0; i < 16; ++i) store(to + p * kPlaneWords + 16 * i, words[p][i]);
      }
    }
  }
}

inline void outer(const bf16* left, int64_t, const bf16* right, int64_t tokens, int64_t capacity, int64_t i0,
                  int64_t i1, int64_t j0, int64_t columns, float* c, int64_t c_stride, bool accumulate) {
  // The depth of this product is the tokens: both operands lie in whole tile registers already (store_left,
  // store_right), so a step is loads and products only.
  alignas(64) float tile[32 * kTileColumns];
  const bf16* panel = right + kPlanes * j0 * capacity;
  for (int64_t i = i0; i < i1; i += 32) {
    const int rows = static_cast<int>(i1 - i < 32 ? i1 - i : 32);
    float* out = c + i * c_stride + j0;
    multiply_any(rows, columns > 16, (tokens + 31) / 32,
                 {left + kPlanes * i * capacity, 32, 512, kPanelStep, 2 * kPlaneWords}, panel,
                 panel + kPlanes * kTileColumns * capacity + i / 32 % kPlanes * 2 * kPlaneWords, kZeros, tile);
    add_gradient(tile, rows, columns, out, c_stride, accumulate);
  }
}
