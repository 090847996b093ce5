// Products on codes with AVX-VNNI (Intel's client processors since 2021).
#include "int8.h"

#ifdef __AVXVNNI__
#include <immintrin.h>

namespace ffnas {
namespace i8_avxvnni {
#include "vec_avx2.h"
constexpr int kMicroRows = 6, kMicroVectors = 2, kPrefetchSteps = 8, kTileRows = 24, kTileColumns = 16;
constexpr int64_t kBlockUnit = 6;
#include "kernels_i8.h"
const Int8Kernels int8_kernels = {"avxvnni", code_linear, code_forward, packed_code_bytes, pack_codes, code_sums};
}  // namespace i8_avxvnni
}  // namespace ffnas
#endif
