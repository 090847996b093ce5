// Kernels for AVX-512 with bfloat16 dot products (AMD since Zen 4).
#include "ffn.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

#define FFNAS_BF16_PRODUCTS
namespace ffnas {
namespace avx512bf16 {
#include "vec_avx512.h"
constexpr int kMicroRows = 12, kMicroVectors = 2, kPrefetchSteps = 8, kTileRows = 24, kTileColumns = 32;
constexpr int64_t kBlockUnit = 12;
#include "kernels.h"
const Kernels kernels = {"avx512bf16", forward, backward, packed_bytes, pack, fingerprints, unary};
}  // namespace avx512bf16
}  // namespace ffnas
#endif
