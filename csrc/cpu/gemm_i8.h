// Products of codes, see int8.h: 32-bit sums of a block of rows with one panel of a packed weight, and what is done
// with them row by row. Included inside an ISA namespace.
//
// Sums are stored as integers and read again, which costs less than it looks (they are in L1): so vectors can work on
// one panel's sums while tile registers multiply the next one, as forward_beside.h does, and no product needs to know
// what follows it.

// Work on the rows of a panel that are still to do, `piece` of them at each step.
template <class Row>
struct SumsWork {
  Row row;
  int64_t left, piece;
  void step() { run(least(piece, left)); }
  void run(int64_t n) {
    left -= n;
    for (; n > 0; --n) row.run();
  }
};
struct NoRow {
  void run() {}
};

#ifdef __AMX_INT8__
constexpr bool kWorksBeside = true;

struct CodeTiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Around a task's products: tile registers are a thread's own.
struct CodeScope {
  CodeScope() {
    static constexpr CodeTiles tiles = {};
    _tile_loadconfig(&tiles);
  }
  ~CodeScope() { _tile_release(); }
};

// to[32][32] = A times B over `steps` of 64; the second 16 rows only if TALL, the second 16 columns only if WIDE.
// Meanwhile `lines` cache lines a step of the next panel are fetched: waiting for them took a third of the time.
template <bool TALL, bool WIDE, class Work>
__attribute__((flatten)) inline Work multiply_codes(int64_t steps, const Code* a, int64_t stride, const int32_t* b,
                                                    const int32_t* next, int64_t lines, int32_t* to, Work work) {
  asm volatile("" ::: "memory");  // GCC does not know that tile loads read memory
  constexpr int kRowBytes = 4 * kTileColumns;
  _tile_zero(0);
  if (WIDE) _tile_zero(1);
  if (TALL) _tile_zero(2);
  if (TALL && WIDE) _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, a += 64, b += 16 * kTileColumns) {
    for (int64_t i = 0; i < lines; ++i, next += 16) __builtin_prefetch(next, 0, 3);
    _tile_loadd(6, b, kRowBytes);
    _tile_loadd(4, a, stride);
    _tile_dpbusd(0, 4, 6);
    work.step();
    if (TALL) {
      _tile_loadd(5, a + 16 * stride, stride);
      _tile_dpbusd(2, 5, 6);
      work.step();
    }
    if (WIDE) {
      _tile_loadd(7, b + 16, kRowBytes);
      _tile_dpbusd(1, 4, 7);
      work.step();
    }
    if (TALL && WIDE) {
      _tile_dpbusd(3, 5, 7);
      work.step();
    }
  }
  _tile_stored(0, to, kRowBytes);
  if (WIDE) _tile_stored(1, to + 16, kRowBytes);
  if (TALL) _tile_stored(2, to + 16 * kTileColumns, kRowBytes);
  if (TALL && WIDE) _tile_stored(3, to + 16 * kTileColumns + 16, kRowBytes);
  return work;
}

// Products per panel at which `work` may do a step.
inline int64_t work_steps(int64_t rows, int64_t depth) {
  return (rows + 15) / 16 * (code_words(depth) / 16) * 2;
}

// to[rows][kTileColumns] = the sums of rows `a` with the panel at `column` of a weight that is `width` wide.
template <class Work>
inline Work code_product(const Code* a, int64_t stride, int64_t rows, const PackedCodes& w, int64_t depth,
                         int64_t column, int64_t width, int32_t* to, Work work) {
  const int64_t steps = code_words(depth) / 16;
  const int32_t* panel = w.words + column * code_words(depth);
  const bool wide = width - column > 16;
  const int64_t groups = (rows + 31) / 32, lines = (2 * kTileColumns + groups - 1) / groups;
  const int32_t* next = panel + kTileColumns * code_words(depth);
  for (int64_t r = 0; r < rows; r += 32, a += 32 * stride, to += 32 * kTileColumns, next += 16 * lines * steps) {
    if (rows - r > 16)
      work = wide ? multiply_codes<true, true>(steps, a, stride, panel, next, lines, to, work)
                  : multiply_codes<true, false>(steps, a, stride, panel, next, lines, to, work);
    else
      work = wide ? multiply_codes<false, true>(steps, a, stride, panel, next, lines, to, work)
                  : multiply_codes<false, false>(steps, a, stride, panel, next, lines, to, work);
  }
  return work;
}

#else
constexpr bool kWorksBeside = false;
struct CodeScope {
  ~CodeScope() {}
};

