// Backward of one layer on one block of rows: phase 1 of backward.h, which says what is left where. Included inside an
// ISA namespace.
//
//   Z = x + dropout(post(x, y)); its rows become LayerNorm's input gradient dz          (only with LayerNorm)
//   dy, dx   = post_bwd(x, y, dropout(dz)); dx += dz
//   dh, dx, m += mid_bwdv(x, h, dy @ w2)             serial
//   dx, p     += pre_bwdv(x, dh @ w1)
//   dx, p1, p2 += pre_bwdv(x, dy1 @ w1), mid_bwdv(x, dy2 @ w2)   parallel: h, y hold y1, y2; dh, dy are dy1, dy2

// Column sums of one block, or in the end of one layer.
struct Sums {
  float *b1, *b2, *weight, *bias;
  static int64_t size(const Call& call) {
    return padded_width(widths_of(call).out1) + 3 * padded_width(call.hidden);
  }
  Sums(float* base, const Call& call) {
    b1 = base;
    b2 = b1 + padded_width(widths_of(call).out1);
    weight = b2 + padded_width(call.hidden);
    bias = weight + padded_width(call.hidden);
  }
};

// Operands of the weight gradients over a chunk of tokens: dw1 = left1.T @ right1, dw2 = left2.T @ right2.
struct ChunkOperands {
  Element *left1, *right1, *left2, *right2;
  int64_t capacity;

  void carve(Carver& c, const Widths& w, int64_t chunk) {
    capacity = chunk;
    left1 = c.take<Element>(left_elements(chunk + kTileRows, w.out1));
    right1 = c.take<Element>(right_elements(chunk, w.in1));
    left2 = c.take<Element>(left_elements(chunk + kTileRows, w.out2));
    right2 = c.take<Element>(right_elements(chunk, w.in2));
  }
};

// Scratch of one thread.
struct BackwardBlock {
  Registers reg;
  Element *dh, *dy;  // row-block operands of the products with w1 and w2; the left operands where those have the layout
  float *z, *dx, *g_row;
  int64_t stride1, stride2, z_stride;

  void carve(Carver& c, const Call& call) {
    const Widths w = widths_of(call);
    constexpr int64_t kRows = kBlockRows + kTileRows;
    reg.carve(c);
    stride1 = operand_stride(w.out1);
    stride2 = operand_stride(w.out2);
    z_stride = padded_width(call.hidden);
    dh = kLeftIsOperand ? nullptr : c.take<Element>(kRows * stride1);
    dy = kLeftIsOperand ? nullptr : c.take<Element>(kRows * stride2);
    z = c.take<float>(call.has_ln ? kRows * z_stride : 0);
    dx = c.take<float>(kRows * z_stride);
    g_row = c.take<float>(z_stride);
  }
};

// Which gradients of a layer are wanted, and what follows from that.
struct Needs {
  bool dx, w1, w2, first, second;  // first: the gradient of w1's product is needed (for w1, b1 or dx); second: of w2's

  Needs(const Layer& layer, bool need_dx) {
    dx = need_dx;
    w1 = layer.grad_w1.data != nullptr;
    w2 = layer.grad_w2.data != nullptr;
    first = dx || w1 || layer.grad_b1.data != nullptr;
    second = first || w2 || layer.grad_b2.data != nullptr;
  }
};

struct BackwardLayer {
  const Call& call;
  const PackedLayer& packed;
  const ChunkOperands& chunk;
  BackwardBlock& block;
  const Needs needs;
  const View x, h, y, grad_out, grad_x;  // rows of this block
  const int64_t row, rows, stream;       // row: of the whole call, for dropout
  const int64_t chunk_row;               // first row within the chunk's buffers
  const Sums sums;
  const Widths w = widths_of(call);

  void run() {
    if (kLeftIsOperand) {
      block.dh = chunk.left1 + chunk_row * block.stride1;
      block.dy = chunk.left2 + chunk_row * block.stride2;
    }
    if (call.has_ln) layer_norm();
    if (!needs.second) return;
    post();
    if (call.program.parallel) {
      input_of_parallel();
    } else {
      inner();
      input();
    }
  }

 private:
  const SegmentCode& segment(Segment s) const { return call.program.segment[s]; }
  float* reg(int32_t r) const { return block.reg[r]; }

