// Kernels for AVX-512 with AMX bfloat16 tiles (Intel since Sapphire Rapids).
#include "ffn.h"

#ifdef __AMX_BF16__
#include <immintrin.h>

#include <type_traits>

#define FFNAS_BF16_PRODUCTS
#define FFNAS_AMX
namespace ffnas {
namespace amx {
#include "vec_avx512.h"
constexpr int kMicroRows = 32, kTileRows = 32, kTileColumns = 32;
constexpr int64_t kBlockUnit = 32;
#include "kernels.h"
const Kernels kernels = {"amx", forward, backward, packed_bytes, pack, fingerprints, unary};
}  // namespace amx
}  // namespace ffnas
#endif
