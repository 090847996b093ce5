// Host side of the grouped kernels: shared memory of a launch, and the launch itself, by dtype and rows of a block.
#pragma once

#include "group.h"

namespace ffnas {
namespace cuda {

// A grouped call from the words kernels/cuda/grouped.py packed: the fields of Group in front of `member`, then as many
// members and layers as they say. False where the words do not fit the record.
inline bool unpack(const int64_t* words, int64_t count, Group& group) {
  constexpr int64_t kHead = static_cast<int64_t>(offsetof(Group, member) / 8);
  constexpr int64_t kMemberWords = sizeof(Member) / 8, kLayerWords = sizeof(Layer) / 8;
  if (count < kHead) return false;
  memcpy(&group, words, kHead * 8);
  if (group.members < 1 || group.members > kMaxMembers || group.layers < 1 || group.layers > kMaxLayers) return false;
  if (count != kHead + group.members * kMemberWords + group.layers * kLayerWords) return false;
  memcpy(group.member, words + kHead, group.members * sizeof(Member));
  memcpy(group.layer, words + kHead + group.members * kMemberWords, group.layers * sizeof(Layer));
  return true;
}

constexpr int kBadRecord = -1;

// Calls `f.template run<T, kRows>()` for a dtype and rows per block that are compiled, else returns kBadRecord.
template <class F>
int64_t with_kernel(int64_t dtype, int64_t rows, F f) {
  switch (dtype * 100 + rows) {
    case kFloat32 * 100 + 32: return f.template run<float, 32>();
    case kFloat32 * 100 + 16: return f.template run<float, 16>();
    case kBFloat16 * 100 + 64: return f.template run<BFloat16, 64>();
    case kBFloat16 * 100 + 32: return f.template run<BFloat16, 32>();
    case kBFloat16 * 100 + 16: return f.template run<BFloat16, 16>();
    case kFloat16 * 100 + 64: return f.template run<Half, 64>();
    case kFloat16 * 100 + 32: return f.template run<Half, 32>();
    case kFloat16 * 100 + 16: return f.template run<Half, 16>();
    default: return kBadRecord;
  }
}

}  // namespace cuda
}  // namespace ffnas
