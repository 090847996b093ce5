// Encoders whose matrix products run on eight-bit integers: what such a set of kernels offers. Plain data, as ffn.h.
//
// A row x of activations becomes codes: x[k] ~ scale * (code[k] - zero), code 0..255, by the row's own least and
// largest value (0 counts as one). A weight becomes w[j, k] ~ scale[j] * code[j, k], code -127..127, by the output's
// largest. Then
//
//     y[j] = scale * scale[j] * (sum_k code[k] * code[j, k] - zero * sum_k code[j, k]) + bias[j]
//
// with sums in 32 bits, exact, the same integers on every processor. Everything else is float32: element-wise programs,
// residuals, LayerNorm. Attention's products and embeddings are those of the set's base (int8_api.h).
//
// Rejected: symmetric activations. They cost the same, and GELU's results, all above -0.17, would use half the codes.
// Ranges fixed beforehand: at most a tenth of the time (docs/runtime.md).
#pragma once

#include "ffn.h"

namespace ffnas {

// Numbers of the sets start here, after those of the instruction sets (api.cpp).
enum Int8Set : int64_t {
  kInt8First = 64,
  kInt8Generic = 64,
  kInt8Avx2 = 65,
  kInt8AvxVnni = 66,
  kInt8Avx512Vnni = 67,
  kInt8Amx = 68,
  kInt8End = 69
};

// Deeper products could leave 32 bits; they stay in floating point.
constexpr int64_t kInt8Depth = 65536;

struct Int8Kernels {
  const char* name;
  int (*linear)(LinearCall&);  // as LossKernels::linear; float32 matrices, packed weights
  int (*forward)(Call&);       // as Kernels::forward, with LayerNorm, without saving and dropout
  int64_t (*packed_bytes)(int64_t tokens, int64_t outputs, int64_t inputs);
  void (*pack)(const View& w, int64_t outputs, int64_t inputs, void* packed);
  // Test hook: codes [rows, depth], scale and zero [rows] of x, and the sums [rows, outputs] of products with packed w.
  void (*sums)(const View& x, int64_t rows, int64_t depth, const void* packed, int64_t outputs, int32_t* codes,
               float* scale, int32_t* zero, int32_t* sums);
};

// Whether this machine runs a set.
bool cpu_runs_int8(int64_t set);

}  // namespace ffnas
