// Products on codes for any processor.
#include "int8.h"

namespace ffnas {
namespace i8_generic {
#include "vec_generic.h"
constexpr int kMicroRows = 4, kMicroVectors = 2, kPrefetchSteps = 8, kTileRows = 24, kTileColumns = 8;
constexpr int64_t kBlockUnit = 4;
#include "kernels_i8.h"
const Int8Kernels int8_kernels = {"generic", code_linear, code_forward, packed_code_bytes, pack_codes, code_sums};
}  // namespace i8_generic
}  // namespace ffnas
