// Attention and the score loss, backward. Included inside an ISA namespace.
//
// Saved are q, k, v, the context and lse; scores, probabilities and the teacher's scores are computed again. With m the
// dropout factors (0 or 1 / (1 - p)) and g the gradient of the loss:
//     P = exp(s - lse),   dP = m (dO v^T),   delta = row sums of dO context,
//     dS = P (dP - delta) + (2 g / pairs) (s - scale_t q_t k_t^T)            (the second term at real queries only)
//     dq = scale dS k,   dk = scale dS^T q,   dv = (P m)^T dO
// The loss adds one product, q_t k_t^T, to the five of attention, and nothing to what is saved. Rejected: its gradients
// at once in forward, as losses_score.h has them: two products more, and two tensors kept until backward.

struct AttentionBackwardScratch {
  Element *keys, *keys_t, *values, *key_rows;  // k, k_t and v as columns, k as rows
  Element *q, *q_t, *grad, *ds;                // row operands of a block of queries
  Element *left_s, *left_p, *right_q, *right_grad;
  float *tile, *other, *factors, *teacher, *dq, *dk, *dv, *delta, *room[4];
  int64_t stride, stride_t, stride_s, width;

  void carve(Carver& c, const AttentionCall& call, bool gaps) {
    const int64_t n = call.mask.length, block = least(kKeyBlock, round_up(n, kTileColumns));
    constexpr int64_t kRows = kBlockRows + kTileRows;
    stride = operand_stride(call.d);
    stride_t = operand_stride(call.d_t);
    stride_s = operand_stride(block);
    width = padded_width(call.d);
    keys = c.take<Element>(columns_elements(n, call.d));
    keys_t = c.take<Element>(columns_elements(n, call.d_t));
    values = c.take<Element>(columns_elements(n, call.d));
    key_rows = c.take<Element>(rows_elements(n, call.d));
    q = c.take<Element>(kRows * stride);
    q_t = c.take<Element>(kRows * stride_t);
    grad = c.take<Element>(kRows * stride);
    ds = c.take<Element>(kRows * stride_s);
    left_s = kLeftIsOperand ? ds : c.take<Element>(left_elements(kRows, block));
    left_p = c.take<Element>(left_elements(kRows, block));
    right_q = c.take<Element>(right_elements(kBlockRows, call.d));
    right_grad = c.take<Element>(right_elements(kBlockRows, call.d));
    tile = c.take<float>(kTileFloats);
    other = c.take<float>(kTileFloats);
    factors = c.take<float>(kTileFloats);
    teacher = c.take<float>(kTileFloats);
    dq = c.take<float>(kBlockRows * width);
    dk = c.take<float>(round_up(n, kTileColumns) * width);
    dv = c.take<float>(round_up(n, kTileColumns) * width);
    delta = c.take<float>(kBlockRows);
    for (float*& r : room) r = gaps ? c.take<float>(n * most(call.d, call.d_t) + kLanes) : nullptr;
  }
};

struct AttentionBackward : AttentionHead {
  AttentionBackwardScratch& s;
  const float loss_factor;  // 2 g / pairs
  View q = head_of(call.q, b, h), q_t = head_of(call.q_t, b, h), context = head_of(call.context, b, h);
  View grad = head_of(call.grad_context, b, h);
  int64_t keys_per_block = least(kKeyBlock, round_up(call.mask.length, kTileColumns));

  AttentionBackward(const AttentionCall& c, const RealTokens& tokens, int64_t task, AttentionBackwardScratch& room,
                    float f)
      : AttentionHead(c, tokens, task), s(room), loss_factor(f) {}

