// What the grouped kernels share: which rows a block has, its shared memory, and row arguments of a layer.
//
// A block owns kRows rows of one member and takes them through the member's whole stack: no row needs another row's
// result, so layers need barriers of the block only, and one launch serves any mix of widths, stacks and programs.
// Operands of products (p, m; backward: dy, dh) stay in shared memory; products are cut into chunks of 128 columns,
// whose results pass through shared memory into the interpreter. What crosses from one phase to the next in device
// memory (y, z, the gradient in float32) is written and read by the same block and stays in L2.
//
// Blocks are numbered member by member, the costliest member first; the hardware hands them out as blocks finish.
//
// Chosen over a persistent queue of (layer, tile) tasks: that one needs grid-wide waits between the layers of a
// member, for work that is already independent by rows. Its price is that each block reads all of its member's weights
// (from L2).
#pragma once

#include "group.h"
#include "product.cuh"

namespace ffnas {
namespace cuda {

// Where a block is: its member and rows.
template <int kRows>
struct Place {
  const Member& member;
  const Layer* layers;
  int64_t row;  // first row
  int rows;     // as many of them exist
  int hidden, inner;
  bool parallel;

  FFNAS_DEVICE explicit Place(const Group& group)
      : member(group.member[find(group)]), layers(group.layer + member.first_layer) {
    row = int64_t{block() - static_cast<int>(member.first_block)} * kRows;
    const int64_t rest = member.tokens - row;
    rows = static_cast<int>(rest < kRows ? rest : kRows);
    hidden = static_cast<int>(member.hidden);
    inner = static_cast<int>(member.inner);
    parallel = member.program[kHeaderForm] == kParallel;
  }
  // Arguments of the row functions in layer l, forward.
  FFNAS_DEVICE Rows row_arguments(int l, int64_t compute_dtype) const {
    const Layer& layer = layers[l];
    Rows r = {};
    r.x = input(l);
    r.y = {parallel ? layer.first : layer.second, hidden, compute_dtype};
    if (parallel) r.y2 = {layer.second, hidden, compute_dtype};
    r.ln_weight = {const_cast<void*>(layer.ln_weight), 0, member.norm_dtype};
    r.ln_bias = {const_cast<void*>(layer.ln_bias), 0, member.norm_dtype};
    r.stats = layer.stats;
    r.dropout = {member.seed, member.drop_threshold, static_cast<float>(member.drop_scale), static_cast<uint32_t>(l)};
    r.hidden = hidden;
    r.eps = static_cast<float>(member.eps);
    return r;
  }
  FFNAS_DEVICE View input(int l) const { return l == 0 ? member.x : View{layers[l].z, hidden, member.x.dtype}; }
  FFNAS_DEVICE View w1(int l) const {
    return {const_cast<void*>(layers[l].w1), layers[l].w1_stride, member.weight_dtype};
  }
  FFNAS_DEVICE View w2(int l) const {
    return {const_cast<void*>(layers[l].w2), layers[l].w2_stride, member.weight_dtype};
  }

 private:
  static FFNAS_DEVICE int find(const Group& group) {
    int k = 0;
    while (k + 1 < group.members && group.member[k + 1].first_block <= block()) ++k;
    return k;
  }
};

// Shared memory of a block. `region` holds the two operands, or the row phase's buffers; it comes last.
template <class T, int kRows, bool kTransposed>
struct Room {
  using Product = BlockProduct<T, kRows, kTransposed>;
  SegmentCode* segments;
  T* stages;
  float* result;
  Slots slots;
  uint8_t* region;

  FFNAS_DEVICE Room(int num_segments, int slots_per_thread) : slots(nullptr, kBlockThreads) {
    Carver carver(shared_memory());
    segments = carver.take<SegmentCode>(num_segments);
    stages = carver.take<T>(2 * Product::kStageElements);
    result = carver.take<float>(kRows * Product::kResultStride);
    slots = Slots(carver.take<Float4>(kBlockThreads * slots_per_thread), kBlockThreads);
    region = carver.rest();
  }
  static int64_t bytes(int num_segments, int64_t slots_per_thread, int64_t region) {
    const int64_t fixed = (num_segments * int64_t{sizeof(SegmentCode)} + 15) / 16 * 16;
    return fixed + 2 * Product::kStageElements * int64_t{sizeof(T)} + kRows * Product::kResultStride * int64_t{4} +
           kBlockThreads * slots_per_thread * 16 + region;
  }
};

// Rounds v into an operand, zeros where the row does not exist or the column is past the operand's width.
template <class T>
FFNAS_DEVICE void keep_operand(T* operand, int row, bool exists, int column, int width, const float (&v)[4]) {
  const int stride = operand_stride(width);
  if (column >= stride - kPad) return;
  Four<T> f;
#pragma unroll
  for (int j = 0; j < 4; ++j) f.v[j] = element_of<T>(exists && column + j < width ? v[j] : 0.0f);
  *reinterpret_cast<Four<T>*>(operand + row * stride + column) = f;
}

}  // namespace cuda
}  // namespace ffnas
