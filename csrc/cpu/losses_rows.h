// What losses and attention share: rows of real tokens, packed keys, rows of gradients. Included inside an ISA
// namespace.
//
// Padded positions are not masked but left out: real rows are taken one after the other, in place where they are a
// prefix of the sample (the usual case), copied together otherwise.

constexpr int64_t kKeyBlock =
    512;  // keys whose scores with a block of queries exist at a time; a multiple of all tiles

struct RealTokens {
  int32_t* index;  // [B, S]: the first count[b] entries of row b are its real positions, ascending
  int64_t* count;  // [B]
  int64_t length;

  void carve(Carver& c, const Mask& mask) {
    index = c.take<int32_t>(mask.batch * mask.length);
    count = c.take<int64_t>(mask.batch);
    length = mask.length;
  }
  void fill(const Mask& mask) {
    for (int64_t b = 0; b < mask.batch; ++b) {
      int32_t* to = index + b * length;
      int64_t n = 0;
      for (int64_t i = 0; i < length; ++i) {
        to[n] = static_cast<int32_t>(i);  // in bounds: n <= i
        n += mask.real[b * length + i] != 0;
      }
      count[b] = n;
    }
  }
  const int32_t* of(int64_t b) const { return index + b * length; }
  bool is_prefix(int64_t b) const { return count[b] == 0 || of(b)[count[b] - 1] == count[b] - 1; }
};

inline bool has_gaps(const Mask& mask) {
  for (int64_t b = 0; b < mask.batch; ++b)
    for (int64_t i = 1; i < mask.length; ++i)
      if (mask.real[b * mask.length + i] > mask.real[b * mask.length + i - 1]) return true;
  return false;
}

inline int64_t element_size(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// One head of one sample: [S, d].
inline View head_of(const Heads& t, int64_t b, int64_t h) {
  if (t.data == nullptr) return {nullptr, 0, t.dtype};
  return {static_cast<char*>(t.data) + (b * t.batch + h * t.head) * element_size(t.dtype), t.row, t.dtype};
}

// The real rows of one head; `room` is [S, width] floats, used where they must be copied.
inline View real_rows(const Heads& t, int64_t b, int64_t h, const RealTokens& real, int64_t width, float* room) {
  const View v = head_of(t, b, h);
  if (real.is_prefix(b)) return v;
  const int64_t size = element_size(v.dtype), bytes = width * size;
  for (int64_t i = 0; i < real.count[b]; ++i)
    __builtin_memcpy(reinterpret_cast<char*>(room) + i * bytes,
                     static_cast<const char*>(v.data) + real.of(b)[i] * v.stride * size, static_cast<size_t>(bytes));
  return {room, width, v.dtype};
}

// Rows as the columns of a product's second operand: B[k, j] = rows[j, k], for scores.
inline void pack_as_columns(const View& rows, int64_t n, int64_t width, Element* to) {
  for (int64_t p = 0; p < panels(n); ++p) pack_weight_panel(rows, n, width, p, true, to);
}
inline int64_t columns_elements(int64_t n, int64_t width) { return panels(n) * panel_elements(width); }
// Rows as they are, B[k, j] = rows[k, j], in blocks of kKeyBlock rows, for sums over keys.
inline void pack_as_rows(const View& rows, int64_t n, int64_t width, Element* to) {
  for (int64_t k = 0; k < n; k += kKeyBlock)
    for (int64_t p = 0; p < panels(width); ++p)
      pack_weight_panel(rows_of(rows, k), least(kKeyBlock, n - k), width, p, false,
                        to + k / kKeyBlock * panels(width) * panel_elements(kKeyBlock));
}
inline int64_t rows_elements(int64_t n, int64_t width) {
  return (n + kKeyBlock - 1) / kKeyBlock * panels(width) * panel_elements(kKeyBlock);
}
inline const Element* row_block(const Element* packed, int64_t k, int64_t width) {
  return packed + k / kKeyBlock * panels(width) * panel_elements(kKeyBlock);
}

// Rows as the right operand of `outer`.
inline void store_rows_right(const View& rows, int64_t n, int64_t width, int64_t capacity, float* tile,
                             Element* right) {
  for_tiles_by_rows(n, width, [&](int64_t r, int count, int64_t c) {
    load_tile(rows, r, c, count, width, tile);
    store_right(tile, count, r, c, width, capacity, right);
  });
}

// block += tile
inline void add_block(float* block, int64_t stride, int rows, const float* tile) {
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < kTileColumns; j += kLanes)
      store(block + r * stride + j, load(block + r * stride + j) + load(tile + r * kTileColumns + j));
}

template <class T>
inline void put_values(T* to, const float* values, int64_t width, float scale) {
  for (int64_t j = 0; j < width; j += kLanes) store_part(to + j, load(values + j) * set1(scale), width - j);
}
// Row `at` of v = scale * values; values are readable up to a full vector.
inline void put_row(const View& v, int64_t at, const float* values, int64_t width, float scale) {
  if (v.dtype == kFloat32)
    put_values(static_cast<float*>(v.data) + at * v.stride, values, width, scale);
  else
    put_values(static_cast<bf16*>(v.data) + at * v.stride, values, width, scale);
}
inline void clear_row(const View& v, int64_t at, int64_t width) {
  const int64_t size = element_size(v.dtype);
  __builtin_memset(static_cast<char*>(v.data) + at * v.stride * size, 0, static_cast<size_t>(width * size));
}
// Zeros at padded positions.
inline void clear_padding(const View& v, const RealTokens& real, int64_t b, int64_t width) {
  const int32_t* index = real.of(b);
  for (int64_t i = 0, k = 0; i < real.length; ++i) {
    if (k < real.count[b] && index[k] == i)
      ++k;
    else
      clear_row(v, i, width);
  }
}

// s = scale_s * s - scale_t * t; the sum of its squares. Both products are rounded alike (no fused multiply-add), so
// that equal scores leave exactly 0.
inline float difference(float* s, const float* t, int rows, float scale_s, float scale_t) {
  const F a = set1(scale_s), b = set1(scale_t);
  F sums[2] = {zero(), zero()};
  for (int i = 0; i < rows * kTileColumns; i += kTileColumns)
    for (int j = 0; j < kTileColumns; j += kLanes) {
      const F d = load(s + i + j) * a - load(t + i + j) * b;
      store(s + i + j, d);
      sums[j / kLanes & 1] = fma(d, d, sums[j / kLanes & 1]);
    }
  return sum(sums[0] + sums[1]);
}
