// Kernels for AVX-512 (F, BW, DQ, VL), float32 products.
#include "ffn.h"

#ifdef __AVX512F__
#include <immintrin.h>

namespace ffnas {
namespace avx512 {
#include "vec_avx512.h"
constexpr int kMicroRows = 12, kMicroVectors = 2, kPrefetchSteps = 8, kTileRows = 24, kTileColumns = 32;
constexpr int64_t kBlockUnit = 12;
#include "kernels.h"
const Kernels kernels = {"avx512", forward, backward, packed_bytes, pack, fingerprints, unary};
}  // namespace avx512
}  // namespace ffnas
#endif
