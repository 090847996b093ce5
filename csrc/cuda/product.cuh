// Matrix products of one block, accumulated in float32 fragments.
//
// The unit is a warp's m16n8k16 tile. 16-bit elements go through ldmatrix and mma.sync; float32 through fused
// multiply-adds (tf32 would lose 13 bits) with the same fragment layout, so that everything around is written once:
//
//   fragment d[4] of a 16 x 8 tile:  d[0], d[1] at row lane / 4, column 2 (lane % 4) and next;  d[2], d[3] 8 rows on
//
// Leading dimensions in shared memory are 8 elements more than a multiple of 16, so that the eight rows of an 8 x 8
// matrix fall into different banks.
//
// Chosen: weights through registers into two shared stages. Their rows start at any element (views of a supernet, width
// 135 in bfloat16), which cp.async (4 bytes) and TMA (16) cannot take, and float32 weights are rounded on the way.
// Rejected: a padded copy of the weights per call, which costs more than what it saves at these sizes.
#pragma once

#include "memory.cuh"

namespace ffnas {
namespace cuda {

constexpr int kBlockWarps = 8;
constexpr int kBlockThreads = kBlockWarps * kWarp;
constexpr int kChunk = 128;  // columns of a product worked on at a time
constexpr int kDepth = 32;   // of one stage
constexpr int kPad = 8;

// acc += left @ right over `depth` (a multiple of 16). left points at the warp's first row: [row][k], or [k][row] if
// transposed; right at its first column: [column][k], or [k][column] if transposed.
template <class T, int kDown, int kAcross, bool kLeftTransposed, bool kRightTransposed>
struct Multiply {
  static_assert(kAcross % 2 == 0, "columns are loaded 16 at a time");
  static FFNAS_DEVICE void run(float (&acc)[kDown][kAcross][4], const T* left, int left_stride, const T* right,
                               int right_stride, int depth) {
    const int i8 = lane() % 8, low = lane() / 8 % 2 * 8, high = lane() / 16 * 8;
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        if (kLeftTransposed)
          load_matrices_transposed(a[i], left + (k + i8 + high) * left_stride + 16 * i + low);
        else
          load_matrices(a[i], left + (16 * i + i8 + low) * left_stride + k + high);
      }
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) {
        uint32_t b[4];
        if (kRightTransposed)
          load_matrices_transposed(b, right + (k + i8 + low) * right_stride + 8 * j + high);
        else
          load_matrices(b, right + (8 * j + i8 + high) * right_stride + k + low);
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          multiply_16816(acc[i][j], a[i], b[0], b[1], T{});
          multiply_16816(acc[i][j + 1], a[i], b[2], b[3], T{});
        }
      }
    }
  }
};

template <int kDown, int kAcross, bool kLeftTransposed, bool kRightTransposed>
struct Multiply<float, kDown, kAcross, kLeftTransposed, kRightTransposed> {
  static FFNAS_DEVICE void run(float (&acc)[kDown][kAcross][4], const float* left, int left_stride, const float* right,
                               int right_stride, int depth) {
    const int row = lane() / 4, column = lane() % 4 * 2;
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      float a[kDown][2], b[kAcross][2];
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int r = 16 * i + 8 * s + row;
          a[i][s] = kLeftTransposed ? left[k * left_stride + r] : left[r * left_stride + k];
        }
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int c = 8 * j + column + s;
          b[j][s] = kRightTransposed ? right[k * right_stride + c] : right[c * right_stride + k];
        }
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int j = 0; j < kAcross; ++j)
#pragma unroll
          for (int s = 0; s < 4; ++s) acc[i][j][s] = fmaf(a[i][s / 2], b[j][s % 2], acc[i][j][s]);
    }
  }
};

template <class T>
struct DTypeOf {
  static constexpr int64_t kValue = kFloat32;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr int64_t kValue = kBFloat16;
};
template <>
struct DTypeOf<Half> {
  static constexpr int64_t kValue = kFloat16;
};

// Columns column..column + 3 of a row of `m`, which is T or float32, rounded to T; zero outside [0, rows) x [0, width).
template <class T>
FFNAS_DEVICE Four<T> load_four(const View& m, int64_t row, int64_t rows, int column, int width) {
  Four<T> f = {};
  if (row >= rows || column >= width) return f;
  const int64_t at = row * m.stride + column;
  if (m.dtype == DTypeOf<T>::kValue) {
    const T* p = static_cast<const T*>(m.data) + at;
    if (column + 4 <= width && aligned(p, sizeof f)) return *reinterpret_cast<const Four<T>*>(p);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (column + j < width) f.v[j] = p[j];
    return f;
  }
  float v[4];
  load_group(static_cast<const float*>(m.data) + at, width - column, v);
#pragma unroll
  for (int j = 0; j < 4; ++j) f.v[j] = element_of<T>(v[j]);
  return f;
}

