// Kernels for any processor: vectors of four floats, no instruction set assumed beyond the compiler's default.
#include "ffn.h"

namespace ffnas {
namespace generic {
#include "vec_generic.h"
constexpr int kMicroRows = 4, kMicroVectors = 2, kPrefetchSteps = 8, kTileRows = 24, kTileColumns = 8;
constexpr int64_t kBlockUnit = 4;
#include "kernels.h"
const Kernels kernels = {"generic", forward, backward, packed_bytes, pack, fingerprints, unary};
}  // namespace generic
}  // namespace ffnas
