// Linear layers of an inference pass on codes; the calls of linear.h, whose threads share the work in the same way.
// Included inside an ISA namespace.

constexpr int64_t kFewCodeRows = 64;

struct CodeLinearShared {
  float* b[kMaxLinears];
  float *ln_weight, *ln_bias;
  Code* x;  // all rows, where threads share panels
  RowCode* row;

  static bool shares_panels(const LinearCall& call) {
    return call.tokens <= kFewCodeRows && call.residual.data == nullptr && num_threads() > 1;
  }
  void carve(Carver& c, const LinearCall& call) {
    for (int64_t l = 0; l < call.layers; ++l) b[l] = c.take<float>(padded_width(call.layer[l].outputs));
    ln_weight = c.take<float>(padded_width(call.layer[0].outputs));
    ln_bias = c.take<float>(padded_width(call.layer[0].outputs));
    const int64_t rows = shares_panels(call) ? call.tokens + kTileRows : 0;
    x = c.take<Code>(rows * code_stride(call.inputs));
    row = c.take<RowCode>(rows);
  }
};

struct CodeLinearBlock {
  Code* x;
  RowCode* row;
  int32_t* panel[2];
  float* z;
  int64_t z_stride;

  void carve(Carver& c, const LinearCall& call, int64_t most_rows) {
    const int64_t rows = round_up(most_rows, kTileRows);
    z_stride = padded_width(call.layer[0].outputs);
    x = c.take<Code>(rows * code_stride(call.inputs));
    row = c.take<RowCode>(rows);
    for (int32_t*& p : panel) p = c.take<int32_t>(rows * kTileColumns);
    z = c.take<float>(call.residual.data == nullptr ? 0 : rows * z_stride);
  }
};

inline const float* float_row(const View& v, int64_t row) {
  return static_cast<const float*>(v.data) + row * v.stride;
}

template <class Row>
inline void write_rows(Row row, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) row.run();
}

// Rows [row, row + rows) of all layers.
inline void code_linear_block(const LinearCall& call, const CodeLinearShared& shared, CodeLinearBlock& block,
                              int64_t row, int64_t rows) {
  quantize_rows(call.x, row, rows, call.inputs, block.x, block.row);
  for (int64_t l = 0; l < call.layers; ++l) {
    const LinearLayer& layer = call.layer[l];
    const PackedCodes w(layer.packed, layer.outputs, call.inputs);
    const auto each = [&](const auto& row_of) {
      for_sums(block.panel, rows, block.x, block.row, call.inputs, w, layer.outputs, shared.b[l], row_of);
    };
    const int64_t at = row * layer.out.stride;
    if (call.residual.data == nullptr && layer.out.dtype == kFloat32)
      each([&](int64_t c, const SumsRow& sums) {
        return OutRow<float>{sums, static_cast<float*>(layer.out.data) + at + c, layer.out.stride, layer.outputs - c};
      });
    else if (call.residual.data == nullptr)
      each([&](int64_t c, const SumsRow& sums) {
        return OutRow<bf16>{sums, static_cast<bf16*>(layer.out.data) + at + c, layer.out.stride, layer.outputs - c};
      });
    else
      each([&](int64_t c, const SumsRow& sums) {
        return AddRow<Identity>{
            sums,          float_row(call.residual, row) + c, call.residual.stride, layer.outputs - c, block.z + c,
            block.z_stride};
      });
  }
  if (call.residual.data != nullptr)
    normalize_rows(block.z, block.z_stride, rows, call.layer[0].outputs, call.eps, shared.ln_weight, shared.ln_bias,
                   rows_of(call.layer[0].out, row), nullptr);
}

// All rows of every thread's share of the panels, counted through all layers.
inline int code_linear_by_panels(LinearCall& call, const CodeLinearShared& shared) {
  quantize_rows(call.x, 0, call.tokens, call.inputs, shared.x, shared.row);
  int64_t total = 0;
  for (int64_t l = 0; l < call.layers; ++l) total += panels(call.layer[l].outputs);
  const int64_t share = (total + num_threads() - 1) / num_threads();
  auto task = [&](int64_t t) {
    const CodeScope scope;
    alignas(64) int32_t sums[round_up(kFewCodeRows, kTileRows) * kTileColumns];
    int64_t l = 0, first = 0;  // the layer of panel p, and its first panel
    for (int64_t p = t * share; p < least(total, (t + 1) * share); ++p) {
      while (p >= first + panels(call.layer[l].outputs)) first += panels(call.layer[l++].outputs);
      const LinearLayer& layer = call.layer[l];
      const PackedCodes w(layer.packed, layer.outputs, call.inputs);
      const int64_t c = (p - first) * kTileColumns;
      code_product(shared.x, code_stride(call.inputs), call.tokens, w, call.inputs, c, layer.outputs, sums,
                   SumsWork<NoRow>{});
      const SumsRow from{sums, shared.row, w.sums + c, w.scale + c, shared.b[l] + c};
      if (layer.out.dtype == kFloat32)
        write_rows(OutRow<float>{from, static_cast<float*>(layer.out.data) + c, layer.out.stride, layer.outputs - c},
                   call.tokens);
      else
        write_rows(OutRow<bf16>{from, static_cast<bf16*>(layer.out.data) + c, layer.out.stride, layer.outputs - c},
                   call.tokens);
    }
  };
  parallel_tasks((total + share - 1) / share, task);
  return 0;
}

inline int code_linear(LinearCall& call) {
  if (call.tokens == 0) return 0;
  CodeLinearShared shared;
  if (!carve(kShared, shared, call)) return 1;
  for (int64_t l = 0; l < call.layers; ++l)
    load_vector(call.layer[l].b, call.layer[l].outputs, padded_width(call.layer[l].outputs), shared.b[l]);
  load_vector(call.ln_weight, call.layer[0].outputs, padded_width(call.layer[0].outputs), shared.ln_weight);
  load_vector(call.ln_bias, call.layer[0].outputs, padded_width(call.layer[0].outputs), shared.ln_bias);
  if (CodeLinearShared::shares_panels(call)) return code_linear_by_panels(call, shared);
  const int64_t step = block_rows(call.tokens);
  auto task = [&](int64_t t) {
    CodeLinearBlock block;
    if (!carve(kPrivate, block, call, step)) {
      call.failed = 1;
      return;
    }
    const CodeScope scope;
    code_linear_block(call, shared, block, t * step, least(step, call.tokens - t * step));
  };
  parallel_tasks((call.tokens + step - 1) / step, task);
  return call.failed;
}
