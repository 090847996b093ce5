// Dropout masks: Philox4x32-10 as kernels/reference/philox.py defines it. Included inside an ISA namespace.
//
// The word of element (row, column) is word column % 4 of counter (column / 4, row, row >> 32, stream). Counters of a
// tile are independent, so the ten rounds run over all of them in one loop the compiler vectorizes.

inline void philox_rounds(uint32_t* c0, uint32_t* c1, uint32_t* c2, uint32_t* c3, int count, uint64_t seed) {
  for (int i = 0; i < count; ++i) {
    uint32_t x0 = c0[i], x1 = c1[i], x2 = c2[i], x3 = c3[i];
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * x0;
      const uint64_t p1 = uint64_t{0xCD9E8D57u} * x2;
      x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ k0;
      x2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ k1;
      x1 = static_cast<uint32_t>(p1);
      x3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    c0[i] = x0;
    c1[i] = x1;
    c2[i] = x2;
    c3[i] = x3;
  }
}

// tile = kept ? tile * scale : 0 for rows from `row` (counted over all tokens) and columns from `column`.
inline void drop_tile(float* tile, int rows, int64_t row, int64_t column, int64_t stream, const Call& call) {
  constexpr int kGroups = kTileColumns / 4;
  uint32_t w[4][kTileRows * kGroups];
  for (int r = 0; r < rows; ++r) {
    const uint64_t at = static_cast<uint64_t>(row + r);
    for (int g = 0; g < kGroups; ++g) {
      w[0][r * kGroups + g] = static_cast<uint32_t>(column / 4 + g);
      w[1][r * kGroups + g] = static_cast<uint32_t>(at);
      w[2][r * kGroups + g] = static_cast<uint32_t>(at >> 32);
      w[3][r * kGroups + g] = static_cast<uint32_t>(stream);
    }
  }
  philox_rounds(w[0], w[1], w[2], w[3], rows * kGroups, call.seed);
  const uint64_t threshold = call.drop_threshold;
  const float scale = call.drop_scale;
  if (threshold > UINT32_MAX) {
    for (int i = 0; i < rows * kTileColumns; ++i) tile[i] = 0.0f;
    return;
  }
  const uint32_t least_kept = static_cast<uint32_t>(threshold);
  for (int i = 0; i < rows * kGroups; ++i)
    for (int j = 0; j < 4; ++j) tile[4 * i + j] = w[j][i] >= least_kept ? tile[4 * i + j] * scale : 0.0f;
}
