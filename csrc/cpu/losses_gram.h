// The score loss of one head without any S x S, in double precision. Included inside an ISA namespace.
//
// With P = [scale_s Q_s, -scale_t Q_t] and R = [K_s, K_t], n real rows and w = d_s + d_t columns, the difference of the
// scores is D = P R^T, so
//     sum D^2 = <P^T P, R^T R>,     dQ_s = 2 scale_s P (R^T R)[:, :d_s],     dK_s = 2 R (P^T P)[:, :d_s]
// (the gradient of K_s with P's first columns scale_s Q_s): O(n w^2) work.
//
// Error. Inputs are exact in double. With g_m = m u / (1 - m u) (Higham, Accuracy and Stability of Numerical
// Algorithms, section 3.1) the computed sum is off by at most g_{2n + w^2 + 8} times the sum of absolute products,
// which by Cauchy-Schwarz is at most (|scale_s Q_s| |K_s| + |scale_t Q_t| |K_t|)^2 in Frobenius norms, the traces of
// the Gram matrices' blocks. The form is accepted where that bound is at most 1e-3 of the result, itself known to that
// accuracy. The gradients cancel no more than the sum does, and start from the same 2^-53.

#if defined(__AVX512F__)
using D = __m512d;
inline D load_doubles(const double* p) { return _mm512_loadu_pd(p); }
inline void store_doubles(double* p, D a) { _mm512_storeu_pd(p, a); }
inline D set_doubles(double a) { return _mm512_set1_pd(a); }
inline D fma_doubles(D a, D b, D c) { return _mm512_fmadd_pd(a, b, c); }
constexpr int kGramRows = 12;
#elif defined(__AVX2__)
using D = __m256d;
inline D load_doubles(const double* p) { return _mm256_loadu_pd(p); }
inline void store_doubles(double* p, D a) { _mm256_storeu_pd(p, a); }
inline D set_doubles(double a) { return _mm256_set1_pd(a); }
inline D fma_doubles(D a, D b, D c) { return _mm256_fmadd_pd(a, b, c); }
constexpr int kGramRows = 6;
#else
typedef double D __attribute__((vector_size(16)));
inline D load_doubles(const double* p) {
  D a;
  __builtin_memcpy(&a, p, sizeof(D));
  return a;
}
inline void store_doubles(double* p, D a) { __builtin_memcpy(p, &a, sizeof(D)); }
inline D set_doubles(double a) { return D{a, a}; }
inline D fma_doubles(D a, D b, D c) { return a * b + c; }
constexpr int kGramRows = 4;
#endif
constexpr int kDoubles = sizeof(D) / sizeof(double);
constexpr int kGramColumns = 2 * kDoubles;
constexpr int64_t kGramChunk = 252;  // rows held in double at a time; a multiple of kGramRows
static_assert(kGramChunk % kGramRows == 0);

