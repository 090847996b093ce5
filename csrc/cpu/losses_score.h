// Mean squared difference of attention scores over heads and pairs of real tokens, summed over layers, and its
// gradients for the student, in one pass. Included inside an ISA namespace.
//
// One task is one head of one sample of one layer. Two forms: Gram (losses_gram.h), and tiled, where a block of queries
// meets a block of keys: D = scale_s q_s k_s^T - scale_t q_t k_t^T exists for that block only, in scratch, and serves
// the sum, dq += D k_s and dk += D^T q_s before it is gone.
//
// Chosen: gradients at once. The loss is a scalar, so its gradients are known up to one factor, and D, which costs half
// of the work, is computed once instead of twice. Rejected: saving q and k alone and computing D again in backward.

// From this many real tokens per column of the Gram matrices on, that form is faster. Measured with gradients on one
// core of a Sapphire Rapids at d 45 and 64: both take the same time near 2.8 with float32 products, near 11 with AMX.
constexpr double kGramPays = sizeof(Element) == 4 ? 2.8 : 11.0;

struct ScoreScratch {
  Element *keys_s, *keys_t, *key_rows;  // k_s and k_t as columns, k_s as rows
  Element *q_s, *q_t, *d, *left, *right;
  float *dq, *dk, *tile_s, *tile_t, *room[4];
  int64_t stride_s, stride_t, stride_d, width;
  GramScratch gram;

  void carve(Carver& c, const ScoreCall& call, bool gaps, bool gradients) {
    const int64_t n = call.mask.length, keys = least(kKeyBlock, round_up(n, kTileColumns));
    constexpr int64_t kRows = kBlockRows + kTileRows;
    stride_s = operand_stride(call.d_s);
    stride_t = operand_stride(call.d_t);
    stride_d = operand_stride(keys);
    width = padded_width(call.d_s);
    keys_s = c.take<Element>(columns_elements(n, call.d_s));
    keys_t = c.take<Element>(columns_elements(n, call.d_t));
    q_s = c.take<Element>(kRows * stride_s);
    q_t = c.take<Element>(kRows * stride_t);
    tile_s = c.take<float>(kTileFloats);
    tile_t = c.take<float>(kTileFloats);
    if (gradients) {
      key_rows = c.take<Element>(rows_elements(n, call.d_s));
      d = c.take<Element>(kRows * stride_d);
      left = kLeftIsOperand ? d : c.take<Element>(left_elements(kBlockRows, keys));
      right = c.take<Element>(right_elements(kBlockRows, call.d_s));
      dq = c.take<float>(kBlockRows * width);
      dk = c.take<float>(round_up(n, kTileColumns) * width);
    }
    for (float*& r : room) r = gaps ? c.take<float>(n * most(call.d_s, call.d_t) + kLanes) : nullptr;
    gram.carve(c, call.d_s, call.d_t);
  }
};

struct ScoreHead {
  const ScoreCall& call;
  const ScoreLayer& layer;
  const ScoreScratch& s;
  const RealTokens& real;
  const int64_t b, h;
  const double factor;  // of the gradients of sum D^2
  const int64_t n = real.count[b];
  const int64_t keys_per_block = least(kKeyBlock, round_up(call.mask.length, kTileColumns));
  View q_s = {}, k_s = {}, q_t = {}, k_t = {}, grad_q = {}, grad_k = {};

  // Sum D^2; gradients go to the caller's tensors.
  double run() {
    grad_q = head_of(layer.grad_q, b, h);
    grad_k = head_of(layer.grad_k, b, h);
    if (grad_q.data != nullptr) {
      clear_padding(grad_q, real, b, call.d_s);
      clear_padding(grad_k, real, b, call.d_s);
    }
    if (n == 0) return 0.0;
    q_s = real_rows(layer.q_s, b, h, real, call.d_s, s.room[0]);
    k_s = real_rows(layer.k_s, b, h, real, call.d_s, s.room[1]);
    q_t = real_rows(layer.q_t, b, h, real, call.d_t, s.room[2]);
    k_t = real_rows(layer.k_t, b, h, real, call.d_t, s.room[3]);
    if (call.form == kGram || (call.form == kAutomatic && n >= kGramPays * (call.d_s + call.d_t))) {
      GramHead gram{s.gram, q_s, k_s, q_t, k_t, n, call.d_s, call.d_t, call.scale_s, call.scale_t};
      const double total = gram.total(call.form == kGram);
      if (total >= 0.0) {
        if (grad_q.data != nullptr) gram.gradients(real.of(b), factor, grad_q, grad_k);
        return total;
      }
    }
    return tiled();
  }

