// Kernels for 64-bit Arm with NEON, float32 products. 6 x 4 accumulators, 4 vectors of the panel and one broadcast
// value are 29 of 32 registers. Tested under emulation; nothing is claimed about its speed.
#include "ffn.h"

#ifdef __aarch64__
#include <arm_neon.h>

namespace ffnas {
namespace neon {
#include "vec_neon.h"
constexpr int kMicroRows = 6, kMicroVectors = 4, kPrefetchSteps = 8, kTileRows = 24, kTileColumns = 16;
constexpr int64_t kBlockUnit = 6;
#include "kernels.h"
const Kernels kernels = {"neon", forward, backward, packed_bytes, pack, fingerprints, unary};
}  // namespace neon
}  // namespace ffnas
#endif
