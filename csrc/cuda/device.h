// What the kernels need from the device, behind one set of names with two implementations.
//
// Compiled by nvcc the names are CUDA's own. With FFNAS_EMULATION a C++ compiler takes the same .cu files, and
// emulation/emulate.h runs the threads of a block one after the other on the CPU: tests only, where no GPU is at hand.
//
//   thread(), block(), blocks()             indices; kernels are launched with one-dimensional blocks and grids
//   shared_memory()                         the block's dynamic shared memory, 128-byte aligned
//   sync_threads(), sync_warp()             barriers, with every thread of the block or warp
//   shuffle_xor(v, mask)                    a value of another lane
//   load_matrices[_transposed]              four 8 x 8 matrices of 16-bit elements (ldmatrix .x4), a row per lane
//   multiply_16816                          d += a * b on tensor cores (mma.sync m16n8k16, float32 accumulators)
//   stop()                                  ends the kernel with an error; for what cannot happen
//   launch(...)                             starts a kernel; returns a cudaError_t, 0 being success
//   probe()                                 0 where kernels can be started at all, else a cudaError_t
//
// Chosen: mma.sync and ldmatrix, one source for sm_80 and sm_90a. Rejected: CUTLASS, whose templates take minutes to
// compile and cannot be emulated; WMMA, which hides where an element lives, so that every epilogue needs shared memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ffnas {
namespace cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

constexpr int kWarp = 32;

}  // namespace cuda
}  // namespace ffnas

#define FFNAS_EXPORT extern "C" __attribute__((visibility("default")))

#ifdef FFNAS_EMULATION
#include "emulation/emulate.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FFNAS_DEVICE __device__ __forceinline__
#define FFNAS_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FFNAS_ARGUMENT const __grid_constant__

namespace ffnas {
namespace cuda {

FFNAS_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
FFNAS_DEVICE int block() { return static_cast<int>(blockIdx.x); }
FFNAS_DEVICE int blocks() { return static_cast<int>(gridDim.x); }
FFNAS_DEVICE void sync_threads() { __syncthreads(); }
FFNAS_DEVICE void sync_warp() { __syncwarp(); }
FFNAS_DEVICE void stop() { __trap(); }
FFNAS_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
FFNAS_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t ffnas_shared_memory[];
  return ffnas_shared_memory;
}
// 1 / x for 1 <= x <= 2, within 1 ulp.
FFNAS_DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }
FFNAS_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

FFNAS_DEVICE uint16_t bits_of(float v, BFloat16) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}
FFNAS_DEVICE uint16_t bits_of(float v, Half) { return __half_as_ushort(__float2half_rn(v)); }
FFNAS_DEVICE float float_of(Half v) { return __half2float(__ushort_as_half(v.bits)); }

FFNAS_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
FFNAS_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
#define FFNAS_MULTIPLY(ELEMENT, SUFFIX)                                                                          \
  FFNAS_DEVICE void multiply_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, ELEMENT) {   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." SUFFIX "." SUFFIX ".f32 {%0, %1, %2, %3}, "            \
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                \
  }
FFNAS_MULTIPLY(BFloat16, "bf16")
FFNAS_MULTIPLY(Half, "f16")
#undef FFNAS_MULTIPLY

template <class T>
struct Same {
  using Type = T;
};

// Starts `kernel` with `shared` bytes of dynamic shared memory on `stream`.
template <class... A>
int launch(void (*kernel)(A...), int grid, int threads, int64_t shared, void* stream,
           const typename Same<A>::Type&... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

inline int probe() {
  int devices = 0;
  return cudaGetDeviceCount(&devices);
}

// Makes `device` current in this library's runtime for the lifetime of the object.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    cudaGetDevice(&previous_);
    changed_ = device >= 0 && device != previous_;
    if (changed_) cudaSetDevice(device);
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace cuda
}  // namespace ffnas
#endif

namespace ffnas {
namespace cuda {

FFNAS_DEVICE float float_of(float v) { return v; }
FFNAS_DEVICE float float_of(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
template <class T>
FFNAS_DEVICE T element_of(float v) {
  return T{bits_of(v, T{})};
}
template <>
FFNAS_DEVICE float element_of<float>(float v) {
  return v;
}

FFNAS_DEVICE int lane() { return thread() % kWarp; }
FFNAS_DEVICE int warp() { return thread() / kWarp; }
// Sum over the lanes of a warp, the same in each and in the same order each time.
FFNAS_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

}  // namespace cuda
}  // namespace ffnas