// A tile of kTileRows x kTileColumns elements on its way from device memory to shared memory, kThreads threads at work.
template <class T, int kTileRows, int kTileColumns, int kThreads>
struct TileCopy {
  static constexpr int kStride = kTileColumns + kPad;
  static constexpr int kAcross = kTileColumns / 4;
  static constexpr int kEach = kTileRows * kAcross / kThreads;
  static_assert(kEach * kThreads == kTileRows * kAcross, "every thread takes as many groups");
  Four<T> held[kEach];

  FFNAS_DEVICE void load(const View& m, int64_t row, int64_t rows, int column, int width) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int unit = thread() + k * kThreads;
      held[k] = load_four<T>(m, row + unit / kAcross, rows, column + unit % kAcross * 4, width);
    }
  }
  FFNAS_DEVICE void store(T* to) const {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int unit = thread() + k * kThreads;
      *reinterpret_cast<Four<T>*>(to + unit / kAcross * kStride + unit % kAcross * 4) = held[k];
    }
  }
};

FFNAS_DEVICE int round_up(int value, int to) { return (value + to - 1) / to * to; }
// Leading dimension of an operand of a product over `depth`, kept whole in shared memory.
FFNAS_DEVICE int operand_stride(int64_t depth) { return round_up(static_cast<int>(depth), kDepth) + kPad; }

// The product of a block: kRows rows of an operand in shared memory with kChunk columns of a weight in device memory.
// kTransposed: the weight is [depth, columns] rather than [columns, depth].
template <class T, int kRows, bool kTransposed>
struct BlockProduct {
  static constexpr int kWarpRows = kRows >= 32 ? 32 : 16;
  static constexpr int kWarpsDown = kRows / kWarpRows;
  static constexpr int kWarpColumns = kChunk / (kBlockWarps / kWarpsDown);
  static constexpr int kDown = kWarpRows / 16, kAcross = kWarpColumns / 8;
  using Copy = TileCopy<T, kTransposed ? kDepth : kChunk, kTransposed ? kChunk : kDepth, kBlockThreads>;
  static constexpr int kStageElements = (kTransposed ? kDepth : kChunk) * Copy::kStride;
  static constexpr int kResultStride = kChunk + kPad;

  // result [kRows][kResultStride] = operand @ columns n .. n + kChunk - 1 of the weight. Ends with a barrier.
  static FFNAS_DEVICE void run(const T* operand, const View& weight, int depth, int columns, int n, T* stages,
                               float* result) {
    const int down = warp() % kWarpsDown * kWarpRows, across = warp() / kWarpsDown * kWarpColumns;
    const bool works = n + across < columns;
    const int stride = operand_stride(depth);
    float acc[kDown][kAcross][4] = {};
    Copy copy;
    int stage = 1;
    // Two stages of the weight in shared memory: while one is multiplied, the next is on its way in registers, and is
    // stored when the multiplications have been issued. One turn early: the first only fetches stage 0.
    for (int k = -kDepth; k < depth; k += kDepth) {
      const bool more = k + kDepth < depth;
      if (more) load(copy, weight, depth, columns, n, k + kDepth);
      const T* right = stages + stage * kStageElements + across * (kTransposed ? 1 : Copy::kStride);
      if (works && k >= 0)
        Multiply<T, kDown, kAcross, false, kTransposed>::run(acc, operand + down * stride + k, stride, right,
                                                             Copy::kStride, kDepth);
      stage ^= 1;
      if (more) copy.store(stages + stage * kStageElements);
      sync_threads();
    }
    // Fragments to rows: what follows works on four neighbouring columns a thread.
    float* to = result + (down + lane() / 4) * kResultStride + across + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int s = 0; s < 4; ++s) to[(16 * i + s / 2 * 8) * kResultStride + 8 * j + s % 2] = acc[i][j][s];
    sync_threads();
  }

 private:
  static FFNAS_DEVICE void load(Copy& copy, const View& weight, int depth, int columns, int n, int k) {
    if (kTransposed)
      copy.load(weight, k, depth, n, columns);
    else
      copy.load(weight, n, columns, k, depth);
  }
};

}  // namespace cuda
}  // namespace ffnas
