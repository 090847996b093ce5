// Forward of a stack: a block of rows passes through every layer while it is in cache. Included inside an ISA
// namespace.
//
//   per layer and block:  P = pre(x);  for each panel: h = P @ w1.T + b1, M = mid(x, h);
//                         for each panel: y = M @ w2.T + b2, Z = x + dropout(post(x, y));  LayerNorm on the rows of Z
//
// Only P, M and Z of one block exist, in scratch; h and y go to memory when they are saved for backward.

struct ForwardBlock {
  Registers reg;
  Element *first, *second;  // operands of the two products
  float* z;                 // LayerNorm's input
  char* between;            // a layer's output when nobody saves it, in x's dtype
  int64_t stride1, stride2, z_stride;

  void carve(Carver& c, const Call& call) {
    const Widths w = widths_of(call);
    constexpr int64_t kRows = kBlockRows + kTileRows;
    reg.carve(c);
    stride1 = operand_stride(w.in1);
    stride2 = operand_stride(w.in2);
    z_stride = padded_width(w.out2);
    first = c.take<Element>(kRows * stride1);
    second = c.take<Element>(kRows * stride2);
    z = c.take<float>(kRows * z_stride);
    between = c.take<char>(kRows * call.hidden * 4);
  }
};

struct ForwardLayer {
  const Call& call;
  const PackedLayer& packed;
  ForwardBlock& block;
  View x, out, h, y;  // rows of this block
  int64_t row;        // of the whole call, for dropout
  int64_t rows, stream;

  void run() {
    const Program& program = call.program;
    const Widths w = widths_of(call);
    fill_operand(program.segment[kPre], block.reg, x, rows, w.in1, block.first, block.stride1);
    if (program.parallel)
      fill_operand(program.segment[kMid], block.reg, x, rows, w.in2, block.second, block.stride2);
    else
      first_product(w);
    second_product(w);
    if (call.has_ln) normalize(w.out2);
  }

 private:
  void multiply_tile(const Element* a, int64_t stride, const Element* weight, const float* bias, int64_t depth,
                     int64_t width, int64_t r, int n, int64_t c, const View& save, float* tile) {
    product(a + r * stride, stride, n, weight + c / kTileColumns * panel_elements(depth), depth, width - c, tile);
    add_bias(tile, bias + c, n);
    if (save.data != nullptr) store_tile(save, r, c, n, width, tile);
  }

  void first_product(const Widths& w) {
    const SegmentCode& mid = call.program.segment[kMid];
    Registers& reg = block.reg;
    for (int64_t c = 0; c < w.out1; c += kTileColumns)
      for_row_groups(rows, [&](int64_t r, int n) {
        multiply_tile(block.first, block.stride1, packed.w1, packed.b1, w.in1, w.out1, r, n, c, h, reg[kRegisterA]);
        if (reads(mid, kRegisterX)) load_tile(x, r, c, n, call.hidden, reg[kRegisterX]);
        reg.run(mid, n, c, call.hidden);
        store_operand(reg[mid.value], n, w.out1 - c, block.second + r * block.stride2 + c, block.stride2);
      });
  }

  void second_product(const Widths& w) {
    const SegmentCode& post = call.program.segment[kPost];
    const bool parallel = call.program.parallel;
    Registers& reg = block.reg;
    const int32_t last = parallel ? kRegisterB : kRegisterA;
    for (int64_t c = 0; c < w.out2; c += kTileColumns)
      for_row_groups(rows, [&](int64_t r, int n) {
        if (parallel)
          multiply_tile(block.first, block.stride1, packed.w1, packed.b1, w.in1, w.out1, r, n, c, h, reg[kRegisterA]);
        multiply_tile(block.second, block.stride2, packed.w2, packed.b2, w.in2, w.out2, r, n, c, y, reg[last]);
        if (call.has_ln || reads(post, kRegisterX)) load_tile(x, r, c, n, call.hidden, reg[kRegisterX]);
        reg.run(post, n, c, call.hidden);
        float* value = reg[post.value];
        if (!call.has_ln) {
          store_tile(out, r, c, n, w.out2, value);
          return;
        }
        residual(value, r, n, c);
      });
  }

  // Z = x + dropout(value)
  void residual(float* value, int64_t r, int n, int64_t c) {
    const float* x_tile = block.reg[kRegisterX];
    float* sum = block.z + r * block.z_stride + c;
    if (call.drop_threshold != 0) {
      if (value == x_tile) value = copy_tile(value, n);
      drop_tile(value, n, row + r, c, stream, call);
    }
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < kTileColumns; j += kLanes) {
        const int at = i * kTileColumns + j;
        store(sum + i * block.z_stride + j, load(x_tile + at) + load(value + at));
      }
  }

  float* copy_tile(const float* tile, int n) {
    float* to = block.reg[kNumInputs];
    for (int i = 0; i < n * kTileColumns; i += kLanes) store(to + i, load(tile + i));
    return to;
  }

  void normalize(int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
      float* z = block.z + r * block.z_stride;
      normalize_row(z, width, row_stats(z, width, call.eps), packed.ln_weight, packed.ln_bias);
      store_vector(rows_of(out, r), width, z);
    }
  }
};

// Rows [row, row + rows) through all layers.
inline void forward_block(const Call& call, const PackedLayer* packed, ForwardBlock& block, int64_t row, int64_t rows) {
  View x = rows_of(call.x, row);
  for (int64_t l = 0; l < call.layers; ++l) {
    View out = rows_of(call.out, row);
    if (l + 1 < call.layers) {
      const View& saved = call.layer[l + 1].z;
      out = saved.data != nullptr ? rows_of(saved, row) : View{block.between, call.hidden, call.x.dtype};
    }
    const Layer& layer = call.layer[l];
    ForwardLayer{call, packed[l], block, x, out, rows_of(layer.h, row), rows_of(layer.y, row), row, rows, l}.run();
    x = out;
  }
}

struct ForwardShared {
  PackedLayer* packed;
  void carve(Carver& c, const Call& call) {
    packed = c.take<PackedLayer>(call.layers);
    PackedLayer sizes;
    for (int64_t l = 0; l < call.layers; ++l) (packed == nullptr ? sizes : packed[l]).carve(c, widths_of(call), true);
  }
};

inline int forward(Call& call) {
  if (call.tokens == 0) return 0;
  ForwardShared shared;
  if (!carve(kShared, shared, call)) return 1;
  pack_layers(call, shared.packed, true);
  const int64_t step = block_rows(call.tokens);
  auto task = [&](int64_t t) {
    ForwardBlock block;
    if (!carve(kPrivate, block, call)) {
      call.failed = 1;
      return;
    }
    forward_block(call, shared.packed, block, t * step, least(step, call.tokens - t * step));
  };
  parallel_tasks((call.tokens + step - 1) / step, task);
  return call.failed;
}
