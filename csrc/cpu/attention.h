// Attention and the score loss from the same tiles, forward. Included inside an ISA namespace.
//
//     s = scale q k^T over real keys,  P = softmax(s),  context = dropout(P) v,  lse = log sum exp(s)
//     loss = sum over real queries and keys of (s - scale_t q_t k_t^T)^2 / (heads sum n_b^2)
//
// One task is one head of one sample. A tile of queries meets a block of at most kKeyBlock keys at a time; its scores
// exist in scratch only. With more keys the softmax goes on-line: maximum and denominator follow, what was summed is
// rescaled (Milakov and Gimelshein, 2018; Dao et al., 2022, algorithm 1). Padded keys are left out, not masked; padded
// queries attend to the real keys like others, samples without real keys get context 0.
//
// Dropout: the element of row (sample * heads + head) * S + query and column key of the mask of
// kernels/reference/philox.py, stream 0.

inline void drop_scattered(float* tile, int rows, int64_t row, const int32_t* columns, int64_t count,
                           const Call& call) {
  uint32_t w[4][kTileColumns];
  for (int r = 0; r < rows; ++r) {
    const uint64_t at = static_cast<uint64_t>(row + r);
    for (int j = 0; j < kTileColumns; ++j) {
      w[0][j] = j < count ? static_cast<uint32_t>(columns[j]) / 4 : 0;
      w[1][j] = static_cast<uint32_t>(at);
      w[2][j] = static_cast<uint32_t>(at >> 32);
      w[3][j] = 0;
    }
    philox_rounds(w[0], w[1], w[2], w[3], kTileColumns, call.seed);
    for (int j = 0; j < kTileColumns && j < count; ++j) {
      float& value = tile[r * kTileColumns + j];
      value = w[columns[j] % 4][j] >= call.drop_threshold ? value * call.drop_scale : 0.0f;
    }
  }
}

constexpr int kRowVectors = (kTileRows + kLanes - 1) / kLanes * kLanes;  // a tile's rows, in whole vectors

// out[r] = the lanes of v[r] joined by `op`.
template <class Op>
inline void reduce_lanes(const F* v, float* out, Op op) {
  for (int r = 0; r < kTileRows; r += kLanes) {
    F t[kLanes];
    for (int i = 0; i < kLanes; ++i) t[i] = v[r + i < kTileRows ? r + i : r];
    transpose(t);
    for (int i = 1; i < kLanes; ++i) t[0] = op(t[0], t[i]);
    store(out + r, t[0]);
  }
}

constexpr float kNoScore = -1e30f;  // of columns past the last key; its exponential is 0

// Columns from `count` on of a tile's rows.
inline void fill_tail(float* tile, int rows, int64_t count, float value) {
  for (int r = 0; r < rows; ++r)
    for (int64_t j = count; j < kTileColumns; ++j) tile[r * kTileColumns + j] = value;
}

// What forward and backward share: one head's operands and the score tiles.
struct AttentionHead {
  const AttentionCall& call;
  const RealTokens& real;
  const int64_t b, h;
  const int64_t n;
  const bool prefix;

  AttentionHead(const AttentionCall& c, const RealTokens& tokens, int64_t task)
      : call(c), real(tokens), b(task / c.heads), h(task % c.heads), n(real.count[b]), prefix(real.is_prefix(b)) {}

  int64_t length() const { return call.mask.length; }
  int64_t queries() const { return call.queries != 0 ? call.queries : length(); }
  bool with_loss() const { return call.q_t.data != nullptr; }
  float* lse() const { return call.lse + (b * call.heads + h) * length(); }

  // tile *= dropout factors of rows from `row` and keys from `key` on.
  void drop(float* tile, int rows, int64_t row, int64_t key) const {
    const int64_t at = (b * call.heads + h) * length() + row;
    if (prefix)
      drop_tile(tile, rows, at, key, 0, call.dropout);
    else
      drop_scattered(tile, rows, at, real.of(b) + key, n - key, call.dropout);
  }
};