  void run() {
    const View grad_q = head_of(call.grad_q, b, h), grad_k = head_of(call.grad_k, b, h),
               grad_v = head_of(call.grad_v, b, h);
    clear_padding(grad_k, real, b, call.d);
    clear_padding(grad_v, real, b, call.d);
    if (n == 0) {
      for (int64_t i = 0; i < length(); ++i) clear_row(grad_q, i, call.d);
      return;
    }
    pack();
    // Queries outermost: dq of a block is done when its keys are through, dk and dv gather over all blocks in scratch,
    // [n, d] float32 each. One thread has the whole head, so nothing is added by two.
    for (int64_t row = 0; row < length(); row += kBlockRows) {
      const int64_t rows = least(kBlockRows, length() - row);
      load_block_of_queries(row, rows);
      for (int64_t key = 0; key < n; key += kKeyBlock) {
        const int64_t keys = least(kKeyBlock, n - key);
        score_gradients(row, rows, key, keys);
        accumulate(rows, key, keys, row > 0);
      }
      for (int64_t r = 0; r < rows; ++r) put_row(grad_q, row + r, s.dq + r * s.width, call.d, call.scale);
    }
    for (int64_t k = 0; k < n; ++k) {
      put_row(grad_k, real.of(b)[k], s.dk + k * s.width, call.d, call.scale);
      put_row(grad_v, real.of(b)[k], s.dv + k * s.width, call.d, 1.0f);
    }
  }

 private:
  void pack() {
    const View k = real_rows(call.k, b, h, real, call.d, s.room[0]);
    pack_as_columns(k, n, call.d, s.keys);
    pack_as_rows(k, n, call.d, s.key_rows);
    pack_as_columns(real_rows(call.v, b, h, real, call.d, s.room[1]), n, call.d, s.values);
    if (with_loss()) pack_as_columns(real_rows(call.k_t, b, h, real, call.d_t, s.room[2]), n, call.d_t, s.keys_t);
  }

  void load_block_of_queries(int64_t row, int64_t rows) {
    copy_operand(rows_of(q, row), rows, call.d, s.q, s.stride);
    copy_operand(rows_of(grad, row), rows, call.d, s.grad, s.stride);
    if (with_loss()) copy_operand(rows_of(q_t, row), rows, call.d_t, s.q_t, s.stride_t);
    store_rows_right(rows_of(q, row), rows, call.d, kBlockRows, s.tile, s.right_q);
    store_rows_right(rows_of(grad, row), rows, call.d, kBlockRows, s.tile, s.right_grad);
    // delta[r] = dO[r] . context[r] is the sum over keys of P dP, whatever dropout did: no pass over the scores for it.
    for (int64_t r = 0; r < rows; ++r) s.delta[r] = 0.0f;
    for_tiles_by_rows(rows, call.d, [&](int64_t r, int count, int64_t c) {
      load_tile(rows_of(grad, row), r, c, count, call.d, s.tile);
      load_tile(rows_of(context, row), r, c, count, call.d, s.other);
      for (int i = 0; i < count; ++i) {
        F total = zero();
        for (int j = i * kTileColumns; j < (i + 1) * kTileColumns; j += kLanes)
          total = fma(load(s.tile + j), load(s.other + j), total);
        s.delta[r + i] += sum(total);
      }
    });
  }

  // dS as operand and left operand, dropped P as left operand, of a block of queries and keys.
  void score_gradients(int64_t row, int64_t rows, int64_t key, int64_t keys) {
    // Two products per tile, q k^T and dO v^T (a third for the teacher), element-wise work on them while they are in
    // L1, and the results stored as operands of the three products of accumulate().
    for_tiles(rows, keys, [&](int64_t r, int count, int64_t c) {
      const int64_t column = key + c, end = column + kTileColumns;
      product(s.q, s.stride, r, count, s.keys, call.d, column, end, kZeros, s.tile);
      product(s.grad, s.stride, r, count, s.values, call.d, column, end, kZeros, s.other);
      if (compares())
        product(s.q_t, s.stride_t, r, count, s.keys_t, call.d_t, column, end, kZeros, s.teacher);
      float* p = probabilities(row, r, count, column, keys - c);
      store_operand(s.tile, count, keys - c, s.ds + r * s.stride_s + operand_column(c), s.stride_s);
      if (!kLeftIsOperand) store_left(s.tile, count, r, c, rows, keys_per_block, kBlockRows, s.left_s);
      store_left(p, count, r, c, rows, keys_per_block, kBlockRows, s.left_p);
    });
  }

