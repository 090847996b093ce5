// Everything above the vector type, in order; included last inside the namespace of one instruction set, which has
// defined the vector (vec_*.h), kMicroRows, kMicroVectors, kPrefetchSteps, kTileRows, kTileColumns and kBlockUnit.
#ifdef FFNAS_BF16_PRODUCTS
#include "elementary_fast.h"
#else
#include "elementary.h"
#endif
#define FFNAS_FUNCTION inline
#include "../activations.h"
#undef FFNAS_FUNCTION
#include "segment.h"
#include "tile.h"
#if defined(FFNAS_BF16_PRODUCTS) || defined(FFNAS_SPLIT_PRODUCTS)
#include "gemm_bf16.h"
#else
#include "gemm_f32.h"
#endif
#include "skinny.h"
#include "philox.h"
#include "layernorm.h"
#include "layer.h"
#include "forward.h"
#include "backward_block.h"
#include "backward.h"
#include "losses_rows.h"
#include "losses_gram.h"
#include "losses_score.h"
#include "losses_hidden.h"
#include "losses_soft.h"
#include "attention.h"
#include "attention_backward.h"
#include "linear.h"
#include "embed.h"
#include "fingerprint.h"

// Test hook: one instruction on n floats, a vector at a time.
inline void unary(int32_t opcode, int32_t mode, const float* in, float* out, int64_t n) {
  float a[kTileColumns], ones[kTileColumns], result[kTileColumns], other[kTileColumns];
  float* reg[kNumRegisters] = {a, ones, result, other};
  const Instruction code{opcode + (mode == 0 ? 0 : mode == 1 ? kGradientOffset : kPairOffset), 2, 0, 1, 3};
  const SegmentCode segment{&code, 1, 3, 2, kNone, kNone, kNone};
  for (int64_t i = 0; i < n; i += kTileColumns) {
    const int64_t count = least(kTileColumns, n - i);
    for (int j = 0; j < kTileColumns; ++j) {
      a[j] = j < count ? in[i + j] : 0.0f;
      ones[j] = 1.0f;
    }
    run_segment(segment, reg, kTileColumns, 0, kTileColumns);
    for (int64_t j = 0; j < count; ++j) out[i + j] = mode == 3 ? other[j] : result[j];
  }
}

extern const Kernels kernels;
extern const LossKernels loss_kernels;
const LossKernels loss_kernels = {score_mse, hidden_mse, soft_cross_entropy, attention_forward, attention_backward,
                                  linear, attention_ragged, embed};
