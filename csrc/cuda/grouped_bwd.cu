// C interface of the grouped backward: three launches, whatever the members are.
#include "grouped_bwd.cuh"
#include "grouped_call.cuh"
#include "grouped_weights.cuh"

namespace ffnas {
namespace cuda {
namespace {

struct BackwardBytes {
  int64_t slots, region;
  template <class T, int kRows>
  int64_t run() const {
    return Room<T, kRows, true>::bytes(kBackwardSegments, slots, region);
  }
};

struct BackwardLaunch {
  const Group& group;
  template <class T, int kRows>
  int64_t run() const {
    const int64_t shared = BackwardBytes{group.slots, group.region}.run<T, kRows>();
    const int status = launch(grouped_bwd_kernel<T, kRows>, static_cast<int>(group.blocks), kBlockThreads, shared,
                              group.stream, group);
    if (status != 0) return status;
    int64_t tiles = 0;
    for (int64_t k = 0; k < group.members; ++k) {
      const Member& m = group.member[k];
      tiles += 2 * ((m.inner + kTile - 1) / kTile) * ((m.hidden + kTile - 1) / kTile) * m.layers;
    }
    return launch(grouped_weights_kernel<T>, static_cast<int>(tiles), kTileThreads,
                  4 * kDepth * (kTile + kPad) * int64_t{sizeof(T)}, group.stream, group);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace ffnas

FFNAS_EXPORT int64_t ffnas_grouped_bwd_shared(int64_t dtype, int64_t rows, int64_t slots, int64_t region) {
  return ffnas::cuda::with_kernel(dtype, rows, ffnas::cuda::BackwardBytes{slots, region});
}

FFNAS_EXPORT int ffnas_grouped_backward(const int64_t* words, int64_t count) {
  using namespace ffnas::cuda;
  Group group;
  if (!unpack(words, count, group)) return kBadRecord;
  const DeviceScope scope(static_cast<int>(group.device));
  const int status = static_cast<int>(with_kernel(group.compute_dtype, group.rows, BackwardLaunch{group}));
  if (status != 0) return status;
  int64_t sums = 0;
  for (int64_t k = 0; k < group.members; ++k)
    sums += 2 * group.member[k].layers * ((group.member[k].hidden + kWarp - 1) / kWarp);
  return launch(grouped_sums_kernel, static_cast<int>(sums), kBlockThreads, kBlockThreads * 4, group.stream, group);
}
