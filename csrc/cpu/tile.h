// Tiles: rows x kTileColumns floats, contiguous, at most kTileRows rows. Moves between tiles and the caller's
// matrices, which have any row stride, float32 or bfloat16 elements, and edges. Included inside an ISA namespace.
// `columns` counts the columns that exist in the matrix (may be <= 0); the others read as 0 and are not written.

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

constexpr int kTileFloats = kTileRows * kTileColumns;

// Vectors at a row's end: `left` lanes of them exist, all of them if left >= kLanes.
template <class T>
inline F load_part(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : loadn(p, static_cast<int>(left));
}
template <class T>
inline void store_part(T* p, F a, int64_t left) {
  left >= kLanes ? store(p, a) : storen(p, a, static_cast<int>(left));
}

template <class T>
inline void load_rows(const T* p, int64_t stride, int rows, int64_t columns, float* tile) {
  for (int r = 0; r < rows; ++r, p += stride, tile += kTileColumns)
    for (int j = 0; j < kTileColumns; j += kLanes) {
      const int64_t left = columns - j;
      if (left >= kLanes)
        store(tile + j, load(p + j));
      else
        store(tile + j, left > 0 ? loadn(p + j, static_cast<int>(left)) : zero());
    }
}

template <class T>
inline void store_rows(T* p, int64_t stride, int rows, int64_t columns, const float* tile) {
  for (int r = 0; r < rows; ++r, p += stride, tile += kTileColumns)
    for (int j = 0; j < kTileColumns; j += kLanes) {
      const int64_t left = columns - j;
      if (left >= kLanes)
        store(p + j, load(tile + j));
      else if (left > 0)
        storen(p + j, load(tile + j), static_cast<int>(left));
    }
}

inline void load_tile(const View& v, int64_t row, int64_t column, int rows, int64_t width, float* tile) {
  const int64_t at = row * v.stride + column;
  if (v.dtype == kFloat32)
    load_rows(static_cast<const float*>(v.data) + at, v.stride, rows, width - column, tile);
  else
    load_rows(static_cast<const bf16*>(v.data) + at, v.stride, rows, width - column, tile);
}

inline void store_tile(const View& v, int64_t row, int64_t column, int rows, int64_t width, const float* tile) {
  const int64_t at = row * v.stride + column;
  if (v.dtype == kFloat32)
    store_rows(static_cast<float*>(v.data) + at, v.stride, rows, width - column, tile);
  else
    store_rows(static_cast<bf16*>(v.data) + at, v.stride, rows, width - column, tile);
}

// Saved activations, [tokens, width] elements, lie tile by tile within groups of kBlockUnit rows, of which every block
// of rows is made: [group][panel of kTileColumns][row][column of the panel]. Writing and reading goes through memory in
// full lines but for a last panel that is narrower, no row straddles lines, and a group takes the memory of its rows in
// a matrix of rows: what a block has read can be written over with rows of the same type (backward's gradient of x is).
inline int64_t saved_width(const View& v) { return v.stride; }
inline int64_t saved_columns(const View& v, int64_t column) { return least(kTileColumns, saved_width(v) - column); }
inline int64_t saved_at(const View& v, int64_t row, int64_t column, int64_t tokens) {
  const int64_t first = row / kBlockUnit * kBlockUnit, rows = least(kBlockUnit, tokens - first);
  return first * saved_width(v) + column * rows + (row - first) * saved_columns(v, column);
}
// Calls fn(r, rows) for the parts of a tile that lie in one group each; `row` begins one.
template <class Fn>
inline void for_saved_groups(int64_t rows, Fn&& fn) {
  for (int64_t r = 0; r < rows; r += kBlockUnit) fn(r, static_cast<int>(least(kBlockUnit, rows - r)));
}
// They are read in the backward pass, when caches hold other things: written past the caches, which spares reading the
// lines first (forward with saving 3 to 9 % faster at 256 to 4096 tokens, backward no slower).
template <class T>
inline void stream_tile(T* p, int rows, const float* tile) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) return store_rows(p, kTileColumns, rows, kTileColumns, tile);
  for (int i = 0; i < rows * kTileColumns; i += kLanes) stream(p + i, load(tile + i));
}
template <class T>
inline void save_tile_as(const View& v, int64_t row, int64_t column, int rows, int64_t tokens, const float* tile) {
  const int64_t columns = saved_columns(v, column);
  for_saved_groups(rows, [&](int64_t r, int n) {
    T* to = static_cast<T*>(v.data) + saved_at(v, row + r, column, tokens);
    if (columns == kTileColumns)
      stream_tile(to, n, tile + r * kTileColumns);
    else
      store_rows(to, columns, n, columns, tile + r * kTileColumns);
  });
}
inline void save_tile(const View& v, int64_t row, int64_t column, int rows, int64_t tokens, const float* tile) {
  if (v.dtype == kFloat32)
    save_tile_as<float>(v, row, column, rows, tokens, tile);
  else
    save_tile_as<bf16>(v, row, column, rows, tokens, tile);
}
template <class T>
inline void restore_tile_as(const View& v, int64_t row, int64_t column, int rows, int64_t tokens, float* tile) {
  const int64_t columns = saved_columns(v, column);
  for_saved_groups(rows, [&](int64_t r, int n) {
    load_rows(static_cast<const T*>(v.data) + saved_at(v, row + r, column, tokens), columns, n, columns,
              tile + r * kTileColumns);
  });
}
inline void restore_tile(const View& v, int64_t row, int64_t column, int rows, int64_t tokens, float* tile) {
  if (v.dtype == kFloat32)
    restore_tile_as<float>(v, row, column, rows, tokens, tile);
  else
    restore_tile_as<bf16>(v, row, column, rows, tokens, tile);
}

