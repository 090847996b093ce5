// Linear layers of an inference pass. Included inside an ISA namespace.
//
//     out_i = x @ w_i.T + b_i                                  layers of one x, which is read and packed once
//     out   = LayerNorm(residual + x @ w.T + b)                one layer, its rows normalized while in cache
//
// As in forward.h a block of rows stays in cache while the packed weights go by. Where there are few rows and no
// LayerNorm the threads share the panels of the weights instead: at 16 to 32 rows two threads take 0.7 to 0.95 of the
// time by rows, at 64 rows 0.95. Rejected: the same with LayerNorm, and in forward.h (0.9 at 16 rows, but 1.1 from 128
// rows on): operands then move between the caches of the threads, who wait for each other after every step.

constexpr int64_t kFewRows = 64;

struct LinearShared {
  Element* w[kMaxLinears];
  float* b[kMaxLinears];
  float *ln_weight, *ln_bias;
  Element* x;  // all rows, where threads share panels

  static bool shares_panels(const LinearCall& call) {
    return call.tokens <= kFewRows && call.residual.data == nullptr && num_threads() > 1;
  }
  void carve(Carver& c, const LinearCall& call) {
    for (int64_t l = 0; l < call.layers; ++l) {
      w[l] = packed_or_room(call.layer[l].packed, c, call.layer[l].outputs, call.inputs);
      b[l] = c.take<float>(padded_width(call.layer[l].outputs));
    }
    ln_weight = c.take<float>(padded_width(call.layer[0].outputs));
    ln_bias = c.take<float>(padded_width(call.layer[0].outputs));
    x = c.take<Element>(shares_panels(call) ? (call.tokens + kTileRows) * operand_stride(call.inputs) : 0);
  }
};

struct LinearBlock {
  Element* x;
  float *tile, *z, *old;
  int64_t stride, z_stride;

  void carve(Carver& c, const LinearCall& call) {
    constexpr int64_t kRows = kBlockRows + kTileRows;
    stride = operand_stride(call.inputs);
    z_stride = padded_width(call.layer[0].outputs);
    x = c.take<Element>(kRows * stride);
    tile = c.take<float>(kTileFloats);
    old = c.take<float>(kTileFloats);
    z = c.take<float>(call.residual.data == nullptr ? 0 : kRows * z_stride);
  }
};

inline void pack_linears(const LinearCall& call, LinearShared& shared) {
  for (int64_t l = 0; l < call.layers; ++l) {
    const LinearLayer& layer = call.layer[l];
    if (layer.packed == nullptr) pack(layer.w, layer.outputs, call.inputs, shared.w[l]);
    load_vector(layer.b, layer.outputs, padded_width(layer.outputs), shared.b[l]);
  }
  load_vector(call.ln_weight, call.layer[0].outputs, padded_width(call.layer[0].outputs), shared.ln_weight);
  load_vector(call.ln_bias, call.layer[0].outputs, padded_width(call.layer[0].outputs), shared.ln_bias);
}

// Rows [row, row + rows) of all layers.
inline void linear_block(const LinearCall& call, const LinearShared& shared, LinearBlock& block, int64_t row,
                         int64_t rows) {
  // x once, in the products' dtype, for all layers (q, k and v, say).
  copy_operand(rows_of(call.x, row), rows, call.inputs, block.x, block.stride);
  for (int64_t l = 0; l < call.layers; ++l) {
    const LinearLayer& layer = call.layer[l];
    for_tiles(rows, layer.outputs, [&](int64_t r, int n, int64_t c) {
      product(block.x, block.stride, r, n, shared.w[l], call.inputs, c, layer.outputs, shared.b[l] + c, block.tile);
      if (call.residual.data == nullptr) return store_tile(layer.out, row + r, c, n, layer.outputs, block.tile);
      // LayerNorm needs whole rows: z = residual + product gathers panel by panel, normalized below
      load_tile(call.residual, row + r, c, n, layer.outputs, block.old);
      add_to_block(block.tile, block.old, block.z + r * block.z_stride + c, block.z_stride, n);
    });
  }
  if (call.residual.data != nullptr)
    normalize_rows(block.z, block.z_stride, rows, call.layer[0].outputs, call.eps, shared.ln_weight, shared.ln_bias,
                   rows_of(call.layer[0].out, row), nullptr);
}

// All rows of every thread's share of the panels, counted through all layers.
inline int linear_by_panels(const LinearCall& call, const LinearShared& shared) {
  const int64_t stride = operand_stride(call.inputs);
  copy_operand(call.x, call.tokens, call.inputs, shared.x, stride);
  int64_t total = 0;
  for (int64_t l = 0; l < call.layers; ++l) total += panels(call.layer[l].outputs);
  const int64_t share = (total + num_threads() - 1) / num_threads();
  auto task = [&](int64_t t) {
    const ProductScope scope;
    alignas(64) float tile[kTileFloats];
    int64_t l = 0, first = 0;  // the layer of panel p, and its first panel
    // A panel of the weights is read by one thread only, and once: with so few rows reading it is the work.
    for (int64_t p = t * share; p < least(total, (t + 1) * share); ++p) {
      while (p >= first + panels(call.layer[l].outputs)) first += panels(call.layer[l++].outputs);
      const LinearLayer& layer = call.layer[l];
      const int64_t c = (p - first) * kTileColumns;
      for_row_groups(call.tokens, [&](int64_t r, int n) {
        product(shared.x, stride, r, n, shared.w[l], call.inputs, c, layer.outputs, shared.b[l] + c, tile);
        store_tile(layer.out, r, c, n, layer.outputs, tile);
      });
    }
  };
  parallel_tasks((total + share - 1) / share, task);
  return 0;
}

inline int linear(LinearCall& call) {
  if (call.tokens == 0) return 0;
  LinearShared shared;
  if (!carve(kShared, shared, call)) return 1;
  pack_linears(call, shared);
  if (LinearShared::shares_panels(call)) return linear_by_panels(call, shared);
  const int64_t step = block_rows(call.tokens);
  auto task = [&](int64_t t) {
    LinearBlock block;
    if (!carve(kPrivate, block, call)) {
      call.failed = 1;
      return;
    }
    const ProductScope scope;
    linear_block(call, shared, block, t * step, least(step, call.tokens - t * step));
  };
  parallel_tasks((call.tokens + step - 1) / step, task);
  return call.failed;
}
