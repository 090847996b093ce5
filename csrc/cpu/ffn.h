// Plain data shared by the entry points (api.cpp) and the kernels of every instruction set. No code here is compiled
// for one instruction set only, so nothing here may be an inline function with a body worth vectorizing.
//
// Names: T tokens, H hidden width, d inner width, n layers of the stack. Matrices are row-major with a row stride in
// elements and last stride 1.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "opcodes.h"

namespace ffnas {

using bf16 = uint16_t;

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// A matrix or vector of the caller; data == nullptr where absent.
struct View {
  void* data;
  int64_t stride;
  int32_t dtype;
};

struct Instruction {
  int32_t opcode, dst, a, b, c;
};

struct SegmentCode {
  const Instruction* code;
  int32_t count;
  uint32_t inputs;
  int32_t value, dx, da, db;
};

struct Program {
  SegmentCode segment[kNumSegments];
  bool parallel;
};

// One FFN of the stack: parameters; what forward saves, each absent where it is not saved; gradients, absent where not
// needed. In the parallel form h and y are y1 and y2.
struct Layer {
  View w1, b1, w2, b2, ln_weight, ln_bias;
  View z;         // the layer's input; absent for the first layer, whose input is x
  View h, y, sum;  // results of the products; LayerNorm's input, instead of y where that is all y is for (in tiles)
  View stats;     // [tokens, 2] float32: mean and 1 / deviation of LayerNorm's rows
  View grad_w1, grad_b1, grad_w2, grad_b2, grad_ln_weight, grad_ln_bias;
  void *packed1, *packed2;  // w1 and w2 as `Kernels::pack` wrote them, for forward; nullptr: packed for this call
};

// Runs fn(ctx, task) for task in [0, tasks) on PyTorch's threads, in any order; returns when all are done.
using TaskFn = void (*)(void* ctx, int64_t task);
void run_tasks(int64_t tasks, TaskFn fn, void* ctx);
int num_threads();

// Scratch memory, page-aligned, kept by the calling thread for its next call; nullptr when out of memory. Arenas are
// independent: kShared for what the threads of one call share, kPrivate for one thread's tiles, kEncoder for the
// activations of a whole encoder (encoder.cpp), whose kernels use the others.
enum Arena : int { kPrivate = 0, kShared = 1, kDecoded = 2, kLayers = 3, kEncoder = 4, kArenas = 5 };
void* scratch(Arena arena, size_t bytes);

// Whether this machine and its operating system run instruction set `isa` (numbers in api.cpp).
bool cpu_runs(int isa);

struct Call {
  int64_t tokens, hidden, inner, layers;
  bool has_ln;
  float eps;
  float drop_scale;         // 1 / (1 - p), 0 where p == 1
  uint64_t drop_threshold;  // elements whose word is below it are dropped; 0 = no dropout
  uint64_t seed;
  Program program;
  View x, out;           // forward
  View grad_out, grad_x;  // backward; grad_x absent where not needed
  Layer* layer;
  int failed;  // set to 1 by any thread that ran out of memory
};

// Rows of `width` bytes, `stride` bytes apart.
struct MatrixBytes {
  const char* data;
  int64_t stride, rows, width;
};

// What one instruction set offers; forward and backward return 0, or 1 when out of memory.
struct Kernels {
  const char* name;
  int (*forward)(Call&);
  int (*backward)(Call&);
  // Weights that are kept packed from one inference pass to the next (kernels/backends/packed_weights.py): bytes of a
  // weight [outputs, inputs] for calls of so many tokens, 0 where those do not pack it; and writing it there.
  int64_t (*packed_bytes)(int64_t tokens, int64_t outputs, int64_t inputs);
  void (*pack)(const View& w, int64_t outputs, int64_t inputs, void* packed);
  // Whether they are still what was packed (fingerprint.h).
  void (*fingerprints)(const MatrixBytes* matrices, int64_t count, uint64_t* sums);
  // Test hook, see kernels.h.
  void (*unary)(int32_t opcode, int32_t mode, const float* in, float* out, int64_t n);
};

}  // namespace ffnas

#include "losses.h"
