// Everything above the vector type that products on codes need, in order; included last inside the namespace of one
// set, as kernels.h is. `int8_kernels` is what it offers.
#ifdef __AVX512F__
#include "elementary_fast.h"  // its errors are far below those of a code
#else
#include "elementary.h"
#endif
#define FFNAS_FUNCTION inline
#include "../activations.h"
#undef FFNAS_FUNCTION
#include "segment.h"
#include "tile.h"
#include "gemm_f32.h"
#include "skinny.h"
#include "layernorm.h"
#include "layer.h"
#include "vec_i8.h"
#include "quantize.h"
#include "gemm_i8.h"
#include "linear_i8.h"
#include "forward_i8.h"

struct SumsScratch {
  Code* codes;
  RowCode* row;
  int32_t* sums;
  void carve(Carver& c, int64_t rows, int64_t depth) {
    codes = c.take<Code>(round_up(rows, kTileRows) * code_stride(depth));
    row = c.take<RowCode>(rows);
    sums = c.take<int32_t>(round_up(rows, kTileRows) * kTileColumns);
  }
};

// Test hook, see int8.h.
inline void code_sums(const View& x, int64_t rows, int64_t depth, const void* packed, int64_t outputs, int32_t* codes,
                      float* scale, int32_t* zeros, int32_t* sums) {
  SumsScratch room;
  if (!carve(kShared, room, rows, depth)) return;
  const PackedCodes w(packed, outputs, depth);
  quantize_rows(static_cast<const float*>(x.data), x.stride, rows, depth, room.codes, room.row);
  const CodeScope scope;
  for (int64_t c = 0; c < outputs; c += kTileColumns) {
    code_product(room.codes, code_stride(depth), rows, w, depth, c, outputs, room.sums, SumsWork<NoRow>{});
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = c; j < least(outputs, c + kTileColumns); ++j)
        sums[r * outputs + j] = room.sums[r * kTileColumns + j - c];
  }
  for (int64_t r = 0; r < rows; ++r) {
    scale[r] = room.row[r].scale;
    zeros[r] = room.row[r].zero;
    for (int64_t k = 0; k < depth; ++k) codes[r * depth + k] = room.codes[r * code_stride(depth) + k];
  }
}

extern const Int8Kernels int8_kernels;
