// LayerNorm on rows of a float block that is still in cache. Included inside an ISA namespace.
//
// Statistics in float32, variance from the centred values (two passes over a row in L1), as PyTorch does.

struct RowStats {
  float mean, inverse;  // 1 / sqrt(var + eps)
};

inline F load_part(const float* p, int64_t left) {
  return left >= kLanes ? load(p) : loadn(p, static_cast<int>(left));
}

inline RowStats row_stats(const float* z, int64_t width, float eps) {
  F s = zero();
  for (int64_t j = 0; j < width; j += kLanes) s = s + load_part(z + j, width - j);
  const float mean = sum(s) / static_cast<float>(width);
  const F m = set1(mean);
  F q = zero();
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    const F c = load(z + j) - m;
    q = fma(c, c, q);
  }
  float squares = sum(q);
  for (; j < width; ++j) squares += (z[j] - mean) * (z[j] - mean);
  const float variance = squares / static_cast<float>(width);
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

// z <- (z - mean) * inverse * weight + bias; weight and bias are zero-padded to kLanes.
inline void normalize_row(float* z, int64_t width, RowStats s, const float* weight, const float* bias) {
  const F m = set1(s.mean), r = set1(s.inverse);
  for (int64_t j = 0; j < width; j += kLanes)
    store(z + j, fma((load(z + j) - m) * r, load(weight + j), load(bias + j)));
}

// z holds LayerNorm's input, g its output gradient; afterwards z holds the input gradient. Adds to the parameter
// gradients. With a = g * weight and h = (z - mean) * inverse:  dz = inverse * (a - mean(a) - h * mean(a * h)).
// Rows are padded with room up to kLanes; g is zero there.
inline void normalize_row_backward(float* z, const float* g, int64_t width, RowStats s, const float* weight,
                                   float* grad_weight, float* grad_bias) {
  const F m = set1(s.mean), r = set1(s.inverse);
  F sum_a = zero(), sum_ah = zero();
  for (int64_t j = 0; j < width; j += kLanes) {
    const F h = (load_part(z + j, width - j) - m) * r, gv = load(g + j);
    const F a = gv * load(weight + j);
    store(grad_weight + j, fma(gv, h, load(grad_weight + j)));
    store(grad_bias + j, load(grad_bias + j) + gv);
    sum_a = sum_a + a;
    sum_ah = fma(a, h, sum_ah);
    store(z + j, h);
  }
  const F ma = set1(sum(sum_a) / static_cast<float>(width));
  const F mah = set1(sum(sum_ah) / static_cast<float>(width));
  for (int64_t j = 0; j < width; j += kLanes) {
    const F a = load(g + j) * load(weight + j);
    store(z + j, fnma(load(z + j), mah, a - ma) * r);
  }
}
