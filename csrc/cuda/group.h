// The record of a grouped call: several stacks of FFNs ("members") that differ in everything but the compute dtype.
// All fields take 8 bytes; kernels/cuda/grouped.py writes them as int64 words in this order. It travels as a kernel
// argument.
#pragma once

#include <cstddef>

#include "calls.h"

namespace ffnas {
namespace cuda {

constexpr int kMaxMembers = 16;
constexpr int kMaxLayers = 64;  // of all members together

// In the serial form `first` is h [tokens, inner] and `second` y; in the parallel form they are y1 and y2. All
// activations are contiguous; z, x's dtype; first, second, their gradients, p and m, the compute dtype.
struct Layer {
  const void *w1, *b1, *w2, *b2, *ln_weight, *ln_bias;
  int64_t w1_stride, w2_stride;
  void* z;  // input, or nullptr in the first layer, whose input is the member's x
  void *first, *second;
  float* stats;
  // backward: operands of the weight gradients grad_first.T @ p and grad_second.T @ m
  void *grad_first, *grad_second, *p, *m;
  void *grad_w1, *grad_b1, *grad_w2, *grad_b2, *grad_ln_weight, *grad_ln_bias;
};

struct Member {
  View x;
  View out;       // forward: the result; backward: its gradient
  View grad_x;    // backward: absent where not wanted
  float* g;       // backward: [tokens, hidden], the gradient between layers
  float* partial;  // backward: [row blocks, layers, 2, padded hidden]
  const int32_t* program;
  const int64_t* seed;
  uint64_t drop_threshold;
  double drop_scale, eps;
  int64_t tokens, hidden, inner, layers, first_layer, first_block, weight_dtype, norm_dtype;
};

struct Group {
  int64_t members, layers, slots, rows, blocks, compute_dtype, region, device;
  void* stream;
  Member member[kMaxMembers];
  Layer layer[kMaxLayers];
};

}  // namespace cuda
}  // namespace ffnas
