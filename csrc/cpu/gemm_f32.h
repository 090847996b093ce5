// float32 products on vectors. Included inside an ISA namespace, which defines kMicroRows x kMicroVectors, the
// accumulators of one micro-kernel: 12 x 2 with AVX-512's 32 registers, 6 x 2 with AVX2's 16, 4 x 2 elsewhere.
//
// Operands: a row block A is row-major; a weight B is packed into panels [K][kTileColumns], zero-padded, so that the
// micro-kernel reads it front to back. One micro-kernel serves both products:
//   product   C[r, j]  = sum_k A[r, k] B[k, j]      (A read along k)
//   outer     C[i, j] += sum_t L[t, i] R[t, j]      (L read across; the gradient of a weight, t over tokens)
//
// Measured on one core of a Sapphire Rapids at 540 x 540, 96 rows, everything warm: 12 x 2 with prefetch 174 GFLOP/s,
// oneDNN brgemm with 64-wide blocks 173, 6 x 4 165, 8 x 3 165, MKL 120 (its packing included).
// Rejected: `at::native::cpublas::brgemm`, as fast, but private to a PyTorch version and blind to the edges of a tile.
// Where there is AMX, its six bfloat16 products of cut operands take the place of these (gemm_bf16.h, three planes).

using Element = float;
// Tokens per round of backward, at least: more amortize the updates of weight gradients, fewer stay in cache.
constexpr int64_t kChunkRows = 192;
constexpr bool kLeftIsOperand = true;  // the left operand of `outer` has the layout of a row block
static_assert(kTileColumns == kMicroVectors * kLanes && kTileRows % kMicroRows == 0);

inline int64_t padded_depth(int64_t k) { return k; }
inline int64_t operand_column(int64_t c) { return c; }
inline int64_t operand_stride(int64_t k) { return (k + kTileColumns - 1) / kTileColumns * kTileColumns + 16; }
inline int64_t panel_elements(int64_t k) { return k * kTileColumns; }

alignas(64) constexpr float kZeros[kTileColumns] = {};

struct ProductScope {  // nothing to set up around products; gemm_amx.h has tile registers
  ~ProductScope() {}
};

// One k: the outer product of ROWS values of A and a row of the panel of B, added to accumulators that stay in
// registers. The panel's row is loaded once for all rows, and each value of A is broadcast once for all columns.
template <int ROWS, int VECTORS, bool ACROSS>
inline void multiply_step(const float* a, int64_t stride, const float* b, F (&acc)[ROWS][VECTORS]) {
  F bv[VECTORS];
#pragma GCC unroll 4
  for (int j = 0; j < VECTORS; ++j) bv[j] = load(b + j * kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    if (i < kMicroVectors)  // the panel is read front to back: its line of kPrefetchSteps from now, one a vector
      __builtin_prefetch(b + kPrefetchSteps * kTileColumns + i * kLanes);
    const F av = set1(ACROSS ? a[i] : a[i * stride]);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = fma(av, bv[j], acc[i][j]);
  }
}

