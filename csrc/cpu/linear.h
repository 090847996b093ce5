// Linear layers of an inference pass. Included inside an ISA namespace.
//
//     out_i = x @ w_i.T + b_i                                  layers of one x, which is read and packed once
//     out   = LayerNorm(residual + x @ w.T + b)                one layer, its rows normalized while in cache
//
// As in forward.h a block of rows stays in cache while the packed weights go by.

struct LinearShared {
  Element* w[kMaxLinears];
  float* b[kMaxLinears];
  float *ln_weight, *ln_bias;

  void carve(Carver& c, const LinearCall& call) {
    for (int64_t l = 0; l < call.layers; ++l) {
      w[l] = c.take<Element>(panels(call.layer[l].outputs) * panel_elements(call.inputs));
      b[l] = c.take<float>(padded_width(call.layer[l].outputs));
    }
    ln_weight = c.take<float>(padded_width(call.layer[0].outputs));
    ln_bias = c.take<float>(padded_width(call.layer[0].outputs));
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
    auto task = [&](int64_t p) { pack_weight_panel(layer.w, layer.outputs, call.inputs, p, true, shared.w[l]); };
    parallel_tasks(panels(layer.outputs), task);
    load_vector(layer.b, layer.outputs, padded_width(layer.outputs), shared.b[l]);
  }
  load_vector(call.ln_weight, call.layer[0].outputs, padded_width(call.layer[0].outputs), shared.ln_weight);
  load_vector(call.ln_bias, call.layer[0].outputs, padded_width(call.layer[0].outputs), shared.ln_bias);
}

// Rows [row, row + rows) of all layers.
inline void linear_block(const LinearCall& call, const LinearShared& shared, LinearBlock& block, int64_t row, int64_t rows) {
  copy_operand(rows_of(call.x, row), rows, call.inputs, block.x, block.stride);
  for (int64_t l = 0; l < call.layers; ++l) {
    const LinearLayer& layer = call.layer[l];
    for_tiles(rows, layer.outputs, [&](int64_t r, int n, int64_t c) {
      product(block.x, block.stride, r, n, shared.w[l], call.inputs, c, layer.outputs, shared.b[l] + c, block.tile);
      if (call.residual.data == nullptr) return store_tile(layer.out, row + r, c, n, layer.outputs, block.tile);
      load_tile(call.residual, row + r, c, n, layer.outputs, block.old);
      add_to_block(block.tile, block.old, block.z + r * block.z_stride + c, block.z_stride, n);
    });
  }
  if (call.residual.data != nullptr)
    normalize_rows(block.z, block.z_stride, rows, call.layer[0].outputs, call.eps, shared.ln_weight, shared.ln_bias,
                   rows_of(call.layer[0].out, row), nullptr);
}

inline int linear(LinearCall& call) {
  if (call.tokens == 0) return 0;
  LinearShared shared;
  if (!carve(kShared, shared, call)) return 1;
  pack_linears(call, shared);
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