 private:
  double tiled() {
    const bool gradients = grad_q.data != nullptr;
    pack_as_columns(k_s, n, call.d_s, s.keys_s);
    pack_as_columns(k_t, n, call.d_t, s.keys_t);
    if (gradients) pack_as_rows(k_s, n, call.d_s, s.key_rows);
    // Keys are packed once per head; blocks of queries outermost, so dq of a block is done after its keys, and dk
    // gathers in scratch, [n, d_s] float32.
    double total = 0.0;
    for (int64_t row = 0; row < n; row += kBlockRows) {
      const int64_t rows = least(kBlockRows, n - row);
      copy_operand(rows_of(q_s, row), rows, call.d_s, s.q_s, s.stride_s);
      copy_operand(rows_of(q_t, row), rows, call.d_t, s.q_t, s.stride_t);
      if (gradients) store_rows_right(rows_of(q_s, row), rows, call.d_s, kBlockRows, s.tile_s, s.right);
      for (int64_t key = 0; key < n; key += kKeyBlock) {
        const int64_t keys = least(kKeyBlock, n - key);
        total += scores(rows, key, keys, gradients);
        if (gradients) accumulate(rows, key, keys, row > 0);
      }
      if (gradients) put(s.dq, row, rows, grad_q);
    }
    if (gradients) put(s.dk, 0, n, grad_k);
    return total;
  }

  // D of a block, left in d and left; its sum of squares.
  double scores(int64_t rows, int64_t key, int64_t keys, bool gradients) {
    double total = 0.0;
    for_tiles(rows, keys, [&](int64_t r, int count, int64_t c) {
      product(s.q_s, s.stride_s, r, count, s.keys_s, call.d_s, key + c, key + c + kTileColumns, kZeros, s.tile_s);
      product(s.q_t, s.stride_t, r, count, s.keys_t, call.d_t, key + c, key + c + kTileColumns, kZeros, s.tile_t);
      // columns past the last key are products with zeros on both sides: their difference is 0
      total += static_cast<double>(difference(s.tile_s, s.tile_t, count, call.scale_s, call.scale_t));
      if (!gradients) return;
      store_operand(s.tile_s, count, keys - c, s.d + r * s.stride_d + operand_column(c), s.stride_d);
      if (!kLeftIsOperand) store_left(s.tile_s, count, r, c, rows, keys_per_block, kBlockRows, s.left);
    });
    return total;
  }

  // dq += D k_s, dk += D^T q_s.
  void accumulate(int64_t rows, int64_t key, int64_t keys, bool more_rows) {
    const Element* packed = row_block(s.key_rows, key, call.d_s);
    for_tiles(rows, call.d_s, [&](int64_t r, int count, int64_t c) {
      product(s.d, s.stride_d, r, count, packed, keys, c, call.d_s, kZeros, s.tile_s);
      if (key == 0)
        store_block(s.dq + r * s.width + c, s.width, count, s.tile_s);
      else
        add_block(s.dq + r * s.width + c, s.width, count, s.tile_s);
    });
    for (int64_t c = 0; c < call.d_s; c += kTileColumns)
      outer(s.left, keys_per_block, s.right, rows, kBlockRows, 0, keys, c, s.width - c, s.dk + key * s.width,
            s.width, more_rows);
  }

  void put(const float* values, int64_t row, int64_t rows, const View& to) {
    for (int64_t r = 0; r < rows; ++r)
      put_row(to, real.of(b)[row + r], values + r * s.width, call.d_s, static_cast<float>(2.0 * factor * call.scale_s));
  }
};

struct ScoreShared {
  RealTokens real;
  double* sums;  // per task, so that their sum does not depend on the schedule
  void carve(Carver& c, const ScoreCall& call) {
    real.carve(c, call.mask);
    sums = c.take<double>(call.layers * call.mask.batch * call.heads);
  }
};

inline int score_mse(ScoreCall& call) {
  ScoreShared shared;
  if (!carve(kShared, shared, call)) return 1;
  shared.real.fill(call.mask);
  double pairs = 0.0;
  for (int64_t b = 0; b < call.mask.batch; ++b)
    pairs += static_cast<double>(shared.real.count[b]) * static_cast<double>(shared.real.count[b]);
  const double share = pairs > 0.0 ? 1.0 / (pairs * static_cast<double>(call.heads)) : 0.0;
  const bool gaps = has_gaps(call.mask), gradients = call.layer[0].grad_q.data != nullptr;
  const int64_t per_layer = call.mask.batch * call.heads, tasks = call.layers * per_layer;
  auto task = [&](int64_t t) {
    ScoreScratch scratch_head;
    if (!carve(kPrivate, scratch_head, call, gaps, gradients)) {
      call.failed = 1;
      return;
    }
    const ProductScope scope;
    const int64_t b = t % per_layer / call.heads, h = t % call.heads;
    shared.sums[t] = ScoreHead{call, call.layer[t / per_layer], scratch_head, shared.real, b, h, share}.run();
  };
  parallel_tasks(tasks, task);
  double total = 0.0;
  for (int64_t t = 0; t < tasks && !call.failed; ++t) total += shared.sums[t];
  *call.loss = static_cast<float>(total * share);
  return call.failed;
}