  // X, and the products' results: A is y (y1 = h when parallel), B is y2 = y.
  void load_post_inputs(const SegmentCode& s, int64_t r, int n, int64_t c) {
    const bool parallel = call.program.parallel;
    if (reads(s, kRegisterX)) load_tile(x, r, c, n, call.hidden, reg(kRegisterX));
    if (reads(s, kRegisterA)) load_tile(parallel ? h : y, r, c, n, call.hidden, reg(kRegisterA));
    if (reads(s, kRegisterB)) load_tile(y, r, c, n, call.hidden, reg(kRegisterB));
  }

  // block.z = LayerNorm's input, then its input gradient.
  void layer_norm() {
    const SegmentCode& s = segment(kPost);
    for (int64_t c = 0; c < call.hidden; c += kTileColumns)
      for_row_groups(rows, [&](int64_t r, int n) {
        load_post_inputs(s, r, n, c);
        block.reg.run(s, n, c, call.hidden);
        float* to = block.z + r * block.z_stride + c;
        store_block(to, block.z_stride, n, reg(s.value));
        float* tile = reg(kNumInputs);
        load_block(to, block.z_stride, n, tile);
        if (call.drop_threshold != 0) drop_tile(tile, n, row + r, c, stream, call);
        float* x_tile = reg(kRegisterX);
        if (!reads(s, kRegisterX)) load_tile(x, r, c, n, call.hidden, x_tile);
        add_tile(tile, x_tile, n);
        store_block(to, block.z_stride, n, tile);
      });
    for (int64_t r = 0; r < rows; ++r) {
      float* z = block.z + r * block.z_stride;
      load_vector(rows_of(grad_out, r), call.hidden, block.z_stride, block.g_row);
      normalize_row_backward(z, block.g_row, call.hidden, row_stats(z, call.hidden, call.eps), packed.ln_weight,
                             sums.weight, sums.bias);
    }
  }

  // dy (dy1 and dy2) into operands and column sums; block.dx = dz + post's gradient for x.
  void post() {
    const SegmentCode& s = segment(kPostBwd);
    for (int64_t c = 0; c < call.hidden; c += kTileColumns)
      for_row_groups(rows, [&](int64_t r, int n) {
        float* g = reg(kRegisterG);
        float* dx = block.dx + r * block.z_stride + c;
        if (call.has_ln) {
          load_block(block.z + r * block.z_stride + c, block.z_stride, n, g);
          if (needs.dx) store_block(dx, block.z_stride, n, g);
          if (call.drop_threshold != 0) drop_tile(g, n, row + r, c, stream, call);
        } else {
          load_tile(grad_out, r, c, n, call.hidden, g);
          if (needs.dx) clear_block(dx, n);
        }
        load_post_inputs(s, r, n, c);
        block.reg.run(s, n, c, call.hidden);
        if (needs.dx && s.dx != kNone) add_to_dx(reg(s.dx), r, n, c, call.hidden);
        if (call.program.parallel) {
          keep_first(reg(s.da), r, n, c);
          keep_second(reg(s.db), r, n, c);
        } else {
          keep_second(reg(s.da), r, n, c);
        }
      });
  }

  // Serial: dm = dy @ w2, then dh, m and mid's gradient for x.
  void inner() {
    if (!needs.first && !needs.w2) return;
    const SegmentCode& s = segment(!needs.first ? kMid : needs.w2 ? kMidBwdv : kMidBwd);
    for (int64_t c = 0; c < w.out1; c += kTileColumns)
      for_row_groups(rows, [&](int64_t r, int n) {
        if (needs.first)
          product(block.dy + r * block.stride2, block.stride2, n, packed.w2 + c / kTileColumns * panel_elements(w.out2),
                  w.out2, w.in2 - c, reg(kRegisterG));
        if (reads(s, kRegisterX)) load_tile(x, r, c, n, call.hidden, reg(kRegisterX));
        if (reads(s, kRegisterA)) load_tile(h, r, c, n, w.out1, reg(kRegisterA));
        block.reg.run(s, n, c, call.hidden);
        if (needs.first) keep_first(reg(s.da), r, n, c);
        if (needs.dx && s.dx != kNone) add_to_dx(reg(s.dx), r, n, c, least(w.out1, call.hidden));
        if (needs.w2) store_right(reg(s.value), n, chunk_row + r, c, w.in2 - c, chunk.capacity, chunk.right2);
      });
  }

