// Sets of kernels for products on codes (int8.h), by number, and entry points that ask for them. Part of api.cpp.
#pragma once

#include "int8.h"

namespace ffnas {
namespace i8_generic {
extern const Int8Kernels int8_kernels;
}
namespace i8_avx2 {
extern const Int8Kernels int8_kernels;
}
namespace i8_avxvnni {
extern const Int8Kernels int8_kernels;
}
namespace i8_avx512vnni {
extern const Int8Kernels int8_kernels;
}
namespace i8_amx {
extern const Int8Kernels int8_kernels;
}

namespace {

// nullptr where the number is none of a set, or this build lacks it.
const Int8Kernels* int8_kernels_of(int64_t set) {
  switch (set) {
    case kInt8Generic: return &i8_generic::int8_kernels;
#ifdef FFNAS_WITH_AVX2
    case kInt8Avx2: return &i8_avx2::int8_kernels;
#endif
#ifdef FFNAS_WITH_AVXVNNI
    case kInt8AvxVnni: return &i8_avxvnni::int8_kernels;
#endif
#ifdef FFNAS_WITH_AVX512VNNI
    case kInt8Avx512Vnni: return &i8_avx512vnni::int8_kernels;
#endif
#ifdef FFNAS_WITH_AMX_INT8
    case kInt8Amx: return &i8_amx::int8_kernels;
#endif
    default: return nullptr;
  }
}

// The instruction set of everything that a set leaves in floating point.
int64_t base_of(int64_t set) {
  switch (set) {
    case kInt8Avx2:
    case kInt8AvxVnni: return kAvx2;
    case kInt8Avx512Vnni: return kAvx512;
    case kInt8Amx: return kAmx;
    default: return kGeneric;
  }
}

// Whether a model may be asked for on `isa`: an instruction set, or one of these sets with its base.
bool serves(int64_t isa) {
  return isa < kInt8First ? kernels_of(isa) != nullptr
                          : int8_kernels_of(isa) != nullptr && kernels_of(base_of(isa)) != nullptr;
}

// The best set of this machine.
int64_t best_int8() {
  int64_t best = kInt8Generic;
  for (int64_t set = kInt8First; set < kInt8End; ++set)
    if (serves(set) && cpu_runs_int8(set)) best = set;
  return best;
}

}  // namespace
}  // namespace ffnas

// Whether a set is in this build and this machine runs it.
FFNAS_EXPORT int ffnas_int8_runs(int64_t set) {
  return ffnas::serves(set) && ffnas::cpu_runs_int8(set) ? 1 : 0;
}
// Test hook: x [rows, depth] and w [outputs, depth] of float32 as codes, and the sums of their products, see int8.h.
FFNAS_EXPORT int ffnas_int8_sums(int64_t set, float* x, int64_t rows, int64_t depth, float* w, int64_t outputs,
                                 int32_t* codes, float* scale, int32_t* zero, int32_t* sums) {
  using namespace ffnas;
  const Int8Kernels* kernels = int8_kernels_of(set);
  if (kernels == nullptr || rows < 1 || depth < 1 || depth > kInt8Depth || outputs < 1) return kBadCall;
  void* packed =
      std::aligned_alloc(64, static_cast<size_t>((kernels->packed_bytes(rows, outputs, depth) + 63) / 64 * 64));
  if (packed == nullptr) return kOutOfMemory;
  kernels->pack({w, depth, kFloat32}, outputs, depth, packed);
  kernels->sums({x, depth, kFloat32}, rows, depth, packed, outputs, codes, scale, zero, sums);
  std::free(packed);
  return kOk;
}
