// Which instruction sets this machine runs, asked once.
#include "int8.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace ffnas {
namespace {

#if defined(__x86_64__)
// Linux hands out the AMX tile registers (state component 18) only to processes that ask.
bool amx_granted() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if defined(__x86_64__)
bool has_amx_int8() {
  unsigned a, b, c, d;
  constexpr unsigned kAmxInt8 = 1u << 25;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxInt8) != 0;
}
bool has_avx_vnni() {
  unsigned a, b, c, d;
  constexpr unsigned kAvxVnni = 1u << 4;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni) != 0;
}
#endif

}  // namespace

bool cpu_runs(int isa) {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  static const bool amx = avx512bf16 && amx_granted();
  const bool runs[] = {true, avx2, avx512, avx512bf16, amx, amx};
  return isa >= 0 && isa < 6 && runs[isa];
#elif defined(__aarch64__)
  return isa == 0 || isa == 6;
#else
  return isa == 0;
#endif
}

bool cpu_runs_int8(int64_t set) {
#if defined(__x86_64__)
  constexpr int kAvx2 = 1, kAvx512 = 2, kAmx = 4;  // of api.cpp
  static const bool vnni256 = cpu_runs(kAvx2) && has_avx_vnni();
  static const bool vnni512 = cpu_runs(kAvx512) && __builtin_cpu_supports("avx512vnni");
  static const bool amx = vnni512 && cpu_runs(kAmx) && has_amx_int8();
  switch (set) {
    case kInt8Avx2: return cpu_runs(kAvx2);
    case kInt8AvxVnni: return vnni256;
    case kInt8Avx512Vnni: return vnni512;
    case kInt8Amx: return amx;
    default: return set == kInt8Generic;
  }
#else
  return set == kInt8Generic;
#endif
}

}  // namespace ffnas
