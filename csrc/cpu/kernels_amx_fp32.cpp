// Kernels for AMX with float32 products: six bfloat16 products of operands in three planes.
#include "ffn.h"

#ifdef __AMX_BF16__
#include <immintrin.h>

#include <type_traits>

#define FFNAS_SPLIT_PRODUCTS
#define FFNAS_AMX
namespace ffnas {
namespace amx_fp32 {
#include "vec_avx512.h"
constexpr int kMicroRows = 32, kTileRows = 32, kTileColumns = 32;
constexpr int64_t kBlockUnit = 32;
#include "kernels.h"
const Kernels kernels = {"amx_fp32", forward, backward, packed_bytes, pack, fingerprints, unary};
}  // namespace amx_fp32
}  // namespace ffnas
#endif
