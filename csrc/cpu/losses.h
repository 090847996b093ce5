// Plain data of the distillation losses, of attention and of linear layers, shared by the entry points (losses_api.h)
// and the kernels of every instruction set. Part of ffn.h, which includes it; nothing here has a body worth
// vectorizing.
//
// Names: B samples, S positions, L layers, d head size. Layers of one call agree in shape and are reduced to one
// scalar.
#pragma once

#include <cstdint>

namespace ffnas {

// A tensor [B, heads, S, d], or [B, S, d] with head 0: strides in elements, last stride 1; data == nullptr where
// absent.
struct Heads {
  void* data;
  int64_t batch, head, row;
  int32_t dtype;
};

// [B, S] bytes, contiguous, not 0 at real tokens.
struct Mask {
  const uint8_t* real;
  int64_t batch, length;
};

struct ScoreLayer {
  Heads q_s, k_s, q_t, k_t, grad_q, grad_k;  // gradients absent where not needed (both or none)
};

// How the score loss is computed: per head, the Gram form where it pays and is proven accurate, or one of the two
// always.
enum ScoreForm : int64_t { kAutomatic = 0, kTiled = 1, kGram = 2 };

struct ScoreCall {
  int64_t layers, heads, d_s, d_t;
  ScoreForm form;
  float scale_s, scale_t;
  Mask mask;
  ScoreLayer* layer;
  float* loss;
  int failed;
};

struct HiddenLayer {
  Heads h_s, h_t, grad;  // grad absent where not needed (all or none)
};

struct HiddenCall {
  int64_t layers, d_s, d_t;
  Mask mask;
  HiddenLayer* layer;
  View weight, bias, grad_weight, grad_bias;  // bias, gradients absent where there is none or none is needed
  float* loss;
  int failed;
};

struct SoftCrossEntropyCall {
  int64_t rows, classes;
  float temperature;
  View student, teacher, grad;  // [rows, classes]; grad absent where not needed
  float* loss;
  int failed;
};

struct AttentionCall {
  int64_t heads, d, d_t;
  float scale, scale_t;
  Mask mask;
  Call dropout;              // its drop_* and seed
  int64_t queries;           // leading rows of q and context that there are; 0: as many as keys (inference)
  Heads q, k, v, q_t, k_t;   // q_t, k_t absent without the score loss
  Heads context;             // written by forward, read by backward
  Heads grad_context, grad_q, grad_k, grad_v;
  float* lse;                // [B, heads, S] log of the softmax's denominator, natural logarithm; nullptr: not kept
  float* loss;               // forward's result
  const float* grad_loss;    // nullptr: 0
  int failed;
};

// Linear layers of one input, or one with a residual and LayerNorm (`residual` present); see linear.h.
constexpr int64_t kMaxLinears = 4;
struct LinearLayer {
  View w, b, out;
  int64_t outputs;
  void* packed;  // w as `Kernels::pack` wrote it; nullptr: packed for this call
};
struct LinearCall {
  int64_t tokens, inputs, layers;
  View x, residual, ln_weight, ln_bias;
  float eps;
  LinearLayer layer[kMaxLinears];
  int failed;
};

// Attention of an inference pass over samples of any lengths whose rows lie one after the other, without padding.
struct RaggedAttention {
  int64_t samples, heads, d;
  float scale;
  const int64_t* start;       // [samples + 1]: the samples' first rows in k and v, and their number; no sample is empty
  View q, k, v, context;      // [rows, heads * d]
  bool first;                 // q and context have one row a sample, that of its first token
  int failed;
};

// Sums of rows of three tables, through LayerNorm if there is one: out[r] = LN(token[ids[r]] + position[..] +
// type[..]).
struct EmbedCall {
  int64_t rows, hidden;
  const int32_t *ids, *positions, *types;  // ids unused without a token table
  View token, position, type;              // token absent: the other two alone
  View ln_weight, ln_bias, out;            // both absent: no LayerNorm
  float eps;
  int failed;
};

// What one instruction set offers; all return 0, or 1 when out of memory.
struct LossKernels {
  int (*score_mse)(ScoreCall&);
  int (*hidden_mse)(HiddenCall&);
  int (*soft_cross_entropy)(SoftCrossEntropyCall&);
  int (*attention_forward)(AttentionCall&);
  int (*attention_backward)(AttentionCall&);
  int (*linear)(LinearCall&);
  int (*attention_ragged)(RaggedAttention&);
  int (*embed)(EmbedCall&);
};

}  // namespace ffnas