// c[i, j] (+)= sum over k of a[i, k] b[k, j] for kGramRows rows and kGramColumns columns; a is read along k, or ACROSS
// it.
template <bool ACROSS>
inline void multiply_doubles(int64_t depth, const double* a, int64_t a_stride, const double* b, int64_t b_stride,
                             double* c, int64_t c_stride, bool accumulate) {
  D acc[kGramRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kGramRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      acc[i][j] = accumulate ? load_doubles(c + i * c_stride + j * kDoubles) : set_doubles(0.0);
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    const D b0 = load_doubles(b), b1 = load_doubles(b + kDoubles);
#pragma GCC unroll 12
    for (int i = 0; i < kGramRows; ++i) {
      const D v = set_doubles(ACROSS ? a[k * a_stride + i] : a[i * a_stride + k]);
      acc[i][0] = fma_doubles(v, b0, acc[i][0]);
      acc[i][1] = fma_doubles(v, b1, acc[i][1]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kGramRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) store_doubles(c + i * c_stride + j * kDoubles, acc[i][j]);
}

struct GramScratch {
  double *rows, *gram_p, *gram_r, *result;
  int64_t width, stride;  // w, and w rounded up so that whole micro-kernels fit

  void carve(Carver& c, int64_t d_s, int64_t d_t) {
    width = d_s + d_t;
    stride = round_up(most(round_up(width, kGramRows), round_up(width, kGramColumns)), kDoubles);
    if (stride / kDoubles % 2 == 0) stride += kDoubles;  // rows should not compete for the same sets of a cache
    rows = c.take<double>((kGramChunk + kGramRows) * stride);
    gram_p = c.take<double>(stride * stride);
    gram_r = c.take<double>(stride * stride);
    result = c.take<double>((kGramChunk + kGramRows) * stride);
  }
};

template <class T>
inline void widen_row(const T* x, int64_t width, double scale, double* to) {
  float values[kLanes];
  for (int64_t j = 0; j < width; j += kLanes) {
    store(values, load_part(x + j, width - j));
    for (int64_t i = 0; i < least(kLanes, width - j); ++i) to[j + i] = scale * static_cast<double>(values[i]);
  }
}
// Rows [first, first + n) of v, scaled, into columns of the double rows.
inline void widen_rows(const View& v, int64_t first, int64_t n, int64_t width, double scale, double* to,
                       int64_t stride) {
  for (int64_t r = 0; r < n; ++r, to += stride)
    if (v.dtype == kFloat32)
      widen_row(static_cast<const float*>(v.data) + (first + r) * v.stride, width, scale, to);
    else
      widen_row(static_cast<const bf16*>(v.data) + (first + r) * v.stride, width, scale, to);
}

struct GramHead {
  const GramScratch& s;
  View q_s, k_s, q_t, k_t;  // real rows
  int64_t n, d_s, d_t;
  double scale_s, scale_t;

  // Sum D^2, or a negative number where it is not proven accurate and `always` is false.
  double total(bool always) {
    for (int64_t r = 0; r < kGramChunk + kGramRows; ++r)
      for (int64_t j = s.width; j < s.stride; ++j) s.rows[r * s.stride + j] = 0.0;
    // Two w x w matrices are all that is kept of n rows; their elementwise product sums to sum D^2, row by row.
    gram(q_s, q_t, scale_s, -scale_t, s.gram_p);
    gram(k_s, k_t, 1.0, 1.0, s.gram_r);
    double total = 0.0;
    for (int64_t i = 0; i < s.width; ++i) {
      double row = 0.0;
      for (int64_t j = 0; j < s.width; ++j) row += s.gram_p[i * s.stride + j] * s.gram_r[i * s.stride + j];
      total += row;
    }
    if (always) return total > 0.0 ? total : 0.0;
    const double student = trace(s.gram_p, 0, d_s) * trace(s.gram_r, 0, d_s);
    const double teacher = trace(s.gram_p, d_s, s.width) * trace(s.gram_r, d_s, s.width);
    const double norm = __builtin_sqrt(student) + __builtin_sqrt(teacher);
    const double terms = static_cast<double>(2 * n + s.width * s.width + 8);
    const double bound = terms * 0x1p-53 * 1.01 * norm * norm;
    return bound * (1.0 + kMostError) <= kMostError * total ? total : -1.0;
  }

  // Gradients of sum D^2 times `scale`, row by row, for the rows whose positions are `index`.
  void gradients(const int32_t* index, double scale, const View& grad_q, const View& grad_k) {
    gradient(q_s, q_t, scale_s, -scale_t, s.gram_r, index, 2.0 * scale * scale_s, grad_q);
    gradient(k_s, k_t, 1.0, 1.0, s.gram_p, index, 2.0 * scale, grad_k);
  }

 private:
  static constexpr double kMostError = 1e-3;

  double trace(const double* g, int64_t from, int64_t to) const {
    double t = 0.0;
    for (int64_t i = from; i < to; ++i) t += g[i * s.stride + i];
    return t > 0.0 ? t : 0.0;
  }

  void load(const View& own, const View& teacher, double a, double b, int64_t first, int64_t count) {
    widen_rows(own, first, count, d_s, a, s.rows, s.stride);
    widen_rows(teacher, first, count, d_t, b, s.rows + d_s, s.stride);
  }

  // g = X^T X of the concatenated rows: blocks on and above the diagonal, then mirrored.
  void gram(const View& own, const View& teacher, double a, double b, double* g) {
    // A chunk of rows in double, about 0.2 MB, serves all blocks of g: the depth of these products is the rows.
    for (int64_t first = 0; first < n; first += kGramChunk) {
      const int64_t count = least(kGramChunk, n - first);
      load(own, teacher, a, b, first, count);
      for (int64_t j = 0; j < s.width; j += kGramColumns)
        for (int64_t i = 0; i < least(s.width, j + kGramColumns); i += kGramRows)
          multiply_doubles<true>(count, s.rows + i, s.stride, s.rows + j, s.stride, g + i * s.stride + j, s.stride,
                                 first > 0);
    }
    for (int64_t i = 0; i < s.width; ++i)
      for (int64_t j = 0; j < i; ++j) g[i * s.stride + j] = g[j * s.stride + i];
  }

  void gradient(const View& own, const View& teacher, double a, double b, const double* g, const int32_t* index,
                double scale, const View& out) {
    for (int64_t first = 0; first < n; first += kGramChunk) {
      const int64_t count = least(kGramChunk, n - first);
      load(own, teacher, a, b, first, count);
      for (int64_t j = 0; j < d_s; j += kGramColumns)
        for (int64_t r = 0; r < count; r += kGramRows)
          multiply_doubles<false>(s.width, s.rows + r * s.stride, s.stride, g + j, s.stride,
                                  s.result + r * s.stride + j, s.stride, false);
      float values[kLanes];
      for (int64_t r = 0; r < count; ++r)
        for (int64_t j = 0; j < d_s; j += kLanes) {
          for (int64_t i = 0; i < kLanes; ++i)
            values[i] = j + i < d_s ? static_cast<float>(scale * s.result[r * s.stride + j + i]) : 0.0f;
          const View to = {static_cast<char*>(out.data) + j * element_size(out.dtype), out.stride, out.dtype};
          put_row(to, index[first + r], values, least(kLanes, d_s - j), 1.0f);
        }
    }
  }
};
