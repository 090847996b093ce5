// Numbers as eight-bit codes, see int8.h: rows of activations at every call, weights once. Included inside an ISA
// namespace.

struct RowCode {
  float scale;
  int32_t zero;
};

// What a row's numbers reach, lane by lane; both begin at 0. A NaN or an infinity stays in `low`.
struct Range {
  F low, high;
  void add(F a) {
    low = fma(a, zero(), min_second(a, low));
    high = max_second(a, high);
  }
};

// Sets how the row is coded, and returns what to divide its numbers by, inverted. Rows that hold a NaN or an infinity
// get a scale of NaN, and so do their products.
inline float code_of(const Range& range, RowCode& row) {
  const float low = least_lane(range.low), width = largest_lane(range.high) - low;
  const float inverse = width > 0.0f ? 255.0f / width : 0.0f;
  row.scale = width / 255.0f;
  row.zero = 0;
  if (inverse > 0.0f && inverse <= 3e38f) row.zero = static_cast<int32_t>(__builtin_rintf(-low * inverse));
  return inverse;
}

// In units of Code: whole cache lines and one more, so that rows do not meet in a set of the cache.
inline int64_t code_stride(int64_t width) {
  return round_up(width, 64) + 64;
}

template <class T>
inline void write_codes(const T* x, int64_t width, float inverse, const RowCode& row, Code* to) {
  const F scaled = set1(inverse);
  const I zero_code = set1_i(row.zero);
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) store_codes(to + j, load(x + j) * scaled, zero_code);
  if (j < width) store_codes(to + j, loadn(x + j, static_cast<int>(width - j)) * scaled, zero_code);
}

// Codes of rows; `to` has room for vectors past the last column.
template <class T>
inline void quantize_rows(const T* x, int64_t x_stride, int64_t rows, int64_t width, Code* to, RowCode* row) {
  for (int64_t r = 0; r < rows; ++r, x += x_stride, to += code_stride(width)) {
    Range range{zero(), zero()};
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes) range.add(load(x + j));
    if (j < width) range.add(loadn(x + j, static_cast<int>(width - j)));
    const float inverse = code_of(range, row[r]);
    write_codes(x, width, inverse, row[r], to);
  }
}

// The same from row `first` of a matrix of float32 or bfloat16 on.
inline void quantize_rows(const View& x, int64_t first, int64_t rows, int64_t width, Code* to, RowCode* row) {
  if (x.dtype == kFloat32)
    quantize_rows(static_cast<const float*>(x.data) + first * x.stride, x.stride, rows, width, to, row);
  else
    quantize_rows(static_cast<const bf16*>(x.data) + first * x.stride, x.stride, rows, width, to, row);
}

// A packed weight: panels of kTileColumns outputs, [words of the depth][kTileColumns] words each, zero-padded; then the
// sums of each output's codes, then the outputs' scales.
#ifdef __AMX_INT8__
constexpr int64_t kWordUnit = 16;  // of the depth: what a tile register takes
#else
constexpr int64_t kWordUnit = 1;
#endif
inline int64_t code_words(int64_t inputs) {
  return round_up((inputs + kPerWord - 1) / kPerWord, kWordUnit);
}

struct PackedCodes {
  int32_t* words;
  int32_t* sums;
  float* scale;

  PackedCodes() = default;
  PackedCodes(const void* packed, int64_t outputs, int64_t inputs) {
    words = static_cast<int32_t*>(const_cast<void*>(packed));
    sums = words + panels(outputs) * kTileColumns * code_words(inputs);
    scale = reinterpret_cast<float*>(sums + padded_width(outputs));
  }
};

inline int64_t packed_code_bytes(int64_t, int64_t outputs, int64_t inputs) {
  return 4 * (panels(outputs) * kTileColumns * code_words(inputs) + 2 * padded_width(outputs));
}

// Column j of a panel from one row of the weight, `row` [inputs] of floats; codes are room for as many.
inline void pack_output(const float* row, int64_t inputs, WeightCode* codes, int32_t* panel, int j, int32_t* sum,
                        float* scale) {
  float most_of = 0.0f;
  bool finite = true;
  for (int64_t k = 0; k < inputs; ++k) {
    const float size = __builtin_fabsf(row[k]);
    most_of = size > most_of ? size : most_of;
    finite &= size <= 3.4028235e38f;
  }
  const float inverse = most_of > 0.0f && finite ? 127.0f / most_of : 0.0f;
  int32_t total = 0;
  for (int64_t k = 0; k < inputs; ++k) {
    const float v = row[k] * inverse, inside = v > 127.0f ? 127.0f : v > -127.0f ? v : -127.0f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers, halves to even ones
    codes[k] = static_cast<WeightCode>(static_cast<int32_t>((inside + kRound) - kRound));
    total += codes[k];
  }
  for (int64_t k = inputs; k < code_words(inputs) * kPerWord; ++k) codes[k] = 0;
  for (int64_t w = 0; w < code_words(inputs); ++w)
    __builtin_memcpy(panel + w * kTileColumns + j, codes + w * kPerWord, 4);
  *sum = total;
  *scale = finite ? most_of / 127.0f : __builtin_nanf("");
}

struct PackScratch {
  float* row;
  WeightCode* codes;
  void carve(Carver& c, int64_t inputs) {
    row = c.take<float>(round_up(inputs, kLanes));
    codes = c.take<WeightCode>(code_words(inputs) * kPerWord);
  }
};

inline void pack_codes(const View& w, int64_t outputs, int64_t inputs, void* packed) {
  const PackedCodes to(packed, outputs, inputs);
  auto task = [&](int64_t p) {
    int32_t* panel = to.words + p * kTileColumns * code_words(inputs);
    PackScratch room;
    const bool there = carve(kPrivate, room, inputs);
    for (int j = 0; j < kTileColumns; ++j) {
      const int64_t output = p * kTileColumns + j;
      if (output < outputs && there) {
        load_vector(rows_of(w, output), inputs, round_up(inputs, kLanes), room.row);
        pack_output(room.row, inputs, room.codes, panel, j, to.sums + output, to.scale + output);
      } else {
        for (int64_t k = 0; k < code_words(inputs); ++k) panel[k * kTileColumns + j] = 0;
        to.sums[output] = 0;
        to.scale[output] = there ? 0.0f : __builtin_nanf("");
      }
    }
  };
  parallel_tasks(panels(outputs), task);
}
