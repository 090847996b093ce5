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
  float *z;  // LayerNorm's input, then the gradient of x as it gathers
  float* x_room;  // the tile of register X where x is not at hand as tiles
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
    z = c.take<float>(kRows * z_stride);
    x_room = reg[kRegisterX];
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
  const Layer& saved;
  const ChunkOperands& chunk;
  BackwardBlock& block;
  const Needs needs;
  const View x, grad_out, grad_x;  // rows of this block
  const int64_t row, rows, stream;       // row: of the whole call, for dropout
  const int64_t chunk_row;               // first row within the chunk's buffers
  const Sums sums;
  const Widths w = widths_of(call);
  bool x_is_operand = false;  // the weight gradient's operand p is x itself, in tiles: the interpreter reads it there

  void run() {
    if (kLeftIsOperand) {
      block.dh = chunk.left1 + chunk_row * block.stride1;
      block.dy = chunk.left2 + chunk_row * block.stride2;
    }
    x_is_operand = kRightIsTile && needs.w1 && call.program.segment[kPre].value == kRegisterX;
    // Row by row first: LayerNorm's gradient needs whole rows. What follows runs panel by panel, weights outermost.
    for_row_groups(rows, [&](int64_t r, int n) {
      if (x_is_operand)
        for (int64_t c = 0; c < call.hidden; c += kTileColumns) load_tile(x, r, c, n, call.hidden, operand_tile(r, c));
      if (call.has_ln) layer_norm(r, n);
      if (needs.second) post(r, n);
    });
    if (!needs.second) return;
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
  float* operand_tile(int64_t r, int64_t c) const { return right_tile(chunk_row + r, c, chunk.capacity, chunk.right1); }

  // Register X.
  void load_x(int64_t r, int n, int64_t c) {
    block.reg.tile[kRegisterX] = x_is_operand && c < call.hidden ? operand_tile(r, c) : block.x_room;
    if (block.reg.tile[kRegisterX] == block.x_room) load_tile(x, r, c, n, call.hidden, block.x_room);
  }

  void restore(const View& v, int64_t r, int n, int64_t c, int32_t to) {
    restore_tile(v, row + r, c, n, call.tokens, reg(to));
  }

  // X, and the products' results: A is y (y1 = h when parallel), B is y2 = y.
  void load_post_inputs(const SegmentCode& s, int64_t r, int n, int64_t c) {
    const bool parallel = call.program.parallel;
    if (reads(s, kRegisterX)) load_x(r, n, c);
    if (reads(s, kRegisterA)) restore(parallel ? saved.h : saved.y, r, n, c, kRegisterA);
    if (reads(s, kRegisterB)) restore(saved.y, r, n, c, kRegisterB);
  }

  // block.z = LayerNorm's input, then its input gradient: the residual's share of dx.
  void layer_norm(int64_t r, int n) {
    float* z = block.z + r * block.z_stride;
    for (int64_t c = 0; c < call.hidden; c += kTileColumns) {
      if (saved.sum.data == nullptr) {
        again_sum(r, n, c, z + c);
      } else if (saved.sum.dtype == kFloat32) {
        restore_to_rows<float>(r, n, c, z + c);
      } else {
        restore_to_rows<bf16>(r, n, c, z + c);
      }
    }
    if (grad_out.dtype == kFloat32)
      through_norm(z, static_cast<const float*>(grad_out.data) + r * grad_out.stride, r, n);
    else
      through_norm(z, static_cast<const bf16*>(grad_out.data) + r * grad_out.stride, r, n);
  }

  // A saved tile into rows; the next panel's is asked for, which hardware does not foresee.
  template <class T>
  void restore_to_rows(int64_t r, int n, int64_t c, float* to) {
    const int64_t columns = saved_columns(saved.sum, c),
                  after = least(c + kTileColumns, padded_width(call.hidden) - kTileColumns);
    for_saved_groups(n, [&](int64_t first, int rows) {
      const T* from = static_cast<const T*>(saved.sum.data) + saved_at(saved.sum, row + r + first, c, call.tokens);
      const T* next = static_cast<const T*>(saved.sum.data) + saved_at(saved.sum, row + r + first, after, call.tokens);
      for (int i = 0; i < rows; ++i, from += columns, next += kTileColumns, to += block.z_stride)
        for (int64_t j = 0; j < kTileColumns; j += kLanes) {
          __builtin_prefetch(next + j);
          store(to + j, columns == kTileColumns ? load(from + j)
                        : columns > j           ? load_part(from + j, columns - j)
                                                : zero());
        }
    });
  }

  // x + dropout(post(x, y))
  void again_sum(int64_t r, int n, int64_t c, float* to) {
    const SegmentCode& s = segment(kPost);
    load_post_inputs(s, r, n, c);
    if (!reads(s, kRegisterX)) load_x(r, n, c);
    block.reg.run(s, n, c, call.hidden);
    const float* value = reg(s.value);
    if (call.drop_threshold != 0) value = dropped(value, r, n, c);
    add_to_block(reg(kRegisterX), value, to, block.z_stride, n);
  }

  template <class T>
  void through_norm(float* z, const T* g, int64_t r, int n) {
    const RowStats* s = stats_of(saved.stats) + row + r;
    int i = 0;
    for (; i + 4 <= n; i += 4)
      normalize_rows_backward<4>(z + i * block.z_stride, block.z_stride, g + i * grad_out.stride, grad_out.stride,
                                 call.hidden, s + i, packed.ln_weight, sums.weight, sums.bias);
    for (; i < n; ++i)
      normalize_rows_backward<1>(z + i * block.z_stride, 0, g + i * grad_out.stride, 0, call.hidden, s + i,
                                 packed.ln_weight, sums.weight, sums.bias);
  }

  // `tile` through the dropout mask, in the register G.
  const float* dropped(const float* tile, int64_t r, int n, int64_t c) {
    float* g = reg(kRegisterG);
    if (tile != g) copy_tile(tile, n, g);
    drop_tile(g, n, row + r, c, stream, call);
    return g;
  }

  // dy (dy1 and dy2) into operands and column sums; post's gradient for x into block.z.
  void post(int64_t r, int n) {
    const SegmentCode& s = segment(kPostBwd);
    // A tile of dz comes out of block.z, and the tile of dx that replaces it keeps gathering: dz is the residual's
    // share.
    for (int64_t c = 0; c < call.hidden; c += kTileColumns) {
      float* g = reg(kRegisterG);
      float* dx = block.z + r * block.z_stride + c;
      if (call.has_ln) {
        load_block(dx, block.z_stride, n, g);
        if (call.drop_threshold != 0) dropped(g, r, n, c);
      } else {
        load_tile(grad_out, r, c, n, call.hidden, g);
        clear_block(dx, block.z_stride, n);
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
    }
  }

  void multiply_first(int64_t r, int n, int64_t c, float* tile) {
    product(block.dh, block.stride1, r, n, packed.w1, w.out1, c, w.in1, kZeros, tile);
  }
  void multiply_second(int64_t r, int n, int64_t c, float* tile) {
    product(block.dy, block.stride2, r, n, packed.w2, w.out2, c, w.in2, kZeros, tile);
  }

  // Serial: dm = dy @ w2, then dh, m and mid's gradient for x.
  void inner() {
    if (!needs.first && !needs.w2) return;
    const SegmentCode& s = segment(!needs.first ? kMid : needs.w2 ? kMidBwdv : kMidBwd);
    // A tile of dm is used up while it is in L1: mid's gradient turns it into dh, and where dw2 is wanted the same
    // segment gives m again (bwdv), which forward did not save.
    const auto multiply = [&](int n, int64_t c, float* to) {
      if (needs.first) multiply_second(0, n, c, to);
    };
    for_products(rows, w.out1, block.reg, kRegisterG, multiply, [&](int64_t r, int n, int64_t c) {
      if (reads(s, kRegisterX)) load_x(r, n, c);
      if (reads(s, kRegisterA)) restore(saved.h, r, n, c, kRegisterA);
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
    // The last product of the layer: its tile of dx is added to what gathered in block.z and goes to the caller.
    const auto multiply = [&](int n, int64_t c, float* to) {
      if (needs.dx) multiply_first(0, n, c, to);
    };
    for_products(rows, w.in1, block.reg, kRegisterG, multiply, [&](int64_t r, int n, int64_t c) {
      of_input(s, r, n, c, needs.w1, w.in1, chunk.right1);
      if (needs.dx) store_dx(reg(s.dx), r, n, c);
    });
  }

  // The two branches of the parallel form, both functions of x alone.
  void input_of_parallel() {
    const SegmentCode& pre = segment(!needs.dx ? kPre : needs.w1 ? kPreBwdv : kPreBwd);
    const SegmentCode& mid = segment(!needs.dx ? kMid : needs.w2 ? kMidBwdv : kMidBwd);
    for_tiles(rows, call.hidden, [&](int64_t r, int n, int64_t c) {
      if (needs.dx) multiply_first(r, n, c, reg(kRegisterG));
      if (needs.dx || needs.w1) of_input(pre, r, n, c, needs.w1, w.in1, chunk.right1);
      if (needs.dx) add_to_dx(reg(pre.dx), r, n, c, call.hidden);
      if (needs.dx) multiply_second(r, n, c, reg(kRegisterG));
      if (needs.dx || needs.w2) of_input(mid, r, n, c, needs.w2, w.in2, chunk.right2);
      if (needs.dx) store_dx(reg(mid.dx), r, n, c);
    });
  }

  // One tile of a product's operand that is a function of x alone: runs `s`, and keeps its value, if asked, as an
  // operand of the weight gradient.
  void of_input(const SegmentCode& s, int64_t r, int n, int64_t c, bool keep, int64_t width, Element* right) {
    if (reads(s, kRegisterX)) load_x(r, n, c);
    block.reg.run(s, n, c, call.hidden);
    if (keep && !(x_is_operand && right == chunk.right1))
      store_right(reg(s.value), n, chunk_row + r, c, width - c, chunk.capacity, right);
  }

  // A tile of dh (keep_second: of dy) has three readers: db1, a column sum; the product with w1, row by row; and dw1,
  // whose product runs over the tokens of the whole chunk and wants another layout unless the two agree.
  void keep_first(const float* tile, int64_t r, int n, int64_t c) {
    add_column_sums(tile, n, sums.b1 + c);
    store_operand(tile, n, w.out1 - c, block.dh + r * block.stride1 + operand_column(c), block.stride1);
    if (!kLeftIsOperand && needs.w1)
      store_left(tile, n, chunk_row + r, c, w.out1 - c, w.out1, chunk.capacity, chunk.left1);
  }
  void keep_second(const float* tile, int64_t r, int n, int64_t c) {
    add_column_sums(tile, n, sums.b2 + c);
    store_operand(tile, n, w.out2 - c, block.dy + r * block.stride2 + operand_column(c), block.stride2);
    if (!kLeftIsOperand && needs.w2)
      store_left(tile, n, chunk_row + r, c, w.out2 - c, w.out2, chunk.capacity, chunk.left2);
  }

  // block.z += tile in the columns below `width` that x has; under `truncate` mid covers fewer than a whole tile's.
  void add_to_dx(const float* tile, int64_t r, int n, int64_t c, int64_t width) {
    const int64_t columns = least(width - c, kTileColumns);
    float* to = block.z + r * block.z_stride + c;
    for (int i = 0; i < n; ++i, to += block.z_stride, tile += kTileColumns)
      for (int64_t j = 0; j < columns; j += kLanes)
        store_part(to + j, load_part(to + j, columns - j) + load_part(tile + j, columns - j), columns - j);
  }

  // grad_x = block.z + tile
  void store_dx(const float* tile, int64_t r, int n, int64_t c) {
    if (grad_x.dtype == kFloat32)
      store_dx_as(static_cast<float*>(grad_x.data), tile, r, n, c);
    else
      store_dx_as(static_cast<bf16*>(grad_x.data), tile, r, n, c);
  }
  template <class T>
  void store_dx_as(T* out, const float* tile, int64_t r, int n, int64_t c) {
    const float* z = block.z + r * block.z_stride + c;
    const int64_t columns = least(call.hidden - c, kTileColumns);
    out += r * grad_x.stride + c;
    for (int i = 0; i < n; ++i, out += grad_x.stride, z += block.z_stride, tile += kTileColumns)
      for (int64_t j = 0; j < columns; j += kLanes)
        store_part(out + j, load(z + j) + load(tile + j), columns - j);
  }
};