  // From raw scores in `tile`, the teacher's in `teacher` and dO v^T in `other`: dS in `tile`; returns the dropped P.
  // Past the last key all are 0.
  float* probabilities(int64_t row, int64_t r, int count, int64_t column, int64_t keys_left) {
    const bool dropout = call.dropout.drop_threshold != 0;
    if (dropout) {
      for (int i = 0; i < count * kTileColumns; i += kLanes) store(s.factors + i, set1(1.0f));
      drop(s.factors, count, row + r, column);
    }
    if (keys_left < kTileColumns) fill_tail(s.tile, count, keys_left, kNoScore);
    const bool compared = compares();
    const F scale = set1(call.scale), scale_t = set1(call.scale_t);
    for (int i = 0; i < count; ++i) {
      const float factor = compared && call.mask.real[b * length() + row + r + i] != 0 ? loss_factor : 0.0f;
      const F lse_row = set1(lse()[row + r + i]), delta = set1(s.delta[r + i]), a = set1(factor);
      for (int j = i * kTileColumns; j < (i + 1) * kTileColumns; j += kLanes) {
        const F score = load(s.tile + j) * scale;
        // P from the saved log-sum-exp, without a maximum: scores are at most lse but for rounding
        const F p = exp_negative(min_second(zero(), score - lse_row));
        F dp = load(s.other + j);
        const F m = dropout ? load(s.factors + j) : set1(1.0f);
        dp = dp * m;
        const F difference = compared ? score - load(s.teacher + j) * scale_t : zero();
        store(s.tile + j, fma(difference, a, p * (dp - delta)));
        store(s.other + j, p * m);
      }
    }
    if (keys_left < kTileColumns) fill_tail(s.tile, count, keys_left, 0.0f);
    return s.other;
  }

  bool compares() const { return with_loss() && loss_factor != 0.0f; }

  // dq += dS k, dk += dS^T q, dv += P^T dO.
  void accumulate(int64_t rows, int64_t key, int64_t keys, bool more_rows) {
    const Element* packed = row_block(s.key_rows, key, call.d);
    for_tiles(rows, call.d, [&](int64_t r, int count, int64_t c) {
      product(s.ds, s.stride_s, r, count, packed, keys, c, call.d, kZeros, s.tile);
      float* to = s.dq + r * s.width + c;
      if (key == 0)
        store_block(to, s.width, count, s.tile);
      else
        add_block(to, s.width, count, s.tile);
    });
    for (int64_t c = 0; c < call.d; c += kTileColumns) {
      outer(s.left_s, keys_per_block, s.right_q, rows, kBlockRows, 0, keys, c, s.width - c, s.dk + key * s.width,
            s.width, more_rows);
      outer(s.left_p, keys_per_block, s.right_grad, rows, kBlockRows, 0, keys, c, s.width - c, s.dv + key * s.width,
            s.width, more_rows);
    }
  }
};

inline int attention_backward(AttentionCall& call) {
  AttentionShared shared;
  if (!carve(kShared, shared, call)) return 1;
  shared.real.fill(call.mask);
  const bool gaps = has_gaps(call.mask);
  const double grad_loss = call.grad_loss == nullptr ? 0.0 : static_cast<double>(*call.grad_loss);
  const float factor = static_cast<float>(2.0 * grad_loss * shared.share(call));
  auto task = [&](int64_t t) {
    AttentionBackwardScratch scratch_head;
    if (!carve(kPrivate, scratch_head, call, gaps)) {
      call.failed = 1;
      return;
    }
    const ProductScope scope;
    AttentionBackward(call, shared.real, t, scratch_head, factor).run();
  };
  parallel_tasks(call.mask.batch * call.heads, task);
  return call.failed;
}
