// Products of a few rows with weights as they are, for calls so small that packing the weights would take longer than
// multiplying by them. Included inside an ISA namespace.
//
// Vectors run along the depth, in which both operands are contiguous; four rows by four outputs accumulate at a time.

// From about twice as many tokens on the packed product wins; packing halves with the size of an element.
#ifdef FFNAS_SPLIT_PRODUCTS
constexpr int64_t kSkinnyTokens = 0;  // api.cpp hands small calls to the AVX-512 kernels
#else
constexpr int64_t kSkinnyTokens = sizeof(Element) == 4 ? 8 : 4;
#endif

// tile[i, j] = bias[j] + sum_k a[i, k] * w[column + j, k] for n rows and the outputs below `width`.
template <class W>
inline void skinny_product(const Element* a, int64_t stride, int n, const W* w, int64_t w_stride, int64_t depth,
                           int64_t column, int64_t width, const float* bias, float* tile) {
  const int columns = static_cast<int>(least(width - column, kTileColumns));
  for (int i = 0; i < n; i += 4)
    for (int j = 0; j < columns; j += 4) {
      const Element* x[4];
      const W* v[4];
      F acc[4][4];
      for (int q = 0; q < 4; ++q) {  // rows past the last repeat it
        x[q] = a + least(i + q, n - 1) * stride;
        v[q] = w + (column + least(j + q, columns - 1)) * w_stride;
        for (int p = 0; p < 4; ++p) acc[q][p] = zero();
      }
      // sixteen accumulators of kLanes partial sums; eight loads feed sixteen multiply-adds
      for (int64_t k = 0; k < depth; k += kLanes) {
        F xs[4], ws[4];
        for (int q = 0; q < 4; ++q) {
          xs[q] = load_part(x[q] + k, depth - k);
          ws[q] = load_part(v[q] + k, depth - k);
        }
        for (int q = 0; q < 4; ++q)
          for (int p = 0; p < 4; ++p) acc[q][p] = fma(xs[q], ws[p], acc[q][p]);
      }
      for (int q = 0; q < 4 && i + q < n; ++q)
        for (int p = 0; p < 4 && j + p < columns; ++p)
          tile[(i + q) * kTileColumns + j + p] = bias[j + p] + sum(acc[q][p]);
    }
  for (int i = 0; i < n; ++i)
    for (int j = columns; j < kTileColumns; ++j) tile[i * kTileColumns + j] = 0.0f;
}

inline void skinny_product(const Element* a, int64_t stride, int64_t r, int n, const View& w, int64_t depth,
                           int64_t column, int64_t width, const float* bias, float* tile) {
  if (w.dtype == kFloat32)
    skinny_product(a + r * stride, stride, n, static_cast<const float*>(w.data), w.stride, depth, column, width, bias,
                   tile);
  else
    skinny_product(a + r * stride, stride, n, static_cast<const bf16*>(w.data), w.stride, depth, column, width, bias,
                   tile);
}
