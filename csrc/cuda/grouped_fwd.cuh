// Forward of the grouped FFN: one block, kRows rows, the whole stack of its member.
//
//   serial    p = pre(x);  per chunk: h = p @ w1.T + b1, m = mid(x, h);  y = m @ w2.T + b2;  rows: post .. LayerNorm
//   parallel  p1 = pre(x), p2 = mid(x);  y1 = p1 @ w1.T + b1;  y2 = p2 @ w2.T + b2;  rows
#pragma once

#include "grouped.cuh"

namespace ffnas {
namespace cuda {

// Steps of a layer, each over chunks of columns; which of them multiply depends on the form.
enum ForwardStep : int { kStepPre, kStepMid, kStepFirst, kStepSecond, kForwardSteps };

template <class T, int kRows>
FFNAS_KERNEL(kBlockThreads, 1)
grouped_fwd_kernel(FFNAS_ARGUMENT Group group) {
  using R = Room<T, kRows, false>;
  const Place<kRows> at(group);
  const Member& member = at.member;
  const R room(3, static_cast<int>(group.slots));
  for (int k = 0; k < 3; ++k) load_segment(room.segments[k], member.program, k, kBlockThreads);
  sync_threads();
  const bool parallel = at.parallel;
  const int hidden = at.hidden, first_width = parallel ? hidden : at.inner;
  const int second_depth = parallel ? hidden : at.inner;
  T* operand1 = reinterpret_cast<T*>(room.region);
  T* operand2 = operand1 + kRows * operand_stride(hidden);
  const int64_t dtype = DTypeOf<T>::kValue;

  // Operands of both products stay in shared memory, [kRows][depth]; weights stream past them in chunks of columns.
  for (int l = 0; l < member.layers; ++l) {
    const Layer& layer = at.layers[l];
    const View x = at.input(l);
    for (int step = kStepPre; step < kForwardSteps; ++step) {
      if (step == kStepFirst && !parallel) continue;
      const bool second = step == kStepSecond;
      const bool multiplies = step >= kStepFirst || (step == kStepMid && !parallel);
      const bool runs = step <= kStepMid;
      const SegmentCode& code = room.segments[step == kStepMid ? kMid : kPre];
      // columns of the step's result; an operand is written up to its padding
      const int width = step == kStepPre || second ? hidden : first_width;
      const View weight = second ? at.w2(l) : at.w1(l);
      const View bias = {const_cast<void*>(second ? layer.b2 : layer.b1), 0, member.weight_dtype};
      const View product = {second ? layer.second : layer.first, width, dtype};
      for (int n = 0; n < width; n += kChunk) {
        if (multiplies)
          R::Product::run(second ? operand2 : operand1, weight, second ? second_depth : hidden, width, n, room.stages,
                          room.result);
        // a warp per row, four columns a lane: 128 columns are one chunk
        const int column = n + 4 * lane();
        float b[4] = {};
        if (multiplies && column < width) load4(bias, 0, column, width, b);
        for (int r = warp(); r < kRows; r += kBlockWarps) {
          const bool exists = r < at.rows && column < width;
          Machine m;
          float v[4] = {};
          if (multiplies) {
            const Float4 own = group_at(room.result + r * R::Product::kResultStride, 4 * lane());
#pragma unroll
            for (int j = 0; j < 4; ++j) m.a[j] = own.v[j] + b[j];
            if (exists && product.data != nullptr) store4(product, at.row + r, column, width, m.a);
          }
          if (!runs) continue;
          if (exists) {
            if (code.reads(kRegisterX)) load4(x, at.row + r, column, hidden, m.x);
            m.run(code, room.slots, column, hidden);
            m.output(code.value, room.slots, v);
          }
          keep_operand(step == kStepPre ? operand1 : operand2, r, exists, column, width, v);
        }
        sync_threads();
      }
    }
    Rows rows = at.row_arguments(l, dtype);
    rows.out = l + 1 < member.layers ? View{at.layers[l + 1].z, hidden, member.x.dtype} : member.out;
    float* z = reinterpret_cast<float*>(room.region) + warp() * padded(hidden);
    for (int r = warp(); r < at.rows; r += kBlockWarps)
      row_forward(rows, at.row + r, room.segments[kPost], room.slots, z, Team<1>{nullptr});
    sync_threads();
  }
}

}  // namespace cuda
}  // namespace ffnas
