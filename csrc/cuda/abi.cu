// What the library says about itself.
#include "group.h"

#ifndef FFNAS_CUDA_BUILD_KEY
#define FFNAS_CUDA_BUILD_KEY "ffnas-cuda-unknown"
#endif

// Version of the interface (0), sizes of its records (1 ...), for kernels/cuda/library.py to compare with its own.
FFNAS_EXPORT int64_t ffnas_cuda_abi(int64_t which) {
  switch (which) {
    case 0: return 1;
    case 1: return sizeof(ffnas::cuda::RowCall);
    case 2: return offsetof(ffnas::cuda::Group, member);
    case 3: return sizeof(ffnas::cuda::Member);
    case 4: return sizeof(ffnas::cuda::Layer);
    default: return -1;
  }
}
// Hash of the sources, to be found in the file.
FFNAS_EXPORT const char* ffnas_cuda_build_key() { return FFNAS_CUDA_BUILD_KEY; }
// 0, or the CUDA error that keeps this library's runtime from working here: a driver older than it, no device.
FFNAS_EXPORT int ffnas_cuda_probe() { return ffnas::cuda::probe(); }