struct AttentionShared {
  RealTokens real;
  double* sums;  // per task
  void carve(Carver& c, const AttentionCall& call) {
    real.carve(c, call.mask);
    sums = c.take<double>(call.mask.batch * call.heads);
  }
  // One over the number of scores compared.
  double share(const AttentionCall& call) const {
    double pairs = 0.0;
    for (int64_t b = 0; b < call.mask.batch; ++b)
      pairs += static_cast<double>(real.count[b]) * static_cast<double>(real.count[b]);
    return pairs > 0.0 ? 1.0 / (pairs * static_cast<double>(call.heads)) : 0.0;
  }
};

struct AttentionScratch {
  Element *keys, *keys_t, *values;  // k and k_t as columns, v as rows
  Element *q, *q_t, *p;
  float *scores, *tile, *sum, *room[3];  // scores: the tiles of one tile of queries and one block of keys
  int64_t stride, stride_t, stride_p, width;

  void carve(Carver& c, const AttentionCall& call, bool gaps) {
    const int64_t n = call.mask.length, block = least(kKeyBlock, round_up(n, kTileColumns));
    constexpr int64_t kRows = 2 * kTileRows;
    stride = operand_stride(call.d);
    stride_t = operand_stride(call.d_t);
    stride_p = operand_stride(block);
    width = padded_width(call.d);
    keys = c.take<Element>(columns_elements(n, call.d));
    keys_t = c.take<Element>(columns_elements(n, call.d_t));
    values = c.take<Element>(rows_elements(n, call.d));
    q = c.take<Element>(kRows * stride);
    q_t = c.take<Element>(kRows * stride_t);
    p = c.take<Element>(kRows * stride_p);
    scores = c.take<float>(panels(block) * kTileFloats);
    tile = c.take<float>(kTileFloats);
    sum = c.take<float>(kTileRows * width);
    for (float*& r : room) r = gaps ? c.take<float>(n * most(call.d, call.d_t) + kLanes) : nullptr;
  }
};

struct AttentionForward : AttentionHead {
  AttentionScratch& s;
  View q = head_of(call.q, b, h), q_t = head_of(call.q_t, b, h), context = head_of(call.context, b, h);
  float maximum[kRowVectors], denominator[kRowVectors];
  F row_squares[kTileRows] = {};
  double squares = 0.0;

  AttentionForward(const AttentionCall& c, const RealTokens& tokens, int64_t task, AttentionScratch& room)
      : AttentionHead(c, tokens, task), s(room) {}

  double run() {
    if (n == 0) {
      for (int64_t i = 0; i < length(); ++i) {
        clear_row(context, i, call.d);
        lse()[i] = 0.0f;
      }
      return 0.0;
    }
    // Keys and values of the head's real tokens, packed once: k as the columns of q k^T, v as the rows of P v.
    pack_as_columns(real_rows(call.k, b, h, real, call.d, s.room[0]), n, call.d, s.keys);
    pack_as_rows(real_rows(call.v, b, h, real, call.d, s.room[1]), n, call.d, s.values);
    if (with_loss()) pack_as_columns(real_rows(call.k_t, b, h, real, call.d_t, s.room[2]), n, call.d_t, s.keys_t);
    for_row_groups(queries(), [&](int64_t row, int rows) {
      copy_operand(rows_of(q, row), rows, call.d, s.q, s.stride);
      if (with_loss()) copy_operand(rows_of(q_t, row), rows, call.d_t, s.q_t, s.stride_t);
      // kTileRows x kKeyBlock scores at a time, 48 or 64 KB: read twice more while they are in cache.
      for (int64_t key = 0; key < n; key += kKeyBlock) {
        const int64_t keys = least(kKeyBlock, n - key);
        scores(row, rows, key, keys);
        exponentials(row, rows, key, keys);
        values(rows, key, keys);
      }
      finish(row, rows);
    });
    return squares;
  }

