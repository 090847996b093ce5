// LayerNorm on rows of a float block that is still in cache. Included inside an ISA namespace.
//
// Statistics in float32, in one pass: sums of z - s and of its square, s the mean of the row's first 32 values. The
// variance is their difference, which cancels little: by Cauchy-Schwarz (s - mean)^2 <= width / 32 * variance whatever
// the row holds, and it is far below the variance unless a row is sorted. Two passes over a row in L1 take 1.2 of the
// time.

struct RowStats {
  float mean, inverse;  // 1 / sqrt(var + eps)
};
inline RowStats* stats_of(const View& v) { return static_cast<RowStats*>(v.data); }

constexpr int64_t kAboutColumns = 32;

// Statistics of R rows at once: the chain of one row's sums, a division and a square root hides behind the others'.
template <int R>
inline void row_stats(const float* z, int64_t z_stride, int64_t width, float eps, RowStats* stats) {
  const int64_t some = least(width, kAboutColumns);
  F about[R], first[R], second[R];  // sums of z - about and its square
  for (int i = 0; i < R; ++i) {
    const float* row = z + i * z_stride;
    F total = zero();
    for (int64_t j = 0; j < some; j += kLanes)
      total = total + loadn(row + j, static_cast<int>(least(some - j, kLanes)));
    stats[i].mean = sum(total) / static_cast<float>(some);
    about[i] = set1(stats[i].mean);
    first[i] = second[i] = zero();
  }
  const auto add = [&](int i, F a) {
    first[i] = first[i] + a;
    second[i] = fma(a, a, second[i]);
  };
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes)
    for (int i = 0; i < R; ++i) add(i, load(z + i * z_stride + j) - about[i]);
  if (j < width)
    for (int i = 0; i < R; ++i) {
      const int n = static_cast<int>(width - j);
      add(i, keep_lanes(loadn(z + i * z_stride + j, n) - about[i], n));
    }
  for (int i = 0; i < R; ++i) {
    const float total = sum(first[i]), squares = sum(second[i]), shift = total / static_cast<float>(width);
    const float rest = squares - total * shift;
    // infinite squares of finite numbers: an infinite variance, as squares of centred values would give
    const float sum_of_squares = __builtin_isinf(squares) ? squares : rest < 0.0f ? 0.0f : rest;
    stats[i].mean += shift;
    stats[i].inverse = 1.0f / __builtin_sqrtf(sum_of_squares / static_cast<float>(width) + eps);
  }
}

// out = (z - mean) * inverse * weight + bias
template <class T>
inline void normalize_row(const float* z, int64_t width, RowStats s, const float* weight, const float* bias, T* out) {
  const F m = set1(s.mean), r = set1(s.inverse);
  const auto value = [&](int64_t j) { return fma((load(z + j) - m) * r, load(weight + j), load(bias + j)); };
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) store(out + j, value(j));
  if (j < width) storen(out + j, value(j), static_cast<int>(width - j));
}

// LayerNorm of a block's rows, whose statistics also go to `stats` unless that is null. Rows of z have room up to
// kLanes, and weight and bias are filled up. Rows in fours took 0.65 (bfloat16) to 0.8 (float32) of the time of one by
// one.
template <class T>
inline void normalize_rows(const float* z, int64_t z_stride, int64_t rows, int64_t width, float eps,
                           const float* weight, const float* bias, T* out, int64_t out_stride, RowStats* stats) {
  constexpr int kRows = 4;
  for (int64_t r = 0; r < rows;) {
    RowStats s[kRows];
    const int64_t n = rows - r >= kRows ? kRows : 1;
    n == kRows ? row_stats<kRows>(z + r * z_stride, z_stride, width, eps, s)
               : row_stats<1>(z + r * z_stride, z_stride, width, eps, s);
    for (int64_t i = 0; i < n; ++i, ++r) {
      if (stats != nullptr) stats[r] = s[i];
      normalize_row(z + r * z_stride, width, s[i], weight, bias, out + r * out_stride);
    }
  }
}
inline void normalize_rows(const float* z, int64_t z_stride, int64_t rows, int64_t width, float eps,
                           const float* weight, const float* bias, const View& out, RowStats* stats) {
  if (out.dtype == kFloat32)
    normalize_rows(z, z_stride, rows, width, eps, weight, bias, static_cast<float*>(out.data), out.stride, stats);
  else
    normalize_rows(z, z_stride, rows, width, eps, weight, bias, static_cast<bf16*>(out.data), out.stride, stats);
}

// z holds R rows of LayerNorm's input, g their output gradients; afterwards z holds the input gradients. Adds to the
// parameter gradients. With a = g * weight and h = (z - mean) * inverse:
//   dz = inverse * (a - mean(a) - h * mean(a * h)).
// Rows of z have room up to kLanes; weight is zero there.
template <int R, class T>
inline void normalize_rows_backward(float* z, int64_t z_stride, const T* g, int64_t g_stride, int64_t width,
                                    const RowStats* stats, const float* weight, float* grad_weight, float* grad_bias) {
  // First pass: h replaces z, the two means and the parameter gradients are summed. Second pass: dz replaces h. R rows
  // at once share the loads and stores of the parameter gradients, [width] each.
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
