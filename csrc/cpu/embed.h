// Embeddings: rows of tables, summed and normalized. Included inside an ISA namespace.

inline View row_of(const View& table, int32_t row) { return rows_of(table, row); }

inline void add_row(const View& row, int64_t width, float* sum) {
  for (int64_t j = 0; j < width; j += kLanes) {
    const int64_t left = width - j;
    const F value = row.dtype == kFloat32 ? load_part(static_cast<const float*>(row.data) + j, left)
                                          : load_part(static_cast<const bf16*>(row.data) + j, left);
    store(sum + j, load(sum + j) + value);
  }
}

struct EmbedShared {
  float *weight, *bias;
  void carve(Carver& c, const EmbedCall& call) {
    weight = c.take<float>(padded_width(call.hidden));
    bias = c.take<float>(padded_width(call.hidden));
  }
};
struct EmbedBlock {
  float* z;
  int64_t stride;
  void carve(Carver& c, const EmbedCall& call) {
    stride = padded_width(call.hidden);
    z = c.take<float>(kBlockRows * stride);
  }
};

inline int embed(EmbedCall& call) {
  EmbedShared shared;
  if (!carve(kShared, shared, call)) return 1;
  load_vector(call.ln_weight, call.hidden, padded_width(call.hidden), shared.weight);
  load_vector(call.ln_bias, call.hidden, padded_width(call.hidden), shared.bias);
  const int64_t step = block_rows(call.rows);
  auto task = [&](int64_t t) {
    EmbedBlock block;
    if (!carve(kPrivate, block, call)) {
      call.failed = 1;
      return;
    }
    const int64_t first = t * step, rows = least(step, call.rows - first);
    // Three rows of tables per token, wherever they lie, into a block that LayerNorm then finds in cache.
    for (int64_t r = 0; r < rows; ++r) {
      float* z = block.z + r * block.stride;
      for (int64_t j = 0; j < block.stride; j += kLanes) store(z + j, zero());
      if (call.token.data != nullptr) add_row(row_of(call.token, call.ids[first + r]), call.hidden, z);
      add_row(row_of(call.position, call.positions[first + r]), call.hidden, z);
      add_row(row_of(call.type, call.types[first + r]), call.hidden, z);
      if (call.ln_weight.data == nullptr) put_row(call.out, first + r, z, call.hidden, 1.0f);
    }
    if (call.ln_weight.data != nullptr)
      normalize_rows(block.z, block.stride, rows, call.hidden, call.eps, shared.weight, shared.bias,
                     rows_of(call.out, first), nullptr);
  };
  parallel_tasks((call.rows + step - 1) / step, task);
  return call.failed;
}
