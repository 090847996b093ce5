// Dropout masks: Philox4x32-10 as kernels/reference/philox.py defines it.
//
// The word of element (row, column) is word column % 4 of counter (column / 4, row, row >> 32, stream): one counter per
// group of four columns, which is what a thread holds.
#pragma once

#include "device.h"

namespace ffnas {
namespace cuda {

// What a dropout layer needs besides its place; threshold 0 means no dropout.
struct Dropout {
  const int64_t* seed;  // one word on the device
  uint64_t threshold;   // elements whose word is below it are dropped; 2^32 drops all
  float scale;          // 1 / (1 - p), 0 where p == 1
  uint32_t stream;
};

// v = kept ? v * scale : 0 for columns column..column + 3 of `row`; column is a multiple of 4.
FFNAS_DEVICE void drop4(float (&v)[4], int64_t row, int column, const Dropout& d) {
  const uint64_t seed = static_cast<uint64_t>(*d.seed);
  uint32_t x[4] = {static_cast<uint32_t>(column) / 4, static_cast<uint32_t>(row),
                   static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), d.stream};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, x[0]), low0 = 0xD2511F53u * x[0];
    const uint32_t high1 = multiply_high(0xCD9E8D57u, x[2]), low1 = 0xCD9E8D57u * x[2];
    x[0] = high1 ^ x[1] ^ k0;
    x[1] = low1;
    x[2] = high0 ^ x[3] ^ k1;
    x[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = x[j] >= d.threshold ? v[j] * d.scale : 0.0f;
}

}  // namespace cuda
}  // namespace ffnas
