// LayerNorm on rows of a float block that is still in cache. Included inside an ISA namespace.
//
// Statistics in float32, variance from the centred values (two passes over a row in L1), as PyTorch does.

struct RowStats {
  float mean, inverse;  // 1 / sqrt(var + eps)
};
inline RowStats* stats_of(const View& v) { return static_cast<RowStats*>(v.data); }

// Sum over a row of term(vector), zero beyond the row's end where term keeps 0; four chains to hide the latency.
template <class Term>
inline float row_sum(const float* z, int64_t width, Term term) {
  F s[4] = {zero(), zero(), zero(), zero()};
  int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes)
    for (int k = 0; k < 4; ++k) s[k] = s[k] + term(load(z + j + k * kLanes));
  for (; j + kLanes <= width; j += kLanes) s[0] = s[0] + term(load(z + j));
  if (j < width) s[1] = s[1] + keep_lanes(term(loadn(z + j, static_cast<int>(width - j))), static_cast<int>(width - j));
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

inline RowStats row_stats(const float* z, int64_t width, float eps) {
  const float mean = row_sum(z, width, [](F a) { return a; }) / static_cast<float>(width);
  const F m = set1(mean);
  const float squares = row_sum(z, width, [m](F a) { return (a - m) * (a - m); });
  return {mean, 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + eps)};
}

// out = (z - mean) * inverse * weight + bias; weight and bias are zero-padded to kLanes.
template <class T>
inline void normalize_row(const float* z, int64_t width, RowStats s, const float* weight, const float* bias, T* out) {
  const F m = set1(s.mean), r = set1(s.inverse);
  for (int64_t j = 0; j < width; j += kLanes)
    store_part(out + j, fma((load(z + j) - m) * r, load(weight + j), load(bias + j)), width - j);
}

// z holds R rows of LayerNorm's input, g their output gradients; afterwards z holds the input gradients. Adds to the
// parameter gradients. With a = g * weight and h = (z - mean) * inverse:  dz = inverse * (a - mean(a) - h * mean(a * h)).
// Rows of z have room up to kLanes; weight is zero there.
template <int R, class T>
inline void normalize_rows_backward(float* z, int64_t z_stride, const T* g, int64_t g_stride, int64_t width,
                                    const RowStats* stats, const float* weight, float* grad_weight, float* grad_bias) {
  F m[R], r[R], sum_a[R], sum_ah[R];
  for (int i = 0; i < R; ++i) {
    m[i] = set1(stats[i].mean);
    r[i] = set1(stats[i].inverse);
    sum_a[i] = sum_ah[i] = zero();
  }
  for (int64_t j = 0; j < width; j += kLanes) {
    const F w = load(weight + j);
    F gw = load(grad_weight + j), gb = load(grad_bias + j);
    for (int i = 0; i < R; ++i) {
      const F gv = load_part(g + i * g_stride + j, width - j);
      if (R > 1) __builtin_prefetch(g + (R + i) * g_stride + j);  // the next rows, sooner than hardware does
      const F h = (load_part(z + i * z_stride + j, width - j) - m[i]) * r[i];
      const F a = gv * w;
      gw = fma(gv, h, gw);
      gb = gb + gv;
      sum_a[i] = sum_a[i] + a;
      sum_ah[i] = fma(a, h, sum_ah[i]);
      store(z + i * z_stride + j, h);
    }
    store(grad_weight + j, gw);
    store(grad_bias + j, gb);
  }
  for (int i = 0; i < R; ++i) {
    const F mean_a = set1(sum(sum_a[i]) / static_cast<float>(width));
    const F mean_ah = set1(sum(sum_ah[i]) / static_cast<float>(width));
    for (int64_t j = 0; j < width; j += kLanes) {
      const F a = load_part(g + i * g_stride + j, width - j) * load(weight + j);
      store(z + i * z_stride + j, fnma(load(z + i * z_stride + j), mean_ah, a - mean_a) * r[i]);
    }
  }
}
