// One row of the post segment, dropout, residual and LayerNorm, forward and backward, by a team of threads.
//
// A team is one warp (narrow rows) or a whole block (wide ones). Its threads take groups of four columns in turn; the
// same thread meets the same columns in every pass, so the row's float32 buffer needs no barriers. Statistics are taken
// in two passes over that buffer (mean, then centred squares), as PyTorch does.
//
//   forward   v = post(x, y[, y2]);  z = x + dropout(v);  out = LayerNorm(z)         bare: out = v
//   backward  z again;  h = (z - mean) rstd;  a = grad * gamma;  dz = rstd (a - mean(a) - h mean(a h))
//             dy[, dy2], dx = post_bwd(x, y[, y2], dropout(dz));  dx += dz
//             column sums, per team in shared memory:  grad * h, grad, dy[, dy2]
#pragma once

#include "philox.cuh"
#include "segment.cuh"

namespace ffnas {
namespace cuda {

enum RowSum : int32_t { kSumGamma = 0, kSumBeta = 1, kSumDy = 2, kSumDy2 = 3, kRowSums = 4 };

// Arguments of both directions; views that do not apply are absent (data == nullptr).
struct Rows {
  View x, y, y2;
  View ln_weight, ln_bias;  // absent: a bare expression
  View out;                 // forward
  View grad, dy, dy2, dx;   // backward; dx is float32
  float* stats;             // [tokens, 2] mean and rstd: written by forward, read by backward, or nullptr
  Dropout dropout;
  int64_t hidden;
  float eps;

  FFNAS_DEVICE bool has_ln() const { return ln_weight.data != nullptr; }
};

// kWarps warps that share a row; `scratch` holds kWarps floats where kWarps > 1.
template <int kWarps>
struct Team {
  static constexpr int kThreads = kWarps * kWarp;
  float* scratch;

  static FFNAS_DEVICE int member() { return thread() % kThreads; }
  FFNAS_DEVICE float sum(float v) const {
    v = warp_sum(v);
    if (kWarps == 1) return v;
    sync_threads();
    if (lane() == 0) scratch[warp()] = v;
    sync_threads();
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) total += scratch[k];
    return total;
  }
};

struct RowStats {
  float mean, rstd;
};

// The inputs of one group of columns; absent ones, and columns past the row's end, are zero.
FFNAS_DEVICE void load_inputs(const Rows& rows, const SegmentCode& s, int64_t row, int column, bool with_x,
                              float (&x)[4], float (&a)[4], float (&b)[4]) {
  const int hidden = static_cast<int>(rows.hidden);
  if (with_x || s.reads(kRegisterX)) load4(rows.x, row, column, hidden, x);
  if (s.reads(kRegisterA)) load4(rows.y, row, column, hidden, a);
  if (s.reads(kRegisterB)) load4(rows.y2, row, column, hidden, b);
}

FFNAS_DEVICE int padded(int64_t width) { return static_cast<int>((width + 3) / 4 * 4); }
FFNAS_DEVICE Float4& group_at(float* row, int column) { return *reinterpret_cast<Float4*>(row + column); }

// Mean and rstd of a row of z; columns past the end hold zeros.
template <int kWarps>
FFNAS_DEVICE RowStats statistics(const float* z, float total, int hidden, float eps, const Team<kWarps>& team) {
  const float mean = team.sum(total) / static_cast<float>(hidden);
  float squares = 0.0f;
  for (int c = 4 * Team<kWarps>::member(); c < hidden; c += 4 * Team<kWarps>::kThreads) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float d = c + j < hidden ? z[c + j] - mean : 0.0f;
      squares = fmaf(d, d, squares);
    }
  }
  return {mean, 1.0f / sqrtf(team.sum(squares) / static_cast<float>(hidden) + eps)};
}

// `stream_row` is the row's number within its own call, for dropout.
template <int kWarps>
FFNAS_DEVICE void row_forward(const Rows& rows, int64_t row, const SegmentCode& post, const Slots& slots, float* z,
                              const Team<kWarps>& team) {
  const int hidden = static_cast<int>(rows.hidden);
  const int first = 4 * Team<kWarps>::member(), step = 4 * Team<kWarps>::kThreads;
  const bool has_ln = rows.has_ln();
  float total = 0.0f;
  float x[4] = {}, a[4] = {}, b[4] = {};
  if (first < hidden) load_inputs(rows, post, row, first, has_ln, x, a, b);
  for (int c = first; c < hidden; c += step) {
    Machine m;
    Machine::copy(x, m.x);
    Machine::copy(a, m.a);
    Machine::copy(b, m.b);
    if (c + step < hidden) load_inputs(rows, post, row, c + step, has_ln, x, a, b);  // in flight while this group runs
    m.run(post, slots, c, hidden);
    float v[4];
    m.output(post.value, slots, v);
    if (!has_ln) {
      store4(rows.out, row, c, hidden, v);
      continue;
    }
    if (rows.dropout.threshold != 0) drop4(v, row, c, rows.dropout);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] = c + j < hidden ? m.x[j] + v[j] : 0.0f;
      total += v[j];
    }
    group_at(z, c) = {{v[0], v[1], v[2], v[3]}};
  }
  if (!has_ln) return;
  const RowStats s = statistics(z, total, hidden, rows.eps, team);
  if (rows.stats != nullptr && first == 0) {
    rows.stats[2 * row] = s.mean;
    rows.stats[2 * row + 1] = s.rstd;
  }
  for (int c = first; c < hidden; c += step) {
    float w[4], bias[4], v[4];
    load4(rows.ln_weight, 0, c, hidden, w);
    load4(rows.ln_bias, 0, c, hidden, bias);
    const Float4 own = group_at(z, c);
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = fmaf((own.v[j] - s.mean) * s.rstd, w[j], bias[j]);
    store4(rows.out, row, c, hidden, v);
  }
}

