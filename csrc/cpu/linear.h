// Linear layers of an inference pass. Included inside an ISA namespace.
//
//     out_i = x @ w_i.T + b_i                                  layers of one x, which is read and packed once
//     out   = LayerNorm(residual + x @ w.T + b)                one layer, its rows normalized while in cache
//
// As in forward.h a block of rows stays in cache while the packed weights go by.
//
// Of few tokens the threads share the panels of the weights, not the rows: each reads its part of the weights once. (128
// tokens, 540 x 540 in float32 on AMX, two threads: by rows no faster than one.)

constexpr int64_t kFewRows = 256;

// Operand rows of x, and rows of LayerNorm's input.
struct LinearRows {
  Element* x;
  float* z;
  int64_t stride, z_stride;

  void carve(Carver& c, const LinearCall& call, int64_t rows) {
    stride = operand_stride(call.inputs);
    z_stride = padded_width(call.layer[0].outputs);
    x = c.take<Element>(rows * stride);
    z = c.take<float>(call.residual.data == nullptr ? 0 : rows * z_stride);
  }
};

struct LinearShared {
  Element* w[kMaxLinears];
  float* b[kMaxLinears];
  float *ln_weight, *ln_bias;
  LinearRows all;  // of few tokens

  void carve(Carver& c, const LinearCall& call) {
    for (int64_t l = 0; l < call.layers; ++l) {
      w[l] = packed_or_room(call.layer[l].packed, c, call.layer[l].outputs, call.inputs);
      b[l] = c.take<float>(padded_width(call.layer[l].outputs));
    }
    ln_weight = c.take<float>(padded_width(call.layer[0].outputs));
    ln_bias = c.take<float>(padded_width(call.layer[0].outputs));
    all.carve(c, call, call.tokens <= kFewRows ? call.tokens + kTileRows : 0);
  }
};

struct LinearTiles {
  float *product, *old;
  void carve(Carver& c) {
    product = c.take<float>(kTileFloats);
    old = c.take<float>(kTileFloats);
  }
};
struct LinearBlock {
  LinearRows rows;
  LinearTiles tiles;

  void carve(Carver& c, const LinearCall& call) {
    rows.carve(c, call, kBlockRows + kTileRows);
    tiles.carve(c);
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

struct Linear {
  LinearCall& call;
  LinearShared shared;

  int run() {
    if (!carve(kShared, shared, call)) return 1;
    pack_linears(call, shared);
    call.tokens <= kFewRows ? by_panels() : by_rows();
    return call.failed;
  }

 private:
  void by_rows() {
    const int64_t step = block_rows(call.tokens);
    auto task = [&](int64_t t) {
      LinearBlock block;
      if (!carve(kPrivate, block, call)) {
        call.failed = 1;
        return;
      }
      const int64_t row = t * step, rows = least(step, call.tokens - row);
      read(block.rows, row, rows);
      multiply(block.rows, block.tiles, row, rows, 0, all_panels());
      normalize(block.rows, row, rows);
    };
    parallel_tasks((call.tokens + step - 1) / step, task);
  }

  void by_panels() {
    const int64_t groups = (call.tokens + kTileRows - 1) / kTileRows, total = all_panels();
    const int64_t share = (total + num_threads() - 1) / num_threads();
    const auto group = [&](int64_t t) { return part(shared.all, t * kTileRows); };
    const auto rows_of_group = [&](int64_t t) { return least(kTileRows, call.tokens - t * kTileRows); };
    auto read_task = [&](int64_t t) { read(group(t), t * kTileRows, rows_of_group(t)); };
    auto multiply_task = [&](int64_t t) {
      LinearTiles tiles;
      if (!carve(kPrivate, tiles)) {
        call.failed = 1;
        return;
      }
      multiply(shared.all, tiles, 0, call.tokens, t * share, least(total, (t + 1) * share));
    };
    auto normalize_task = [&](int64_t t) { normalize(group(t), t * kTileRows, rows_of_group(t)); };
    parallel_tasks(groups, read_task);
    parallel_tasks((total + share - 1) / share, multiply_task);
    if (call.residual.data != nullptr && !call.failed) parallel_tasks(groups, normalize_task);
  }

  static LinearRows part(LinearRows rows, int64_t first) {
    rows.x += first * rows.stride;
    if (rows.z != nullptr) rows.z += first * rows.z_stride;
    return rows;
  }
  int64_t all_panels() const {
    int64_t count = 0;
    for (int64_t l = 0; l < call.layers; ++l) count += panels(call.layer[l].outputs);
    return count;
  }

  void read(const LinearRows& to, int64_t row, int64_t rows) const {
    copy_operand(rows_of(call.x, row), rows, call.inputs, to.x, to.stride);
  }
  // Panels [begin, end), counted through all layers, of rows [row, row + rows).
  void multiply(const LinearRows& block, const LinearTiles& tiles, int64_t row, int64_t rows, int64_t begin,
                int64_t end) const {
    const ProductScope scope;
    int64_t first = 0;
    for (int64_t l = 0; l < call.layers; first += panels(call.layer[l].outputs), ++l) {
      const LinearLayer& layer = call.layer[l];
      const int64_t last = least(end, first + panels(layer.outputs));
      for (int64_t p = most(begin, first); p < last; ++p)
        for_row_groups(rows, [&](int64_t r, int n) { tile(l, block, tiles, row, r, n, (p - first) * kTileColumns); });
    }
  }
  void tile(int64_t l, const LinearRows& block, const LinearTiles& tiles, int64_t row, int64_t r, int n, int64_t c) const {
    const LinearLayer& layer = call.layer[l];
    product(block.x, block.stride, r, n, shared.w[l], call.inputs, c, layer.outputs, shared.b[l] + c, tiles.product);
    if (call.residual.data == nullptr) return store_tile(layer.out, row + r, c, n, layer.outputs, tiles.product);
    load_tile(call.residual, row + r, c, n, layer.outputs, tiles.old);
    add_to_block(tiles.product, tiles.old, block.z + r * block.z_stride + c, block.z_stride, n);
  }
  void normalize(const LinearRows& block, int64_t row, int64_t rows) const {
    if (call.residual.data == nullptr) return;
    normalize_rows(block.z, block.z_stride, rows, call.layer[0].outputs, call.eps, shared.ln_weight, shared.ln_bias,
                   rows_of(call.layer[0].out, row), nullptr);
  }
};

inline int linear(LinearCall& call) {
  if (call.tokens == 0) return 0;
  return Linear{call, {}}.run();
}
