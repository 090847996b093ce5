// C interface of the grouped forward.
#include "grouped_call.cuh"
#include "grouped_fwd.cuh"

namespace ffnas {
namespace cuda {
namespace {

struct ForwardBytes {
  int64_t slots, region;
  template <class T, int kRows>
  int64_t run() const {
    return Room<T, kRows, false>::bytes(3, slots, region);
  }
};

struct ForwardLaunch {
  const Group& group;
  template <class T, int kRows>
  int64_t run() const {
    const int64_t shared = ForwardBytes{group.slots, group.region}.run<T, kRows>();
    return launch(grouped_fwd_kernel<T, kRows>, static_cast<int>(group.blocks), kBlockThreads, shared, group.stream,
                  group);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace ffnas

// Bytes of shared memory of a block, whose operands or row buffers take `region` bytes (a multiple of 16).
FFNAS_EXPORT int64_t ffnas_grouped_fwd_shared(int64_t dtype, int64_t rows, int64_t slots, int64_t region) {
  return ffnas::cuda::with_kernel(dtype, rows, ffnas::cuda::ForwardBytes{slots, region});
}

FFNAS_EXPORT int ffnas_grouped_forward(const int64_t* words, int64_t count) {
  using namespace ffnas::cuda;
  Group group;
  if (!unpack(words, count, group)) return kBadRecord;
  const DeviceScope scope(static_cast<int>(group.device));
  return static_cast<int>(with_kernel(group.compute_dtype, group.rows, ForwardLaunch{group}));
}
