// Mean squared error between projected student states and teacher states over real tokens, summed over layers, with its
// gradients. Included inside an ISA namespace.
//
//     D = h_s W^T + b - h_t (real tokens of all layers, one after the other);  loss = sum D^2 / (tokens * H_t)
//     dh_s = c D W,   dW = c D^T h_s,   db = c column sums of D,   c = 2 / (tokens * H_t)
//
// Tokens are taken in chunks, as in backward.h: in parallel over blocks of rows the difference, its sum of squares and
// dh_s; then in parallel over rows of dW its products over the chunk. Only one chunk of D exists, in scratch.
//
// Chosen: gradients at once, in forward. The loss is a scalar, so they are known up to one factor, and D, a third of
// the work, is not computed twice. All layers share W: it is packed once and its gradient accumulated once.

struct HiddenShared {
  RealTokens real;
  int32_t* tokens;  // real tokens of all samples, as sample * S + position
  Element *columns, *rows, *left, *right;  // W both ways packed; D and h_s of a chunk
  float *bias, *grad_weight;
  float *sums, *bias_total;  // column sums of D: of each block of a chunk, [blocks, padded H_t], and of all
  double* squares;                   // per block of all chunks
  int64_t capacity;

  void carve(Carver& c, const HiddenCall& call, int64_t chunk, int64_t blocks, bool gradients) {
    real.carve(c, call.mask);
    tokens = c.take<int32_t>(call.mask.batch * call.mask.length);
    columns = c.take<Element>(panels(call.d_t) * panel_elements(call.d_s));
    bias = c.take<float>(padded_width(call.d_t));
    squares = c.take<double>(blocks);
    capacity = chunk;
    if (!gradients) return;
    rows = c.take<Element>(panels(call.d_s) * panel_elements(call.d_t));
    left = c.take<Element>(left_elements(chunk + kTileRows, call.d_t));
    right = c.take<Element>(right_elements(chunk, call.d_s));
    sums = c.take<float>((chunk / kBlockRows + 1) * padded_width(call.d_t));
    bias_total = c.take<float>(padded_width(call.d_t));
    const bool own = call.grad_weight.data == nullptr || call.grad_weight.dtype == kFloat32;
    grad_weight = own ? static_cast<float*>(call.grad_weight.data) : c.take<float>(call.d_t * call.d_s);
  }
};

struct HiddenScratch {
  Element *h, *d;
  float *tile, *other;
  int64_t stride_h, stride_d;
  void carve(Carver& c, const HiddenCall& call, bool gradients) {
    stride_h = operand_stride(call.d_s);
    stride_d = operand_stride(call.d_t);
    h = c.take<Element>((kBlockRows + kTileRows) * stride_h);
    d = gradients && !kLeftIsOperand ? c.take<Element>((kBlockRows + kTileRows) * stride_d) : nullptr;
    tile = c.take<float>(kTileFloats);
    other = c.take<float>(kTileFloats);
  }
};

// A block's rows in the caller's tensors; real tokens need not be neighbours.
struct HiddenRows {
  View h_s[kBlockRows], h_t[kBlockRows], grad[kBlockRows];
};

inline void load_scattered(const View* row, int rows, int64_t column, int64_t width, float* tile) {
  for (int r = 0; r < rows; ++r) load_tile(row[r], 0, column, 1, width, tile + r * kTileColumns);
}

// d = scale * (projected - teacher); adds d's column sums, returns the sum of squares before scaling.
inline float scaled_difference(float* d, const float* teacher, int rows, float scale, float* sums) {
  F squares[2] = {zero(), zero()};
  for (int j = 0; j < kTileColumns; j += kLanes) {
    F column = zero();
    for (int i = j; i < rows * kTileColumns; i += kTileColumns) {
      const F v = load(d + i) - load(teacher + i);
      squares[i / kTileColumns & 1] = fma(v, v, squares[i / kTileColumns & 1]);
      column = fma(v, set1(scale), column);
      store(d + i, v * set1(scale));
    }
    if (sums != nullptr) store(sums + j, load(sums + j) + column);
  }
  return sum(squares[0] + squares[1]);
}

struct Hidden {
  HiddenCall& call;
  HiddenShared shared = {};
  const bool gradients = call.layer[0].grad.data != nullptr || call.grad_weight.data != nullptr ||
                         call.grad_bias.data != nullptr;
  int64_t per_layer = 0, total = 0;  // real tokens of one layer, of all
  float coefficient = 0.0f;

