// The scan of linear-chain CRFs (kernels/reference/crf.py says what is computed), a sentence a task, tags in vectors.
// Included inside an ISA namespace; called through the kernels with float32 products.
//
// Forward, per position, with E = exp(A - max A) packed once per call:
//     v = exp(alpha[k-1]);  s = v E (a product of a vector and a matrix);  alpha[k] = log s + psi[k] - largest
// and backward, with alpha kept and u = exp(psi[k+1] + beta[k+1]):
//     t = E u;  Z = <v, t>;  P(y_k) = v t / Z;  M += v (u / Z)^T;  beta[k] = log t - largest;  in the end pairs = M E
// So a position costs L² multiply-adds and 2 L exponentials or logarithms. Rows are kept as logarithms less their
// largest: nothing overflows, and what is lost below e^-87 is noticed by its sum: a sum below kLost is computed again as a
// logarithm of a sum of exponentials in float64 (scores such as -1e4 and -inf that forbid).
//
// Rejected: rows kept as numbers, rescaled. No logarithms, but a tag 87 below its neighbours is lost without a trace,
// and with forbidden transitions the only possible sequence may lead through it.

constexpr int kMostTags = kMostCrfTags;
constexpr float kLost = 1e-20f;  // 64 lost terms of at most 1.2e-38 each are less than a float64's rounding of this
constexpr float kMinusInfinity = -__builtin_inff();

// log a for a >= 1e-37, with an absolute error below 1e-7 and a rounding; -inf below, for 0 in particular.
inline F log_positive(F a) {
  const F e = exponent(a);
  const F m = a * pow2(zero() - e);
  const F y = fma(e, set1(0.693145751953125f), fma(e, set1(1.42860682030941723e-6f), log1p_unit(m - set1(1.0f))));
  return select(lt(a, set1(1e-37f)), set1(kMinusInfinity), y);
}

struct CrfShared {
  float *rows, *columns;  // E [L, width] and its transpose, 0 past L
  float largest;          // of the transitions, 0 where all are -inf
  int64_t width;          // L in whole vectors

  void carve(Carver& c, const CrfCall& call) {
    width = round_up(call.tags, kLanes);
    rows = c.take<float>(call.tags * width);
    columns = c.take<float>(call.tags * width);
  }
  void fill(const CrfCall& call) {
    const int64_t n = call.tags;
    largest = kMinusInfinity;
    for (int64_t i = 0; i < n * n; ++i) largest = call.transitions[i] > largest ? call.transitions[i] : largest;
    if (largest == kMinusInfinity) largest = 0.0f;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < width; j += kLanes) {
        const F e = exp_negative(load_part(call.transitions + i * n + j, n - j) - set1(largest));
        store(rows + i * width + j, keep_lanes(e, static_cast<int>(least(kLanes, n - j))));
      }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < width; ++j) columns[i * width + j] = j < n ? rows[j * width + i] : 0.0f;
  }
};

// One sentence; rows of tags are `width` floats, -inf past L where they are logarithms.
struct CrfSentence {
  const CrfCall& call;
  const CrfShared& shared;
  int64_t b, words, n, width;
  const float* psi;  // [words, L]
  float* alpha;

  float* sums;  // M, [L, width], for backward

  CrfSentence(const CrfCall& call_, const CrfShared& shared_, int64_t b_, float* sums_)
      : call(call_), shared(shared_), b(b_), n(call_.tags), width(shared_.width), sums(sums_) {
    words = most(0, least(call.positions, call.lengths[b]));
    psi = call.emissions + b * call.positions * n;
    alpha = call.alpha + b * call.positions * n;
  }

