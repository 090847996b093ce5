// Records that the C interface takes; mirrored by kernels/cuda/library.py, which compares their sizes.
#pragma once

#include "rows.cuh"

namespace ffnas {
namespace cuda {

// Where column sums go, each [hidden] or absent.
struct SumOutputs {
  View of[kRowSums];
};

// Rows of one layer.
struct RowCall {
  Rows rows;
  SumOutputs sums;         // backward
  const int32_t* program;  // on the device
  float* partial;          // backward: [blocks, kinds of sums, padded width]
  int64_t tokens, slots, blocks, wide, device;
  void* stream;
};

}  // namespace cuda
}  // namespace ffnas
