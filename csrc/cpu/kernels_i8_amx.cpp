// Products on codes with AMX tiles (Intel since Sapphire Rapids).
#include "int8.h"

#ifdef __AMX_INT8__
#include <immintrin.h>

#define FFNAS_BF16_PRODUCTS  // conversion by the hardware, as attention's kernels do

namespace ffnas {
namespace i8_amx {
#include "vec_avx512.h"
constexpr int kMicroRows = 8, kMicroVectors = 2, kPrefetchSteps = 8, kTileRows = 32, kTileColumns = 32;
constexpr int64_t kBlockUnit = 32;
#include "kernels_i8.h"
const Int8Kernels int8_kernels = {"amx", code_linear, code_forward, packed_code_bytes, pack_codes, code_sums};
}  // namespace i8_amx
}  // namespace ffnas
#endif
