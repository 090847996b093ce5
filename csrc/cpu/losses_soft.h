// Soft cross-entropy T^2 / rows * sum over rows of -p_t log p_s and its gradient T / rows * (p_s - p_t), with
// p = softmax(logits / T). Included inside an ISA namespace.
//
// Per row, with u = logits / T less its maximum, e = exp(u) and Z = sum e:
//     -sum p_t log p_s = log Z_s - sum e_t u_s / Z_t
// Rows are read three times (maxima, sums, gradient); nothing of their size is stored but the gradient. Called through
// the kernels with float32 products, whose exponential is accurate to float32.

struct SoftRow {
  const SoftCrossEntropyCall& call;
  int64_t row;

  static F at(const View& v, int64_t row, int64_t j, int64_t left) {
    return v.dtype == kFloat32 ? load_part(static_cast<const float*>(v.data) + row * v.stride + j, left)
                               : load_part(static_cast<const bf16*>(v.data) + row * v.stride + j, left);
  }
  // (x - maximum) * scale; lanes past the last class get -1e30, whose exponential is 0.
  static F shifted(F x, float maximum, F scale, int64_t left) {
    const F u = (x - set1(maximum)) * scale, low = set1(-1e30f);
    if (left >= kLanes) return u;
    return keep_lanes(u, static_cast<int>(left)) + (low - keep_lanes(low, static_cast<int>(left)));
  }

  static float maximum(const View& v, int64_t row, int64_t classes) {
    float best = -__builtin_inff(), lanes[kLanes];
    for (int64_t j = 0; j < classes; j += kLanes) {
      store(lanes, at(v, row, j, classes - j));
      for (int64_t i = 0; i < least(kLanes, classes - j); ++i) best = lanes[i] > best ? lanes[i] : best;
    }
    return best;
  }

  double run() {
    const int64_t n = call.classes;
    const float max_s = maximum(call.student, row, n), max_t = maximum(call.teacher, row, n);
    const F scale = set1(1.0f / call.temperature);
    F z_s = zero(), z_t = zero(), cross = zero();
    for (int64_t j = 0; j < n; j += kLanes) {
      const F u_s = shifted(at(call.student, row, j, n - j), max_s, scale, n - j);
      const F u_t = shifted(at(call.teacher, row, j, n - j), max_t, scale, n - j);
      const F e_t = exp_negative(u_t);
      z_s = z_s + exp_negative(u_s);
      z_t = z_t + e_t;
      cross = fma(e_t, max_second(set1(-1e30f), keep_lanes(u_s, static_cast<int>(least(kLanes, n - j)))), cross);
    }
    const float sum_s = sum(z_s), sum_t = sum(z_t);
    if (call.grad.data != nullptr) gradient(max_s, max_t, 1.0f / sum_s, 1.0f / sum_t, scale);
    return __builtin_log(static_cast<double>(sum_s)) - static_cast<double>(sum(cross)) / static_cast<double>(sum_t);
  }

 private:
  void gradient(float max_s, float max_t, float share_s, float share_t, F scale) {
    const int64_t n = call.classes;
    const F factor = set1(call.temperature / static_cast<float>(call.rows));
    for (int64_t j = 0; j < n; j += kLanes) {
      const F u_s = shifted(at(call.student, row, j, n - j), max_s, scale, n - j);
      const F u_t = shifted(at(call.teacher, row, j, n - j), max_t, scale, n - j);
      const F g = (exp_negative(u_s) * set1(share_s) - exp_negative(u_t) * set1(share_t)) * factor;
      if (call.grad.dtype == kFloat32)
        store_part(static_cast<float*>(call.grad.data) + row * call.grad.stride + j, g, n - j);
      else
        store_part(static_cast<bf16*>(call.grad.data) + row * call.grad.stride + j, g, n - j);
    }
  }
};

struct SoftShared {
  double* sums;  // per row
  void carve(Carver& c, const SoftCrossEntropyCall& call) { sums = c.take<double>(call.rows); }
};

inline int soft_cross_entropy(SoftCrossEntropyCall& call) {
  SoftShared shared;
  if (!carve(kShared, shared, call)) return 1;
  const int64_t together = most(1, 16384 / call.classes);  // rows per task
  auto task = [&](int64_t t) {
    for (int64_t r = t * together; r < least(call.rows, (t + 1) * together); ++r)
      shared.sums[r] = SoftRow{call, r}.run();
  };
  parallel_tasks((call.rows + together - 1) / together, task);
  double total = 0.0;
  for (int64_t r = 0; r < call.rows; ++r) total += shared.sums[r];
  const double t = call.temperature;
  *call.loss = static_cast<float>(call.rows > 0 ? total * t * t / static_cast<double>(call.rows) : 0.0);
  return 0;
}
