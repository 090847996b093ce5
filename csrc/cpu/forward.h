// Forward of a stack: a block of rows passes through every layer while it is in cache. Included inside an ISA
// namespace.
//
//   per layer and block:  P = pre(x);  for each panel: h = P @ w1.T + b1, M = mid(x, h);
//                         for each panel: y = M @ w2.T + b2, Z = x + dropout(post(x, y));  LayerNorm on the rows of Z
//
// Only P, M and Z of one block exist, in scratch; h and y, or Z, go to memory when they are saved for backward.

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

// One layer on the rows of one block.
struct ForwardRows {
  const Call& call;
  const PackedLayer& packed;
  ForwardBlock& block;
  const Layer& layer;
  View x, out;  // rows of this block
  int64_t row;        // of the whole call, for dropout
  int64_t rows, stream;
};

#include "forward_beside.h"

struct ForwardLayer : ForwardRows {
  void run() {
    const Program& program = call.program;
    const Widths w = widths_of(call);
    // P = pre(x), [rows, H]: the left operand of the first product, in its dtype and zero-padded.
    fill_operand(program.segment[kPre], block.reg, x, rows, w.in1, block.first, block.stride1);
    if (program.segment[kPre].value == kRegisterX && operand_is_exact(x.dtype))
      x = {block.first, block.stride1, kOperandType};  // nearer than the caller's, and zero-padded
    // M, [rows, d]: of x alone when parallel, else of the first product's tiles as they leave the accumulators.
    if (program.parallel)
      fill_operand(program.segment[kMid], block.reg, x, rows, w.in2, block.second, block.stride2);
    else if (!first_beside(*this))
      first_product(w);
    if (!second_beside(*this)) second_product(w);
    if (call.has_ln)
      normalize_rows(block.z, block.z_stride, rows, w.out2, call.eps, packed.ln_weight, packed.ln_bias, out,
                     layer.stats.data == nullptr ? nullptr : stats_of(layer.stats) + row);
  }

 private:
  void multiply_first(const Widths& w, int64_t r, int n, int64_t c, float* tile) {
    if (call.tokens <= kSkinnyTokens)
      skinny_product(block.first, block.stride1, r, n, layer.w1, w.in1, c, w.out1, packed.b1 + c, tile);
    else
      product(block.first, block.stride1, r, n, packed.w1, w.in1, c, w.out1, packed.b1 + c, tile);
  }
  void multiply_second(const Widths& w, int64_t r, int n, int64_t c, float* tile) {
    if (call.tokens <= kSkinnyTokens)
      skinny_product(block.second, block.stride2, r, n, layer.w2, w.in2, c, w.out2, packed.b2 + c, tile);
    else
      product(block.second, block.stride2, r, n, packed.w2, w.in2, c, w.out2, packed.b2 + c, tile);
  }

  void first_product(const Widths& w) {
    const SegmentCode& mid = call.program.segment[kMid];
    Registers& reg = block.reg;
    // Columns outermost: a panel of w1 is read once per block, while the block's rows of P stay in L2. A tile of h is
    // in L1 when mid runs over it, and goes to memory only if backward will read it.
    const auto multiply = [&](int n, int64_t c, float* to) { multiply_first(w, 0, n, c, to); };
    for_products(rows, w.out1, reg, kRegisterA, multiply, [&](int64_t r, int n, int64_t c) {
      if (layer.h.data != nullptr) save_tile(layer.h, row + r, c, n, call.tokens, reg[kRegisterA]);
      if (reads(mid, kRegisterX)) load_tile(x, r, c, n, call.hidden, reg[kRegisterX]);
      reg.run(mid, n, c, call.hidden);
      store_operand(reg[mid.value], n, w.out1 - c, block.second + r * block.stride2 + operand_column(c), block.stride2);
    });
  }