 private:
  float* score_tile(int64_t c) const { return s.scores + c / kTileColumns * kTileFloats; }

  // Scores with one block of keys, their maxima, and the loss.
  void scores(int64_t row, int rows, int64_t key, int64_t keys) {
    F most_of[kTileRows];
    for (int r = 0; r < kTileRows; ++r) most_of[r] = set1(kNoScore);
    // The loss compares before the scale is applied: both sides multiply alike in compare(). Maxima stay in lanes, one
    // vector a row, and are joined once per block.
    for (int64_t c = 0; c < keys; c += kTileColumns) {
      float* tile = score_tile(c);
      product(s.q, s.stride, 0, rows, s.keys, call.d, key + c, key + c + kTileColumns, kZeros, tile);
      if (with_loss()) compare(row, rows, key + c, tile);
      const F scale = set1(call.scale);
      for (int i = 0; i < rows * kTileColumns; i += kLanes) store(tile + i, load(tile + i) * scale);
      if (keys - c < kTileColumns) fill_tail(tile, rows, keys - c, kNoScore);
      for (int r = 0; r < rows; ++r)
        for (int j = 0; j < kTileColumns; j += kLanes)
          most_of[r] = max_second(most_of[r], load(tile + r * kTileColumns + j));
    }
    float block_maximum[kRowVectors];
    reduce_lanes(most_of, block_maximum, [](F a, F b) { return max_second(a, b); });
    // A larger maximum than that of earlier blocks: what was summed with the old one is brought down to the new one.
    for (int r = 0; r < rows; ++r) {
      const float before = key == 0 ? kNoScore : maximum[r];
      maximum[r] = block_maximum[r] > before ? block_maximum[r] : before;
      if (key == 0 || maximum[r] == before) continue;
      rescale(r, before - maximum[r]);
    }
  }

  void compare(int64_t row, int rows, int64_t key, const float* tile) {
    product(s.q_t, s.stride_t, 0, rows, s.keys_t, call.d_t, key, key + kTileColumns, kZeros, s.tile);
    const F a = set1(call.scale), t = set1(call.scale_t);
    for (int r = 0; r < rows; ++r) {
      if (call.mask.real[b * length() + row + r] == 0) continue;
      F total = zero();
      for (int j = 0; j < kTileColumns; j += kLanes) {
        const F d = load(tile + r * kTileColumns + j) * a - load(s.tile + r * kTileColumns + j) * t;
        total = fma(d, d, total);
      }
      row_squares[r] = row_squares[r] + total;
    }
  }

  void rescale(int r, float change) {
    float lanes[kLanes];
    store(lanes, exp_negative(set1(change)));
    denominator[r] *= lanes[0];
    for (int64_t j = 0; j < s.width; j += kLanes)
      store(s.sum + r * s.width + j, load(s.sum + r * s.width + j) * set1(lanes[0]));
  }

  // P before normalization, as operand, with dropout; denominators without.
  void exponentials(int64_t row, int rows, int64_t key, int64_t keys) {
    // The denominator sums all probabilities, dropped ones too, as softmax before dropout has it.
    F total[kTileRows];
    for (int r = 0; r < kTileRows; ++r) total[r] = zero();
    for (int64_t c = 0; c < keys; c += kTileColumns) {
      float* tile = score_tile(c);
      for (int r = 0; r < rows; ++r)
        for (int j = 0; j < kTileColumns; j += kLanes) {
          float* at = tile + r * kTileColumns + j;
          const F e = exp_negative(load(at) - set1(maximum[r]));
          total[r] = total[r] + e;
          store(at, e);
        }
      if (call.dropout.drop_threshold != 0) drop(tile, rows, row, key + c);
      store_operand(tile, rows, keys - c, s.p + operand_column(c), s.stride_p);
    }
    float sums[kRowVectors];
    reduce_lanes(total, sums, [](F a, F b) { return a + b; });
    for (int r = 0; r < rows; ++r) denominator[r] = sums[r] + (key == 0 ? 0.0f : denominator[r]);
  }

