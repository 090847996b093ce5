// Kernels for AVX2 with FMA (x86-64 since 2013).
#include "ffn.h"

#ifdef __AVX2__
#include <immintrin.h>

namespace ffnas {
namespace avx2 {
#include "vec_avx2.h"
constexpr int kMicroRows = 6, kMicroVectors = 2, kPrefetchSteps = 8, kTileRows = 24, kTileColumns = 16;
constexpr int64_t kBlockUnit = 6;
#include "kernels.h"
const Kernels kernels = {"avx2", forward, backward, packed_bytes, pack, fingerprints, unary};
}  // namespace avx2
}  // namespace ffnas
#endif
