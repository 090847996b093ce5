// Weight and bias gradients of a grouped call, from what grouped_bwd_kernel left, and the second stage of dgamma,
// dbeta.
//
//   dw1 = grad_first.T @ p     db1 = column sums of grad_first        dw2 = grad_second.T @ m     db2 likewise
//
// One block makes a 64 x 64 tile of one gradient over all tokens of its member: no partial sums, no atomics. Tiles are
// numbered layer by layer; kTile^2 is small so that a few thousand of them fill any device evenly.
//
// Chosen: sums of the rounded dy and dh for the bias gradients; they are at hand here, and their roundings (2^-9 each,
// independent) fall with the number of tokens far below that of the result.
#pragma once

#include "group.h"
#include "product.cuh"

namespace ffnas {
namespace cuda {

constexpr int kTile = 64;
constexpr int kTileWarps = 4;
constexpr int kTileThreads = kTileWarps * kWarp;

// Tiles of a member's two gradients in one layer; both are first_width x hidden or its transpose.
FFNAS_DEVICE int tiles_of(const Member& m) {
  const int64_t inner = (m.inner + kTile - 1) / kTile, hidden = (m.hidden + kTile - 1) / kTile;
  return static_cast<int>(2 * inner * hidden);
}

// One float of a vector in any dtype.
FFNAS_DEVICE void store_one(void* to, int64_t dtype, int at, float v) {
  if (dtype == kFloat32) {
    static_cast<float*>(to)[at] = v;
  } else if (dtype == kBFloat16) {
    static_cast<BFloat16*>(to)[at] = element_of<BFloat16>(v);
  } else {
    static_cast<Half*>(to)[at] = element_of<Half>(v);
  }
}

template <class T>
FFNAS_KERNEL(kTileThreads, 1)
grouped_weights_kernel(FFNAS_ARGUMENT Group group) {
  constexpr int kDown = 2, kAcross = 4, kStride = kTile + kPad, kStage = kDepth * kStride;
  int k = 0, tile = block();
  while (tile >= tiles_of(group.member[k]) * static_cast<int>(group.member[k].layers)) {
    tile -= tiles_of(group.member[k]) * static_cast<int>(group.member[k].layers);
    ++k;
  }
  const Member& member = group.member[k];
  const Layer& layer = group.layer[member.first_layer + tile / tiles_of(member)];
  tile %= tiles_of(member);
  const bool second = tile >= tiles_of(member) / 2;
  if (second) tile -= tiles_of(member) / 2;
  // both gradients: rows of the left operand's width, columns of the right one's
  const int rows = static_cast<int>(second ? member.hidden : member.inner);
  const int columns = static_cast<int>(second ? member.inner : member.hidden);
  const int across = (columns + kTile - 1) / kTile;
  const int row = tile / across * kTile, column = tile % across * kTile;
  const View left = {second ? layer.grad_second : layer.grad_first, rows, DTypeOf<T>::kValue};
  const View right = {second ? layer.m : layer.p, columns, DTypeOf<T>::kValue};

  T* stages = Carver(shared_memory()).take<T>(4 * kStage);  // two of the left operand, two of the right
  const int down = warp() % 2 * 32, right_of = warp() / 2 * 32;
  float acc[kDown][kAcross][4] = {};
  float bias = 0.0f;
  TileCopy<T, kDepth, kTile, kTileThreads> copy_left, copy_right;
  int stage = 1;
  // one turn early: the first only fetches stage 0
  for (int64_t t = -kDepth; t < member.tokens; t += kDepth) {
    const bool more = t + kDepth < member.tokens;
    if (more) {
      copy_left.load(left, t + kDepth, member.tokens, row, rows);
      copy_right.load(right, t + kDepth, member.tokens, column, columns);
    }
    const T *a = stages + stage * kStage, *b = stages + (2 + stage) * kStage;
    if (t >= 0) Multiply<T, kDown, kAcross, true, true>::run(acc, a + down, kStride, b + right_of, kStride, kDepth);
    if (t >= 0 && column == 0 && thread() < kTile)
      for (int i = 0; i < kDepth; ++i) bias += float_of(a[i * kStride + thread()]);
    stage ^= 1;
    if (more) {
      copy_left.store(stages + stage * kStage);
      copy_right.store(stages + (2 + stage) * kStage);
    }
    sync_threads();
  }
  void* grad_bias = second ? layer.grad_b2 : layer.grad_b1;
  if (column == 0 && thread() < kTile && row + thread() < rows && grad_bias != nullptr)
    store_one(grad_bias, member.weight_dtype, row + thread(), bias);
  void* grad = second ? layer.grad_w2 : layer.grad_w1;
  if (grad == nullptr) return;
  const int first_row = row + down + lane() / 4, first_column = column + right_of + lane() % 4 * 2;
#pragma unroll
  for (int i = 0; i < kDown; ++i)
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int r = first_row + 16 * i + 8 * s;
      if (r >= rows) continue;
      const View to = {grad, columns, member.weight_dtype};
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const int c = first_column + 8 * j + u;
          if (c < columns) store_one(to.data, to.dtype, r * columns + c, acc[i][j][2 * s + u]);
        }
    }
}

// Block b adds 32 columns of dgamma or dbeta of one layer over the blocks of its member.
FFNAS_KERNEL(kBlockThreads, 1)
grouped_sums_kernel(FFNAS_ARGUMENT Group group) {
  float* share = Carver(shared_memory()).take<float>(kBlockThreads);
  int k = 0, task = block();
  for (;; ++k) {
    const Member& m = group.member[k];
    const int own = 2 * static_cast<int>(m.layers) * static_cast<int>((m.hidden + kWarp - 1) / kWarp);
    if (task < own) break;
    task -= own;
  }
  const Member& member = group.member[k];
  const int columns = static_cast<int>((member.hidden + kWarp - 1) / kWarp);
  const int width = static_cast<int>((member.hidden + 3) / 4 * 4);
  const int column = task % columns * kWarp + lane(), kind = task / columns % 2, l = task / columns / 2;
  const int count = static_cast<int>((member.tokens + group.rows - 1) / group.rows);
  float total = 0.0f;
  if (column < member.hidden)
    for (int b = warp(); b < count; b += kBlockWarps)
      total += member.partial[((int64_t{b} * member.layers + l) * 2 + kind) * width + column];
  share[thread()] = total;
  sync_threads();
  if (warp() != 0 || column >= member.hidden) return;
  total = 0.0f;
#pragma unroll
  for (int b = 0; b < kBlockWarps; ++b) total += share[b * kWarp + lane()];
  const Layer& layer = group.layer[member.first_layer + l];
  void* to = kind == 0 ? layer.grad_ln_weight : layer.grad_ln_bias;
  if (to != nullptr) store_one(to, member.norm_dtype, column, total);
}

}  // namespace cuda
}  // namespace ffnas