  int run() {
    const int64_t most_rows = call.layers * call.mask.batch * call.mask.length;
    const int64_t chunk = round_up(least(most_rows, most(2 * kChunkRows, kBlockRows * num_threads())), kBlockRows);
    if (!carve(kShared, shared, call, chunk, most_rows / kBlockRows + call.layers + 1, gradients)) return 1;
    count_tokens();
    pack();
    if (gradients) clear(shared.bias_total, padded_width(call.d_t));
    int64_t blocks = 0;
    for (int64_t row = 0; row < total && !call.failed; row += chunk) {
      const int64_t rows = least(chunk, total - row);
      differences(row, rows, blocks);
      const int64_t count = (rows + kBlockRows - 1) / kBlockRows;
      if (gradients && !call.failed) weight_gradients(row, rows, count);
      blocks += count;
    }
    if (call.failed) return 1;
    double sum = 0.0;
    for (int64_t k = 0; k < blocks; ++k) sum += shared.squares[k];
    *call.loss =
        static_cast<float>(per_layer > 0 ? sum / static_cast<double>(per_layer) / static_cast<double>(call.d_t) : 0.0);
    finish();
    return 0;
  }

 private:
  void count_tokens() {
    shared.real.fill(call.mask);
    for (int64_t b = 0; b < call.mask.batch; ++b)
      for (int64_t i = 0; i < shared.real.count[b]; ++i)
        shared.tokens[per_layer++] = static_cast<int32_t>(b * call.mask.length + shared.real.of(b)[i]);
    total = per_layer * call.layers;
    if (per_layer > 0)
      coefficient = static_cast<float>(2.0 / (static_cast<double>(per_layer) * static_cast<double>(call.d_t)));
  }

  void pack() {
    load_vector(call.bias, call.d_t, padded_width(call.d_t), shared.bias);
    const int64_t first = panels(call.d_t), second = gradients ? panels(call.d_s) : 0;
    auto task = [&](int64_t p) {
      if (p < first)
        pack_weight_panel(call.weight, call.d_t, call.d_s, p, true, shared.columns);
      else
        pack_weight_panel(call.weight, call.d_t, call.d_s, p - first, false, shared.rows);
    };
    parallel_tasks(first + second, task);
  }

  // Row `row` of the real tokens of all layers, in h_s, h_t and grad.
  void locate(int64_t row, HiddenRows& to, int64_t at) const {
    const HiddenLayer& layer = call.layer[row / per_layer];
    const int64_t token = shared.tokens[row % per_layer];
    const int64_t sample = token / call.mask.length, position = token % call.mask.length;
    const auto place = [&](const Heads& t) { return rows_of(head_of(t, sample, 0), position); };
    to.h_s[at] = place(layer.h_s);
    to.h_t[at] = place(layer.h_t);
    if (layer.grad.data != nullptr) to.grad[at] = place(layer.grad);
  }

  void differences(int64_t row, int64_t rows, int64_t first_block) {
    auto task = [&](int64_t k) {
      HiddenScratch s;
      if (!carve(kPrivate, s, call, gradients)) {
        call.failed = 1;
        return;
      }
      const ProductScope scope;
      const int64_t at = k * kBlockRows, count = least(kBlockRows, rows - at);
      shared.squares[first_block + k] = this->block(s, row + at, at, count, k);
    };
    parallel_tasks((rows + kBlockRows - 1) / kBlockRows, task);
  }