template <int ROWS, int VECTORS>
__attribute__((noinline)) void multiply_codes(int64_t words, const Code* a, int64_t stride, const int32_t* b,
                                              int32_t* to) {
  I sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = set1_i(0);
  for (int64_t k = 0; k < words; ++k, a += kPerWord, b += kTileColumns) {
    I weights[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) weights[j] = load_i(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      if (i < VECTORS) __builtin_prefetch(b + kPrefetchSteps * kTileColumns + i * kLanes);
      int32_t word;
      __builtin_memcpy(&word, a + i * stride, 4);
      const I codes = set1_i(word);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = dot(sum[i][j], codes, weights[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) store_i(to + i * kTileColumns + j * kLanes, sum[i][j]);
}

inline int64_t work_steps(int64_t, int64_t) {
  return 1;
}

template <class Work>
inline Work code_product(const Code* a, int64_t stride, int64_t rows, const PackedCodes& w, int64_t depth,
                         int64_t column, int64_t, int32_t* to, Work work) {
  const int64_t words = (depth + kPerWord - 1) / kPerWord;
  const int32_t* panel = w.words + column * code_words(depth);
  constexpr int kHalf = kMicroRows >= 12 ? 8 : kMicroRows;
  for (int64_t r = 0; r < rows; r += kMicroRows, a += kMicroRows * stride, to += kMicroRows * kTileColumns) {
    const int64_t n = rows - r;
    if (n > kHalf)
      multiply_codes<kMicroRows, kMicroVectors>(words, a, stride, panel, to);
    else if (n > 4)
      multiply_codes<kHalf, kMicroVectors>(words, a, stride, panel, to);
    else if (n > 2)
      multiply_codes<4, kMicroVectors>(words, a, stride, panel, to);
    else
      multiply_codes<2, kMicroVectors>(words, a, stride, panel, to);
  }
  return work;
}
#endif

// The rows of a panel's sums as numbers, one after the other.
struct SumsRow {
  const int32_t* from;
  const RowCode* row;
  const int32_t* sums;
  const float *scale, *bias;

  F value(int j) const {
    const I sum = minus_i(load_i(from + j), times_i(set1_i(row->zero), load_i(sums + j)));
    return fma(to_float(sum), set1(row->scale) * load(scale + j), load(bias + j));
  }
  void next() {
    from += kTileColumns;
    ++row;
  }
};

// For every panel of a product over a block: multiplies, then hands its rows to row_of(column, sums), which returns
// what run() does one of at a time. `panel`: room for two panels of sums.
template <class RowOf>
__attribute__((flatten)) inline void for_sums(int32_t* const* panel, int64_t rows, const Code* a, const RowCode* row,
                                              int64_t depth, const PackedCodes& w, int64_t width, const float* bias,
                                              const RowOf& row_of) {
  SumsWork<decltype(row_of(0, SumsRow{}))> work{};
  const int64_t steps = work_steps(rows, depth);
  work.piece = (rows + steps - 1) / steps;
  for (int64_t c = 0, k = 0; c < width; c += kTileColumns, ++k) {
    int32_t* to = panel[k % 2];
    work = code_product(a, code_stride(depth), rows, w, depth, c, width, to, work);
    work.run(work.left);
    work.row = row_of(c, SumsRow{to, row, w.sums + c, w.scale + c, bias + c});
    work.left = rows;
    if (!kWorksBeside) work.run(work.left);
  }
  work.run(work.left);
}

// Vectors of a row's end: n lanes of them exist, which may be none or all.
inline F load_at(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : n > 0 ? loadn(p, static_cast<int>(n)) : zero();
}
template <class T>
inline void store_at(T* p, F a, int64_t n) {
  if (n >= kLanes)
    store(p, a);
  else if (n > 0)
    storen(p, a, static_cast<int>(n));
}

// out = product, as float32 or bfloat16
template <class T>
struct OutRow {
  SumsRow sums;
  T* out;
  int64_t stride, columns;
  void run() {
    for (int j = 0; j < kTileColumns; j += kLanes) store_at(out + j, sums.value(j), columns - j);
    sums.next();
    out += stride;
  }
};

// z = x + op(product); z has room for whole vectors.
template <class Op>
struct AddRow {
  SumsRow sums;
  const float* x;
  int64_t x_stride, columns;
  float* z;
  int64_t z_stride;
  void run() {
    for (int j = 0; j < kTileColumns; j += kLanes) store(z + j, load_at(x + j, columns - j) + Op::value(sums.value(j)));
    sums.next();
    x += x_stride;
    z += z_stride;
  }
};