// A tile of a float matrix whose stride is a multiple of kTileColumns: no edges.
inline void load_block(const float* p, int64_t stride, int rows, float* tile) {
  load_rows(p, stride, rows, kTileColumns, tile);
}
inline void store_block(float* p, int64_t stride, int rows, const float* tile) {
  store_rows(p, stride, rows, kTileColumns, tile);
}

inline void clear_block(float* p, int64_t stride, int rows) {
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < kTileColumns; j += kLanes) store(p + r * stride + j, zero());
}
// block = a + b
inline void add_to_block(const float* a, const float* b, float* p, int64_t stride, int rows) {
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < kTileColumns; j += kLanes) {
      const int at = r * kTileColumns + j;
      store(p + r * stride + j, load(a + at) + load(b + at));
    }
}

inline void copy_tile(const float* from, int rows, float* to) {
  for (int i = 0; i < rows * kTileColumns; i += kLanes) store(to + i, load(from + i));
}

inline void add_tile(float* tile, const float* other, int rows) {
  for (int i = 0; i < rows * kTileColumns; i += kLanes) store(tile + i, load(tile + i) + load(other + i));
}

// tile[r, j] += bias[j]
inline void add_bias(float* tile, const float* bias, int rows) {
  F b[kTileColumns / kLanes];
  for (int j = 0; j < kTileColumns / kLanes; ++j) b[j] = load(bias + j * kLanes);
  for (int r = 0; r < rows; ++r, tile += kTileColumns)
    for (int j = 0; j < kTileColumns / kLanes; ++j) store(tile + j * kLanes, load(tile + j * kLanes) + b[j]);
}

// total[j] += sum over rows of tile[., j]
inline void add_column_sums(const float* tile, int rows, float* total) {
  for (int j = 0; j < kTileColumns; j += kLanes) {
    F s = load(total + j);
    for (int r = 0; r < rows; ++r) s = s + load(tile + r * kTileColumns + j);
    store(total + j, s);
  }
}

// Vector of the caller to floats, zero-padded to `padded` (a multiple of kLanes); absent: all zeros.
inline void load_vector(const View& v, int64_t width, int64_t padded, float* out) {
  for (int64_t j = 0; j < padded; j += kLanes) {
    const int64_t left = v.data == nullptr ? 0 : width - j;
    const int n = static_cast<int>(left < 0 ? 0 : left < kLanes ? left : kLanes);
    if (v.dtype == kFloat32)
      store(out + j, loadn(static_cast<const float*>(v.data) + j, n));
    else
      store(out + j, loadn(static_cast<const bf16*>(v.data) + j, n));
  }
}
inline void store_vector(const View& v, int64_t width, const float* in) {
  for (int64_t j = 0; j < width; j += kLanes) {
    const int n = static_cast<int>(width - j < kLanes ? width - j : kLanes);
    if (v.dtype == kFloat32)
      storen(static_cast<float*>(v.data) + j, load(in + j), n);
    else
      storen(static_cast<bf16*>(v.data) + j, load(in + j), n);
  }
}