// Adds v to a group of a column sum; the columns are the calling thread's own.
FFNAS_DEVICE void add_group(float* sums, int c, const float (&v)[4]) {
  Float4& group = group_at(sums, c);
  group = {{group.v[0] + v[0], group.v[1] + v[1], group.v[2] + v[2], group.v[3] + v[3]}};
}

// z: the row's buffer. sums: the first kSums of `RowSum`, rows of `width` floats (the padded row), the team's own.
template <int kWarps, int kSums>
FFNAS_DEVICE void row_backward(const Rows& rows, int64_t row, const SegmentCode* segments, const Slots& slots, float* z,
                               float* sums, int width, const Team<kWarps>& team) {
  const int hidden = static_cast<int>(rows.hidden);
  const int first = 4 * Team<kWarps>::member(), step = 4 * Team<kWarps>::kThreads;
  const bool has_ln = rows.has_ln();
  RowStats s = {0.0f, 0.0f};
  float mean_a = 0.0f, mean_ah = 0.0f, total = 0.0f;
  // pass 0: z;  pass 1: gradients. One loop around one copy of the interpreter.
  for (int pass = has_ln ? 0 : 1; pass < 2; ++pass) {
    const SegmentCode& code = segments[pass];
    if (pass == 1 && has_ln) {
      s = rows.stats == nullptr ? statistics(z, total, hidden, rows.eps, team)
                                : RowStats{rows.stats[2 * row], rows.stats[2 * row + 1]};
      float sum_a = 0.0f, sum_ah = 0.0f;
      for (int c = first; c < hidden; c += step) {
        float g[4], w[4], gh[4];
        load4(rows.grad, row, c, hidden, g);
        load4(rows.ln_weight, 0, c, hidden, w);
        Float4 own = group_at(z, c);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          own.v[j] = c + j < hidden ? (own.v[j] - s.mean) * s.rstd : 0.0f;
          gh[j] = g[j] * own.v[j];
          const float a = g[j] * w[j];
          sum_a += a;
          sum_ah = fmaf(a, own.v[j], sum_ah);
        }
        group_at(z, c) = own;
        add_group(sums + kSumGamma * width, c, gh);
        add_group(sums + kSumBeta * width, c, g);
      }
      mean_a = team.sum(sum_a) / static_cast<float>(hidden);
      mean_ah = team.sum(sum_ah) / static_cast<float>(hidden);
    }
    for (int c = first; c < hidden; c += step) {
      Machine m;
      load_inputs(rows, code, row, c, pass == 0, m.x, m.a, m.b);
      float dz[4];
      if (pass == 1) {
        load4(rows.grad, row, c, hidden, dz);
        if (has_ln) {
          float w[4];
          load4(rows.ln_weight, 0, c, hidden, w);
          const Float4 h = group_at(z, c);
#pragma unroll
          for (int j = 0; j < 4; ++j) dz[j] = s.rstd * (dz[j] * w[j] - mean_a - h.v[j] * mean_ah);
        }
        Machine::copy(dz, m.g);
        if (rows.dropout.threshold != 0) drop4(m.g, row, c, rows.dropout);
      }
      m.run(code, slots, c, hidden);
      if (pass == 0) {
        float v[4];
        m.output(code.value, slots, v);
        if (rows.dropout.threshold != 0) drop4(v, row, c, rows.dropout);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j] = c + j < hidden ? m.x[j] + v[j] : 0.0f;
          total += v[j];
        }
        group_at(z, c) = {{v[0], v[1], v[2], v[3]}};
        continue;
      }
      float v[4];
      m.output(code.da, slots, v);
      store4(rows.dy, row, c, hidden, v);
      if (kSums > kSumDy) add_group(sums + kSumDy * width, c, v);
      if (rows.dy2.data != nullptr) {
        m.output(code.db, slots, v);
        store4(rows.dy2, row, c, hidden, v);
        if (kSums > kSumDy2) add_group(sums + kSumDy2 * width, c, v);
      }
      if (rows.dx.data != nullptr) {
        m.output(code.dx, slots, v);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] += has_ln ? dz[j] : 0.0f;
        store4(rows.dx, row, c, hidden, v);
      }
    }
  }
}

}  // namespace cuda
}  // namespace ffnas