// c = bias (the same in all rows) + the product.
template <int ROWS, int VECTORS, bool ACROSS>
__attribute__((noinline)) void multiply(int64_t depth, const float* a, int64_t stride, const float* b,
                                        const float* bias, float* c) {
  F acc[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = load(bias + j * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    multiply_step<ROWS, VECTORS, ACROSS>(a, stride, b, acc);
    a += ACROSS ? stride : 1;
    b += kTileColumns;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) store(c + i * kTileColumns + j * kLanes, acc[i][j]);
}

// Up to kMicroRows rows; computes the next larger instantiated number of rows, so a and c need that many.
template <bool ACROSS>
inline void multiply_rows(int rows, bool wide, int64_t depth, const float* a, int64_t stride, const float* b,
                          const float* bias, float* c) {
  constexpr int kHalf = kMicroRows >= 12 ? 8 : 4;
  if (wide) {
    if (rows > kHalf) return multiply<kMicroRows, kMicroVectors, ACROSS>(depth, a, stride, b, bias, c);
    if (rows > 4) return multiply<kHalf, kMicroVectors, ACROSS>(depth, a, stride, b, bias, c);
    if (rows > 2) return multiply<4, kMicroVectors, ACROSS>(depth, a, stride, b, bias, c);
    return multiply<2, kMicroVectors, ACROSS>(depth, a, stride, b, bias, c);
  }
  if (rows > kHalf) return multiply<kMicroRows, kMicroVectors / 2, ACROSS>(depth, a, stride, b, bias, c);
  if (rows > 4) return multiply<kHalf, kMicroVectors / 2, ACROSS>(depth, a, stride, b, bias, c);
  return multiply<4, kMicroVectors / 2, ACROSS>(depth, a, stride, b, bias, c);
}

// tile = bias + A[r .. r + n) @ B[:, column .. column + kTileColumns) of a packed B that is `width` wide; bias has
// kTileColumns values. A must have kMicroRows - 1 readable rows after its last.
inline void product(const float* a, int64_t stride, int64_t r, int n, const float* packed, int64_t depth,
                    int64_t column, int64_t width, const float* bias, float* tile) {
  const bool wide = width - column > kTileColumns / 2;  // a last panel of half the columns or fewer: half the vectors
  for (int i = 0; i < n; i += kMicroRows)  // the panel of B stays in L1 while the rows of A go by
    multiply_rows<false>(n - i < kMicroRows ? n - i : kMicroRows, wide, depth, a + (r + i) * stride, stride,
                         packed + column * depth, bias, tile + i * kTileColumns);
}

// One panel of B[k][j] = w[first + j, k] (transposed: forward) or w[k, first + j] (backward).
template <class T>
void pack_panel(const T* w, int64_t stride, int64_t depth, int64_t first, int64_t columns, bool transposed, float* b) {
  if (!transposed) {
    load_rows(w + first, stride, static_cast<int>(depth), columns, b);
    return;
  }
  // A weight's rows are the panel's columns: squares of kLanes x kLanes, turned over in registers.
  for (int64_t k = 0; k < depth; k += kLanes)
    for (int j = 0; j < kTileColumns; j += kLanes) {
      F rows[kLanes];
      for (int i = 0; i < kLanes; ++i)
        rows[i] = j + i < columns ? load_part(w + (first + j + i) * stride + k, depth - k) : zero();
      transpose(rows);
      for (int i = 0; i < kLanes && k + i < depth; ++i) store(b + (k + i) * kTileColumns + j, rows[i]);
    }
}

inline void store_operand(const float* tile, int rows, int64_t columns, float* a, int64_t stride) {
  (void)columns;
  store_block(a, stride, rows, tile);
}

// A row of the caller as it is, and whether that loses nothing.
template <class T>
inline void copy_operand_row(const T* x, int64_t width, float* a) {
  for (int64_t j = 0; j < width; j += kLanes)
    store(a + j, width - j >= kLanes ? load(x + j) : loadn(x + j, static_cast<int>(width - j)));
}
inline bool operand_is_exact(int32_t) { return true; }
constexpr int32_t kOperandType = kFloat32;

inline int64_t left_elements(int64_t tokens, int64_t width) { return tokens * operand_stride(width); }
inline int64_t right_elements(int64_t tokens, int64_t width) {
  return tokens * ((width + kTileColumns - 1) / kTileColumns * kTileColumns);
}
inline void store_left(const float* tile, int rows, int64_t row, int64_t column, int64_t, int64_t width, int64_t,
                       float* left) {
  const int64_t stride = operand_stride(width);
  store_block(left + row * stride + column, stride, rows, tile);
}
// A tile of the right operand is stored as tiles are.
constexpr bool kRightIsTile = true;
inline float* right_tile(int64_t row, int64_t column, int64_t capacity, float* right) {
  return right + column * capacity + row * kTileColumns;
}
inline void store_right(const float* tile, int rows, int64_t row, int64_t column, int64_t, int64_t capacity,
                        float* right) {
  store_block(right_tile(row, column, capacity, right), kTileColumns, rows, tile);
}

// C[i0 .. i1, j0 .. j0 + kTileColumns) (+)= left^T right over `tokens` rows of buffers allocated for `capacity`.
inline void outer(const float* left, int64_t width, const float* right, int64_t tokens, int64_t capacity, int64_t i0,
                  int64_t i1, int64_t j0, int64_t columns, float* c, int64_t c_stride, bool accumulate) {
  float tile[kMicroRows * kTileColumns], old[kMicroRows * kTileColumns];
  const int64_t stride = operand_stride(width);
  const bool wide = columns > kTileColumns / 2;
  // The depth is the tokens. The right operand's panel, tokens x kTileColumns, stays in cache while kMicroRows columns
  // of the left one at a time go by, read across its rows.
  for (int64_t i = i0; i < i1; i += kMicroRows) {
    const int rows = static_cast<int>(i1 - i < kMicroRows ? i1 - i : kMicroRows);
    float* out = c + i * c_stride + j0;
    multiply_rows<true>(rows, wide, tokens, left + i, stride, right + j0 * capacity, kZeros, tile);
    if (accumulate) {
      load_rows(out, c_stride, rows, columns, old);
      add_tile(tile, old, rows);
    }
    store_rows(out, c_stride, rows, columns, tile);
  }
}