  void forward() {
    alignas(64) float row[kMostTags], own[kMostTags], v[kMostTags];
    double shift = 0.0;
    for (int64_t k = 0; k < words; ++k) {
      shift += emissions(k, own);
      if (k == 0) {
        for (int64_t j = 0; j < width; j += kLanes) store(row + j, load(own + j) + scores(call.start, j));
      } else if (call.best) {
        best_step(row, own);
      } else {
        exponentials(row, v);
        product(shared.rows, v, row);  // row is alpha[k-1] until its exponentials are taken
        for (int64_t j = 0; j < width; j += kLanes) store(row + j, load(own + j) + log_positive(load(row + j)));
        for (int64_t j = 0; j < n; ++j)
          if (!lost_.none && lost_.at[j]) row[j] = own[j] + exact(alpha + (k - 1) * n, call.transitions + j, n);
        shift += shared.largest;
      }
      shift += normalize(row);
      write(row, alpha + k * n);
    }
    clear(alpha + words * n, (call.positions - words) * n);
    call.total[b] = words == 0 ? 0.0 : shift + finish(row);
  }

  void backward() {
    float* tags = call.tag_marginals + b * call.positions * n;
    float* pairs = call.pair_counts + b * n * n;
    clear(pairs, n * n);
    clear(tags + words * n, (call.positions - words) * n);
    if (words == 0) return;
    if (call.best)
      best_path(tags, pairs);
    else
      marginals(tags, pairs);
  }

 private:
  struct {
    bool none;
    bool at[kMostTags];
  } lost_ = {};

  // own = psi[k] less its largest, which is returned.
  double emissions(int64_t k, float* own) const {
    for (int64_t j = 0; j < width; j += kLanes) store(own + j, scores(psi + k * n, j));
    return normalize(own);
  }
  // L floats from j on, -inf past them.
  F scores(const float* from, int64_t j) const {
    if (n - j >= kLanes) return load(from + j);
    const int left = static_cast<int>(n - j);
    alignas(64) float lanes[kLanes];
    store(lanes, loadn(from + j, left));
    for (int i = left; i < kLanes; ++i) lanes[i] = kMinusInfinity;
    return load(lanes);
  }
  void write(const float* row, float* to) const {
    for (int64_t j = 0; j < n; j += kLanes) store_part(to + j, load(row + j), n - j);
  }
  static void clear(float* to, int64_t count) {
    if (count > 0) __builtin_memset(to, 0, static_cast<size_t>(count) * sizeof(float));
  }
  // Subtracts the largest, which is returned; 0 where all are -inf.
  double normalize(float* row) const {
    F top = load(row);
    for (int64_t j = kLanes; j < width; j += kLanes) top = max_second(load(row + j), top);
    const float largest = greatest(top);
    if (largest == kMinusInfinity) return 0.0;
    for (int64_t j = 0; j < width; j += kLanes) store(row + j, load(row + j) - set1(largest));
    return largest;
  }
  static float greatest(F a) {
    alignas(64) float lanes[kLanes];
    store(lanes, a);
    float best = lanes[0];
    for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
    return best;
  }
  void exponentials(const float* row, float* v) const {
    for (int64_t j = 0; j < width; j += kLanes) store(v + j, exp_negative(load(row + j)));
  }

