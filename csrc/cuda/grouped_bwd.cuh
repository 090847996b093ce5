// Backward of the grouped FFN: one block, kRows rows, its member's stack from the last layer to the first.
//
//   rows      dy[, dy2] and the first shares of dx, from LayerNorm and post (rows.cuh)
//   serial    per chunk: dm = dy @ w2;  dh, m, dx += mid_bwdv(x, h, dm);  then dp = dh @ w1, p, dx += pre_bwdv(x, dp)
//   parallel  p1, dx += pre_bwdv(x, dy1 @ w1);   p2, dx += mid_bwdv(x, dy2 @ w2)
//
// dx gathers in float32 in device memory (member.g), each element in one and the same thread. What the weight gradients
// need (dy, dh, m, p in the compute dtype) is left in device memory for the second kernel (grouped_weights.cuh), and
// column sums for dgamma and dbeta per block for the third.
#pragma once

#include "grouped.cuh"

namespace ffnas {
namespace cuda {

enum BackwardSegment : int { kCodePost, kCodePostBwd, kCodeMidBwdv, kCodePreBwdv, kBackwardSegments };

// Bytes of a block's row phase: z, and two sums, per warp.
constexpr int kGroupSums = 2;

// Copies rows of a contiguous matrix into an operand.
template <class T, int kRows>
FFNAS_DEVICE void load_operand(T* operand, const void* from, int64_t row, int rows, int width) {
  const int stride = operand_stride(width);
  const View m = {const_cast<void*>(from), width, DTypeOf<T>::kValue};
  for (int r = warp(); r < kRows; r += kBlockWarps)
    for (int c = 4 * lane(); c < stride - kPad; c += 4 * kWarp)
      *reinterpret_cast<Four<T>*>(operand + r * stride + c) = load_four<T>(m, row + r, row + rows, c, width);
}

// The row phase of layer l; leaves column sums of this block in member.partial.
template <class T, int kRows, class R>
FFNAS_DEVICE void backward_rows(const Place<kRows>& at, int l, const R& room) {
  const Member& member = at.member;
  const Layer& layer = at.layers[l];
  const int hidden = at.hidden, width = padded(hidden);
  const bool last = l + 1 == member.layers;
  float* z = reinterpret_cast<float*>(room.region) + warp() * width;
  float* all_sums = reinterpret_cast<float*>(room.region) + kBlockWarps * width;
  float* sums = all_sums + warp() * kGroupSums * width;
  Rows rows = at.row_arguments(l, DTypeOf<T>::kValue);
  rows.grad = last ? member.out : View{member.g, hidden, kFloat32};
  rows.dy = {at.parallel ? layer.grad_first : layer.grad_second, hidden, DTypeOf<T>::kValue};
  if (at.parallel) rows.dy2 = {layer.grad_second, hidden, DTypeOf<T>::kValue};
  rows.dx = {member.g, hidden, kFloat32};
  for (int i = lane(); i < kGroupSums * width; i += kWarp) sums[i] = 0.0f;
  sync_warp();
  for (int r = warp(); r < at.rows; r += kBlockWarps)
    row_backward<1, kGroupSums>(rows, at.row + r, room.segments, room.slots, z, sums, width, Team<1>{nullptr});
  sync_threads();
  if (rows.has_ln()) {
    const int64_t own = (block() - member.first_block) * member.layers + l;
    for (int i = thread(); i < kGroupSums * width; i += kBlockThreads) {
      float total = 0.0f;
#pragma unroll
      for (int k = 0; k < kBlockWarps; ++k) total += all_sums[k * kGroupSums * width + i];
      member.partial[own * kGroupSums * width + i] = total;
    }
    sync_threads();
  }
}

template <class T, int kRows>
FFNAS_KERNEL(kBlockThreads, 1)
grouped_bwd_kernel(FFNAS_ARGUMENT Group group) {
  using R = Room<T, kRows, true>;
  const Place<kRows> at(group);
  const Member& member = at.member;
  const R room(kBackwardSegments, static_cast<int>(group.slots));
  load_segment(room.segments[kCodePost], member.program, kPost, kBlockThreads);
  load_segment(room.segments[kCodePostBwd], member.program, kPostBwd, kBlockThreads);
  load_segment(room.segments[kCodeMidBwdv], member.program, kMidBwdv, kBlockThreads);
  load_segment(room.segments[kCodePreBwdv], member.program, kPreBwdv, kBlockThreads);
  sync_threads();
  const bool parallel = at.parallel;
  const int hidden = at.hidden, first_width = parallel ? hidden : at.inner;
  T* operand1 = reinterpret_cast<T*>(room.region);                  // dh, or dy1
  T* operand2 = operand1 + kRows * operand_stride(first_width);     // dy, or dy2
  const int64_t dtype = DTypeOf<T>::kValue;

  for (int l = static_cast<int>(member.layers) - 1; l >= 0; --l) {
    const Layer& layer = at.layers[l];
    const View x = at.input(l), g = {member.g, hidden, kFloat32};
    backward_rows<T>(at, l, room);
    if (parallel) load_operand<T, kRows>(operand1, layer.grad_first, at.row, at.rows, hidden);
    load_operand<T, kRows>(operand2, layer.grad_second, at.row, at.rows, hidden);
    sync_threads();
    // serial: through w2, then w1; parallel: through w1, then w2. The last step completes dx.
    for (int step = 0; step < 2; ++step) {
      const bool second = (step == 0) != parallel, final = step == 1;
      const SegmentCode& code = room.segments[second ? kCodeMidBwdv : kCodePreBwdv];
      const int width = second && !parallel ? at.inner : hidden;
      const int depth = second ? hidden : first_width;
      const View value = {second ? layer.m : layer.p, width, dtype};
      const View h = {layer.first, first_width, dtype};
      const View grad_h = {layer.grad_first, first_width, dtype};
      const View weight = second ? at.w2(l) : at.w1(l);
      for (int n = 0; n < width; n += kChunk) {
        R::Product::run(second ? operand2 : operand1, weight, depth, width, n, room.stages, room.result);
        const int column = n + 4 * lane();
        for (int r = warp(); r < kRows; r += kBlockWarps) {
          const int64_t row = at.row + r;
          const bool exists = r < at.rows && column < width;
          float v[4] = {};
          if (exists) {
            Machine m;
            const Float4 own = group_at(room.result + r * R::Product::kResultStride, 4 * lane());
            Machine::copy(own.v, m.g);
            if (code.reads(kRegisterX)) load4(x, row, column, hidden, m.x);
            if (code.reads(kRegisterA)) load4(h, row, column, width, m.a);
            m.run(code, room.slots, column, hidden);
            m.output(code.value, room.slots, v);
            store4(value, row, column, width, v);
            if (column < hidden && (code.dx >= 0 || final)) {
              float dx[4];
              m.output(code.dx, room.slots, v);
              load4(g, row, column, hidden, dx);
#pragma unroll
              for (int j = 0; j < 4; ++j) dx[j] += column + j < width ? v[j] : 0.0f;
              if (!final || l > 0) {
                store4(g, row, column, hidden, dx);
              } else if (member.grad_x.data != nullptr) {
                store4(member.grad_x, row, column, hidden, dx);
              }
            }
            m.output(code.da, room.slots, v);
            if (second && !parallel) store4(grad_h, row, column, width, v);
          }
          if (second && !parallel) keep_operand(operand1, r, exists, column, width, v);
        }
        sync_threads();
      }
    }
  }
}

}  // namespace cuda
}  // namespace ffnas