  void second_product(const Widths& w) {
    const SegmentCode& post = call.program.segment[kPost];
    const bool parallel = call.program.parallel;
    Registers& reg = block.reg;
    const int32_t last = parallel ? kRegisterB : kRegisterA;
    // As above, with w2. The parallel form needs a tile of both products at once: the first is made here as well.
    const auto multiply = [&](int n, int64_t c, float* to) { multiply_second(w, 0, n, c, to); };
    for_products(rows, w.out2, reg, last, multiply, [&](int64_t r, int n, int64_t c) {
      if (parallel) multiply_first(w, r, n, c, reg[kRegisterA]);
      if (parallel && layer.h.data != nullptr) save_tile(layer.h, row + r, c, n, call.tokens, reg[kRegisterA]);
      if (layer.y.data != nullptr) save_tile(layer.y, row + r, c, n, call.tokens, reg[last]);
      if (call.has_ln || reads(post, kRegisterX)) load_tile(x, r, c, n, call.hidden, reg[kRegisterX]);
      reg.run(post, n, c, call.hidden);
      if (call.has_ln)
        residual(reg[post.value], r, n, c);
      else
        store_tile(out, r, c, n, w.out2, reg[post.value]);
    });
  }

  // Z = x + dropout(value), [rows, H] float32: LayerNorm needs whole rows, so it waits for all panels. Where Z is saved
  // (its gradient does not read y) the saved one is written here, tile by tile.
  void residual(float* value, int64_t r, int n, int64_t c) {
    const float* x_tile = block.reg[kRegisterX];
    if (value == x_tile && (call.drop_threshold != 0 || layer.sum.data != nullptr)) {
      value = block.reg[kNumInputs];
      copy_tile(x_tile, n, value);
    }
    if (call.drop_threshold != 0) drop_tile(value, n, row + r, c, stream, call);
    float* z = block.z + r * block.z_stride + c;
    if (layer.sum.data == nullptr) return add_to_block(x_tile, value, z, block.z_stride, n);
    add_tile(value, x_tile, n);
    store_block(z, block.z_stride, n, value);
    save_tile(layer.sum, row + r, c, n, call.tokens, value);
  }
};

// Rows [row, row + rows) through all layers.
inline void forward_block(const Call& call, const PackedLayer* packed, ForwardBlock& block, int64_t row, int64_t rows) {
  // Layers innermost: the block's rows stay in cache from layer to layer, and only what backward reads leaves it.
  View x = rows_of(call.x, row);
  for (int64_t l = 0; l < call.layers; ++l) {
    View out = rows_of(call.out, row);
    if (l + 1 < call.layers) {
      const View& saved = call.layer[l + 1].z;
      out = saved.data != nullptr ? rows_of(saved, row) : View{block.between, call.hidden, call.x.dtype};
    }
    ForwardLayer{{call, packed[l], block, call.layer[l], x, out, row, rows, l}}.run();
    x = out;
  }
}

struct ForwardShared {
  PackedLayer* packed;
  void carve(Carver& c, const Call& call) {
    packed = c.take<PackedLayer>(call.layers);
    PackedLayer sizes;
    for (int64_t l = 0; l < call.layers; ++l)
      (packed == nullptr ? sizes : packed[l]).carve(c, widths_of(call), call.layer[l], true);
  }
};

inline int forward(Call& call) {
  if (call.tokens == 0) return 0;
  ForwardShared shared;
  if (!carve(kShared, shared, call)) return 1;
  // Weights are packed once per call, for all threads; a few tokens are multiplied with them as they lie (skinny.h).
  pack_layers(call, shared.packed, true, call.tokens > kSkinnyTokens);
  const int64_t step = block_rows(call.tokens);
  auto task = [&](int64_t t) {
    ForwardBlock block;
    if (!carve(kPrivate, block, call)) {
      call.failed = 1;
      return;
    }
    const ProductScope scope;
    forward_block(call, shared.packed, block, t * step, least(step, call.tokens - t * step));
    finish_streams();
  };
  parallel_tasks((call.tokens + step - 1) / step, task);
  return call.failed;
}