  void values(int rows, int64_t key, int64_t keys) {
    // sum += P v over this block of keys, [rows, d] float32, not normalized yet.
    const Element* packed = row_block(s.values, key, call.d);
    for (int64_t c = 0; c < call.d; c += kTileColumns) {
      product(s.p, s.stride_p, 0, rows, packed, keys, c, call.d, kZeros, s.tile);
      if (key == 0)
        store_block(s.sum + c, s.width, rows, s.tile);
      else
        add_block(s.sum + c, s.width, rows, s.tile);
    }
  }

  void finish(int64_t row, int rows) {
    for (int r = 0; r < rows; ++r) {
      // One division a row; the score loss of padded queries was never added (compare).
      put_row(context, row + r, s.sum + r * s.width, call.d, 1.0f / denominator[r]);
      if (call.lse != nullptr) lse()[row + r] = maximum[r] + __builtin_logf(denominator[r]);
      if (!with_loss()) continue;
      squares += static_cast<double>(sum(row_squares[r]));
      row_squares[r] = zero();
    }
  }

};

inline int attention_forward(AttentionCall& call) {
  AttentionShared shared;
  if (!carve(kShared, shared, call)) return 1;
  shared.real.fill(call.mask);
  const bool gaps = has_gaps(call.mask);
  const int64_t tasks = call.mask.batch * call.heads;
  auto task = [&](int64_t t) {
    AttentionScratch scratch_head;
    if (!carve(kPrivate, scratch_head, call, gaps)) {
      call.failed = 1;
      return;
    }
    const ProductScope scope;
    shared.sums[t] = AttentionForward(call, shared.real, t, scratch_head).run();
  };
  parallel_tasks(tasks, task);
  double total = 0.0;
  for (int64_t t = 0; t < tasks && !call.failed; ++t) total += shared.sums[t];
  *call.loss = static_cast<float>(total * shared.share(call));
  return call.failed;
}

struct RaggedShared {
  int32_t* index;  // 0, 1, ...: every sample's rows are all real
  int64_t longest;
  void carve(Carver& c, const RaggedAttention& call) {
    longest = 0;
    for (int64_t b = 0; b < call.samples; ++b) longest = most(longest, call.start[b + 1] - call.start[b]);
    index = c.take<int32_t>(longest);
  }
};

// The rows of one sample, all heads of them.
inline Heads sample_rows(const View& v, int64_t row, int64_t d) {
  return {static_cast<char*>(v.data) + row * v.stride * element_size(v.dtype), 0, d, v.stride, v.dtype};
}

inline int attention_ragged(RaggedAttention& call) {
  RaggedShared shared;
  if (!carve(kShared, shared, call)) return 1;
  for (int64_t i = 0; i < shared.longest; ++i) shared.index[i] = static_cast<int32_t>(i);
  auto task = [&](int64_t t) {
    const int64_t b = t / call.heads, row = call.start[b], at = call.first ? b : row;
    int64_t n = call.start[b + 1] - row;
    AttentionCall one = {};
    one.heads = call.heads;
    one.d = call.d;
    one.scale = call.scale;
    one.mask = {nullptr, 1, n};
    one.queries = call.first ? 1 : n;
    one.q = sample_rows(call.q, at, call.d);
    one.k = sample_rows(call.k, row, call.d);
    one.v = sample_rows(call.v, row, call.d);
    one.context = sample_rows(call.context, at, call.d);
    AttentionScratch room;
    if (!carve(kPrivate, room, one, false)) {
      call.failed = 1;
      return;
    }
    const ProductScope scope;
    AttentionForward(one, RealTokens{shared.index, &n, n}, t % call.heads, room).run();
  };
  parallel_tasks(call.samples * call.heads, task);
  return call.failed;
}