  // Serial: dp = dh @ w1, then p and the total gradient of x.
  void input() {
    if (!needs.dx && !needs.w1) return;
    const SegmentCode& s = segment(!needs.dx ? kPre : needs.w1 ? kPreBwdv : kPreBwd);
    for (int64_t c = 0; c < w.in1; c += kTileColumns)
      for_row_groups(rows, [&](int64_t r, int n) {
        through_first(s, r, n, c);
        if (needs.dx) store_dx(r, n, c);
      });
  }

  void input_of_parallel() {
    const SegmentCode& pre = segment(!needs.dx ? kPre : needs.w1 ? kPreBwdv : kPreBwd);
    const SegmentCode& mid = segment(!needs.dx ? kMid : needs.w2 ? kMidBwdv : kMidBwd);
    for (int64_t c = 0; c < call.hidden; c += kTileColumns)
      for_row_groups(rows, [&](int64_t r, int n) {
        if (needs.dx || needs.w1) through_first(pre, r, n, c);
        if (needs.dx || needs.w2) {
          if (needs.dx)
            product(block.dy + r * block.stride2, block.stride2, n,
                    packed.w2 + c / kTileColumns * panel_elements(w.out2), w.out2, w.in2 - c, reg(kRegisterG));
          if (reads(mid, kRegisterX)) load_tile(x, r, c, n, call.hidden, reg(kRegisterX));
          block.reg.run(mid, n, c, call.hidden);
          if (needs.dx) add_to_dx(reg(mid.dx), r, n, c, call.hidden);
          if (needs.w2) store_right(reg(mid.value), n, chunk_row + r, c, w.in2 - c, chunk.capacity, chunk.right2);
        }
        if (needs.dx) store_dx(r, n, c);
      });
  }

  // One tile of w1's input: its gradient through `pre` into block.dx, its value into the weight gradient's operand.
  void through_first(const SegmentCode& s, int64_t r, int n, int64_t c) {
    if (needs.dx)
      product(block.dh + r * block.stride1, block.stride1, n, packed.w1 + c / kTileColumns * panel_elements(w.out1),
              w.out1, w.in1 - c, reg(kRegisterG));
    if (reads(s, kRegisterX)) load_tile(x, r, c, n, call.hidden, reg(kRegisterX));
    block.reg.run(s, n, c, call.hidden);
    if (needs.dx) add_to_dx(reg(s.dx), r, n, c, call.hidden);
    if (needs.w1) store_right(reg(s.value), n, chunk_row + r, c, w.in1 - c, chunk.capacity, chunk.right1);
  }

  void keep_first(const float* tile, int64_t r, int n, int64_t c) {
    add_column_sums(tile, n, sums.b1 + c);
    store_operand(tile, n, w.out1 - c, block.dh + r * block.stride1 + c, block.stride1);
    if (!kLeftIsOperand && needs.w1)
      store_left(tile, n, chunk_row + r, c, w.out1 - c, w.out1, chunk.capacity, chunk.left1);
  }
  void keep_second(const float* tile, int64_t r, int n, int64_t c) {
    add_column_sums(tile, n, sums.b2 + c);
    store_operand(tile, n, w.out2 - c, block.dy + r * block.stride2 + c, block.stride2);
    if (!kLeftIsOperand && needs.w2)
      store_left(tile, n, chunk_row + r, c, w.out2 - c, w.out2, chunk.capacity, chunk.left2);
  }

  void clear_block(float* p, int n) {
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < kTileColumns; j += kLanes) store(p + i * block.z_stride + j, zero());
  }

  // block.dx += tile in the columns below `width` that x has; under `truncate` mid covers fewer than a whole tile's.
  void add_to_dx(const float* tile, int64_t r, int n, int64_t c, int64_t width) {
    const int64_t columns = least(width - c, kTileColumns);
    float* to = block.dx + r * block.z_stride + c;
    for (int i = 0; i < n; ++i, to += block.z_stride, tile += kTileColumns)
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int valid = static_cast<int>(least(columns - j, kLanes));
        if (valid == kLanes)
          store(to + j, load(to + j) + load(tile + j));
        else
          storen(to + j, loadn(to + j, valid) + loadn(tile + j, valid), valid);
      }
  }

  void store_dx(int64_t r, int n, int64_t c) {
    float* tile = reg(kRegisterG);
    load_block(block.dx + r * block.z_stride + c, block.z_stride, n, tile);
    store_tile(grad_x, r, c, n, call.hidden, tile);
  }
};