  // out[j] = sum over i of v[i] matrix[i, j]; notes the columns whose sum is too small to be trusted.
  void product(const float* matrix, const float* v, float* out) {
    switch (width / kLanes) {
      case 1: return product_of<1>(matrix, v, out);
      case 2: return product_of<2>(matrix, v, out);
      case 3: return product_of<3>(matrix, v, out);
      case 4: return product_of<4>(matrix, v, out);
      default:
        for (int64_t j = 0; j < width; j += kLanes) {
          F sum = zero();
          for (int64_t i = 0; i < n; ++i) sum = fma(set1(v[i]), load(matrix + i * width + j), sum);
          store(out + j, sum);
        }
        note(out);
    }
  }
  template <int V>
  void product_of(const float* matrix, const float* v, float* out) {
    F even[V], odd[V];  // two sums each: a multiply-add waits for the one before it
    for (int c = 0; c < V; ++c) even[c] = odd[c] = zero();
    int64_t i = 0;
    for (; i + 1 < n; i += 2, matrix += 2 * V * kLanes) {
      const F a = set1(v[i]), b = set1(v[i + 1]);
      for (int c = 0; c < V; ++c) {
        even[c] = fma(a, load(matrix + c * kLanes), even[c]);
        odd[c] = fma(b, load(matrix + (V + c) * kLanes), odd[c]);
      }
    }
    if (i < n)
      for (int c = 0; c < V; ++c) even[c] = fma(set1(v[i]), load(matrix + c * kLanes), even[c]);
    for (int c = 0; c < V; ++c) store(out + c * kLanes, even[c] + odd[c]);
    note(out);
  }
  void note(const float* sums) {
    lost_.none = true;
    for (int64_t j = 0; j < n; ++j) {
      lost_.at[j] = sums[j] < kLost;
      lost_.none &= !lost_.at[j];
    }
  }
  // log sum over i of exp(row[i] + score[i * stride]) less the largest transition, in float64.
  float exact(const float* row, const float* score, int64_t stride) const {
    double top = -__builtin_inf(), sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const double x = static_cast<double>(row[i]) + score[i * stride];
      top = x > top ? x : top;
    }
    if (top == -__builtin_inf()) return kMinusInfinity;
    for (int64_t i = 0; i < n; ++i) sum += __builtin_exp(static_cast<double>(row[i]) + score[i * stride] - top);
    return static_cast<float>(top + __builtin_log(sum) - shared.largest);
  }

  // row[j] = own[j] + the largest row[i] + A[i, j]
  void best_step(float* row, const float* own) const {
    alignas(64) float before[kMostTags];
    for (int64_t j = 0; j < width; j += kLanes) store(before + j, load(row + j));
    for (int64_t j = 0; j < width; j += kLanes) {
      F top = set1(kMinusInfinity);
      for (int64_t i = 0; i < n; ++i)
        top = max_second(set1(before[i]) + scores(call.transitions + i * n, j), top);
      store(row + j, load(own + j) + top);
    }
  }
  double finish(const float* row) const {
    double top = -__builtin_inf(), sum = 0.0;
    for (int64_t j = 0; j < n; ++j) {
      const double x = static_cast<double>(row[j]) + call.end[j];
      if (!(x <= top)) top = x;
    }
    if (call.best || top == -__builtin_inf()) return top;
    for (int64_t j = 0; j < n; ++j) sum += __builtin_exp(static_cast<double>(row[j]) + call.end[j] - top);
    return top + __builtin_log(sum);
  }

  void marginals(float* tags, float* pairs) {
    alignas(64) float beta[kMostTags], own[kMostTags], u[kMostTags], v[kMostTags], t[kMostTags];
    clear(sums, n * width);
    for (int64_t j = 0; j < width; j += kLanes) store(beta + j, scores(call.end, j));
    normalize(beta);
    last_tags(beta, tags + (words - 1) * n);
    for (int64_t k = words - 2; k >= 0; --k) {
      const float* before = alpha + k * n;
      emissions(k + 1, own);
      for (int64_t j = 0; j < width; j += kLanes) store(own + j, load(own + j) + load(beta + j));
      normalize(own);  // log u
      exponentials(own, u);
      product(shared.columns, u, t);
      F z = zero();
      for (int64_t j = 0; j < width; j += kLanes) {
        const F w = exp_negative(scores(before, j));
        store(v + j, w);
        z = fma(w, load(t + j), z);
      }
      const float total = sum(z);
      if (total < kLost)
        exact_pairs(before, own, tags + k * n, pairs);
      else
        add_pairs(1.0f / total, v, u, t, tags + k * n);
      for (int64_t j = 0; j < width; j += kLanes) store(beta + j, log_positive(load(t + j)));
      for (int64_t i = 0; i < n; ++i)
        if (!lost_.none && lost_.at[i]) beta[i] = exact(own, call.transitions + i * n, 1);
      for (int64_t i = n; i < width; ++i) beta[i] = kMinusInfinity;
      normalize(beta);
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) pairs[i * n + j] += sums[i * width + j] * shared.rows[i * width + j];
  }
  void add_pairs(float share, const float* v, float* u, const float* t, float* tags) const {
    for (int64_t j = 0; j < width; j += kLanes) {
      store(u + j, load(u + j) * set1(share));
      if (j < n) store_part(tags + j, load(v + j) * load(t + j) * set1(share), n - j);
    }
    for (int64_t i = 0; i < n; ++i) {
      const F a = set1(v[i]);
      for (int64_t j = 0; j < width; j += kLanes)
        store(sums + i * width + j, fma(a, load(u + j), load(sums + i * width + j)));
    }
  }
  // Tags and pairs of one position where the product of alpha and beta is too small: all L² of them in float64.
  void exact_pairs(const float* before, const float* own, float* tags, float* pairs) const {
    const auto at = [&](int64_t i, int64_t j) { return static_cast<double>(before[i]) + call.transitions[i * n + j] + own[j]; };
    double top = -__builtin_inf(), sum = 0.0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) top = at(i, j) > top ? at(i, j) : top;
    clear(tags, n);
    if (top == -__builtin_inf()) return;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) sum += __builtin_exp(at(i, j) - top);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const float p = static_cast<float>(__builtin_exp(at(i, j) - top) / sum);
        tags[i] += p;
        pairs[i * n + j] += p;
      }
  }
  void last_tags(const float* beta, float* tags) const {
    alignas(64) float row[kMostTags];
    for (int64_t j = 0; j < width; j += kLanes) store(row + j, scores(alpha + (words - 1) * n, j) + load(beta + j));
    normalize(row);
    F z = zero();
    for (int64_t j = 0; j < width; j += kLanes) {
      const F e = exp_negative(load(row + j));
      store(row + j, e);
      z = z + e;
    }
    const float total = sum(z), share = total < kLost ? 0.0f : 1.0f / total;  // all forbidden: none
    for (int64_t j = 0; j < width; j += kLanes) store(row + j, load(row + j) * set1(share));
    write(row, tags);
  }

  void best_path(float* tags, float* pairs) const {
    clear(tags, words * n);
    int64_t following = -1;
    for (int64_t k = words - 1; k >= 0; --k) {
      const float* row = alpha + k * n;
      float top = kMinusInfinity;
      int64_t tag = -1;
      for (int64_t i = 0; i < n; ++i) {
        const float x = row[i] + (following < 0 ? call.end[i] : call.transitions[i * n + following]);
        if (x > top) {
          top = x;
          tag = i;
        }
      }
      if (tag < 0) return;  // all forbidden, which shows at the last word
      tags[k * n + tag] = 1.0f;
      if (following >= 0) pairs[tag * n + following] += 1.0f;
      following = tag;
    }
  }
};

struct CrfRoom {
  float* sums;
  void carve(Carver& c, int64_t count) { sums = c.take<float>(count); }
};

inline int crf_scan(CrfCall& call) {
  CrfShared shared;
  if (!carve(kShared, shared, call)) return 1;
  shared.fill(call);
  const bool backward = call.tag_marginals != nullptr;
  const int64_t words = most(1, call.positions), together = most(1, 256 / words);  // sentences a task
  auto task = [&](int64_t t) {
    CrfRoom room = {};
    if (backward && !carve(kPrivate, room, call.tags * shared.width)) {
      call.failed = 1;
      return;
    }
    for (int64_t b = t * together; b < least(call.sentences, (t + 1) * together); ++b) {
      CrfSentence sentence(call, shared, b, room.sums);
      if (backward)
        sentence.backward();
      else
        sentence.forward();
    }
  };
  parallel_tasks((call.sentences + together - 1) / together, task);
  return call.failed;
}