  // One block: rows [row, row + rows) of all, [at, ..) of the chunk.
  double block(HiddenScratch& s, int64_t row, int64_t at, int64_t rows, int64_t index) {
    // Real tokens of all layers are one list of rows, so that blocks are full whatever the padding; a row's place in
    // the caller's tensors is looked up once.
    HiddenRows at_rows;
    for (int64_t r = 0; r < rows; ++r) {
      locate(row + r, at_rows, r);
      copy_operand(at_rows.h_s[r], 1, call.d_s, s.h + r * s.stride_h, s.stride_h);
    }
    // A tile of D leaves as operand of D W (d), as left operand of D^T h_s (shared.left), and as column sums.
    Element* d = kLeftIsOperand ? shared.left + at * s.stride_d : s.d;
    float* sums = gradients ? shared.sums + index * padded_width(call.d_t) : nullptr;
    if (gradients) __builtin_memset(sums, 0, static_cast<size_t>(padded_width(call.d_t)) * sizeof(float));
    double total_squares = 0.0;
    for_tiles(rows, call.d_t, [&](int64_t r, int count, int64_t c) {
      product(s.h, s.stride_h, r, count, shared.columns, call.d_s, c, c + kTileColumns, shared.bias + c, s.tile);
      load_scattered(at_rows.h_t + r, count, c, call.d_t, s.other);
      total_squares += static_cast<double>(
          scaled_difference(s.tile, s.other, count, coefficient, gradients ? sums + c : nullptr));
      if (!gradients) return;
      store_operand(s.tile, count, call.d_t - c, d + r * s.stride_d + operand_column(c), s.stride_d);
      if (!kLeftIsOperand) store_left(s.tile, count, at + r, c, rows, call.d_t, shared.capacity, shared.left);
    });
    if (gradients) {
      keep_states(s, at_rows, at, rows);
      if (call.layer[0].grad.data != nullptr) state_gradients(s, at_rows, d, rows);
    }
    return total_squares;
  }

  // h_s as right operand of dW.
  void keep_states(HiddenScratch& s, const HiddenRows& at_rows, int64_t at, int64_t rows) {
    if (call.grad_weight.data == nullptr) return;
    for_tiles_by_rows(rows, call.d_s, [&](int64_t r, int count, int64_t c) {
      load_scattered(at_rows.h_s + r, count, c, call.d_s, s.tile);
      store_right(s.tile, count, at + r, c, call.d_s, shared.capacity, shared.right);
    });
  }

  void state_gradients(HiddenScratch& s, const HiddenRows& at_rows, const Element* d, int64_t rows) {
    for_tiles(rows, call.d_s, [&](int64_t r, int count, int64_t c) {
      product(d, s.stride_d, r, count, shared.rows, call.d_t, c, call.d_s, kZeros, s.tile);
      for (int i = 0; i < count; ++i)
        store_tile(at_rows.grad[r + i], 0, c, 1, call.d_s, s.tile + i * kTileColumns);
    });
  }

  void weight_gradients(int64_t row, int64_t rows, int64_t blocks) {
    const int64_t step = kMicroRows < 32 ? 4 * kMicroRows : 2 * kMicroRows;
    const int64_t first = call.grad_weight.data == nullptr ? 0 : (call.d_t + step - 1) / step;
    auto task = [&](int64_t t) {
      const ProductScope scope;
      if (t == first) return this->bias_gradient(blocks);
      const int64_t i0 = t * step, i1 = least(call.d_t, i0 + step);
      for (int64_t j = 0; j < call.d_s; j += kTileColumns)
        outer(shared.left, call.d_t, shared.right, rows, shared.capacity, i0, i1, j, call.d_s - j, shared.grad_weight,
              call.d_s, row > 0);
    };
    parallel_tasks(first + 1, task);
  }

  void bias_gradient(int64_t blocks) {
    for (int64_t k = 0; k < blocks; ++k)
      for (int64_t j = 0; j < padded_width(call.d_t); j += kLanes)
        store(shared.bias_total + j, load(shared.bias_total + j) + load(shared.sums + k * padded_width(call.d_t) + j));
  }

  // Zeros at padded tokens; gradients that were accumulated apart, to the caller's tensors.
  void finish() {
    if (!gradients) return;
    if (call.grad_bias.data != nullptr) store_vector(call.grad_bias, call.d_t, shared.bias_total);
    if (call.grad_weight.data != nullptr) {
      if (total == 0) clear(shared.grad_weight, call.d_t * call.d_s);
      if (call.grad_weight.dtype != kFloat32) store_vector(call.grad_weight, call.d_t * call.d_s, shared.grad_weight);
    }
    if (call.layer[0].grad.data == nullptr) return;
    auto task = [&](int64_t t) {
      const int64_t b = t % call.mask.batch;
      clear_padding(head_of(call.layer[t / call.mask.batch].grad, b, 0), shared.real, b, call.d_s);
    };
    parallel_tasks(call.layers * call.mask.batch, task);
  }
  static void clear(float* p, int64_t n) { __builtin_memset(p, 0, static_cast<size_t>(n) * sizeof(float)); }
};

inline int hidden_mse(HiddenCall& call) { return Hidden{call}.run(); }
