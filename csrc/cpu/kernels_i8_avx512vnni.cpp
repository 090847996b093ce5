// Products on codes with AVX-512 VNNI (Intel since Cascade Lake, AMD since Zen 4).
#include "int8.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>

namespace ffnas {
namespace i8_avx512vnni {
#include "vec_avx512.h"
constexpr int kMicroRows = 12, kMicroVectors = 2, kPrefetchSteps = 8, kTileRows = 24, kTileColumns = 32;
constexpr int64_t kBlockUnit = 12;
#include "kernels_i8.h"
const Int8Kernels int8_kernels = {"avx512vnni", code_linear, code_forward, packed_code_bytes, pack_codes, code_sums};
}  // namespace i8_avx512vnni
}  // namespace ffnas
#endif
