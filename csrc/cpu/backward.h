// Backward of a stack. Included inside an ISA namespace.
//
// Tokens are taken in chunks; a chunk goes through the layers from the last to the first. Per layer, two phases:
//   1. in parallel over blocks of rows: gradients down to the layer's input, leaving in the chunk's buffers what the
//      weight gradients need (dy, m, dh, p), and column sums per block (backward_block.h);
//   2. in parallel over rows of the weight gradients: dw2 += dy.T @ m, dw1 += dh.T @ p over the chunk's tokens.
// For a given number of threads the sums always run in the same order, however the tasks are scheduled.
//
// Chosen: chunks, which bound memory to a few MB and need no gradient copy per thread. Rejected: one accumulator per
// thread (memory and a reduction that grow with the threads) and whole-batch buffers (three more activations in
// memory).

constexpr int64_t kGradientRows =
    kMicroRows < 32 ? 4 * kMicroRows : 2 * kMicroRows;  // rows of a weight gradient per task

// Shared by the threads of a call.
struct BackwardShared {
  PackedLayer* packed;
  ChunkOperands chunk;
  float* gradient;            // [chunk, H] between layers
  float *sums, *totals;       // Sums of each block of a chunk, and of each layer
  float **grad_w1, **grad_w2;  // per layer: float32 accumulators, the caller's tensors themselves if they are float32
  int64_t gradient_stride;

  void carve(Carver& c, const Call& call, int64_t rows) {
    const Widths w = widths_of(call);
    packed = c.take<PackedLayer>(call.layers);
    grad_w1 = c.take<float*>(call.layers);
    grad_w2 = c.take<float*>(call.layers);
    PackedLayer no_layer;
    float *none1, *none2;
    for (int64_t l = 0; l < call.layers; ++l) {
      (packed == nullptr ? no_layer : packed[l]).carve(c, w, call.layer[l], false);
      (grad_w1 == nullptr ? none1 : grad_w1[l]) = accumulator(c, call.layer[l].grad_w1, w.out1 * w.in1);
      (grad_w2 == nullptr ? none2 : grad_w2[l]) = accumulator(c, call.layer[l].grad_w2, w.out2 * w.in2);
    }
    chunk.carve(c, w, rows);
    gradient_stride = padded_width(call.hidden);
    gradient = c.take<float>(call.layers > 1 ? (rows + kTileRows) * gradient_stride : 0);
    sums = c.take<float>(Sums::size(call) * (rows / kBlockUnit + 1));
    totals = c.take<float>(Sums::size(call) * call.layers);
  }
  static float* accumulator(Carver& c, const View& v, int64_t elements) {
    return v.data == nullptr || v.dtype == kFloat32 ? static_cast<float*>(v.data) : c.take<float>(elements);
  }
};

struct Backward {
  Call& call;
  BackwardShared shared;
  Widths w = widths_of(call);

  int run() {
    const int64_t rows = chunk_rows();
    if (!carve(kShared, shared, call, rows)) return 1;
    pack_layers(call, shared.packed, false, true);
    clear(shared.totals, Sums::size(call) * call.layers);
    // Chunks outermost: the operands of one chunk's weight gradients are all that exists of them.
    for (int64_t row = 0; row < call.tokens && !call.failed; row += rows)
      for (int64_t l = call.layers - 1; l >= 0; --l) layer(l, row, least(rows, call.tokens - row));
    if (!call.failed) finish();
    return call.failed;
  }

 private:
  static void clear(float* p, int64_t n) { __builtin_memset(p, 0, static_cast<size_t>(n) * sizeof(float)); }

  int64_t chunk_rows() const {
    const int64_t target = most(kChunkRows, kBlockRows * num_threads());
    const int64_t count = (call.tokens + target - 1) / target;
    return round_up((call.tokens + count - 1) / count, kBlockUnit);
  }

  void layer(int64_t l, int64_t row, int64_t rows) {
    // As many blocks as the threads share evenly, none larger than what scratch is made for.
    const int64_t fewest = round_up((rows + kBlockRows - 1) / kBlockRows, num_threads());
    const int64_t step = round_up((rows + fewest - 1) / fewest, kBlockUnit);
    const int64_t blocks = (rows + step - 1) / step;
    const Needs needs(call.layer[l], l > 0 || call.grad_x.data != nullptr);
    auto task = [&](int64_t b) { this->block(l, row, b * step, least(step, rows - b * step), b, needs); };
    parallel_tasks(blocks, task);
    if (call.failed) return;
    weight_gradients(l, needs, rows, row > 0, blocks);
  }

  void block(int64_t l, int64_t chunk_begin, int64_t first, int64_t rows, int64_t index, const Needs& needs) {
    BackwardBlock scratch_block;
    if (!carve(kPrivate, scratch_block, call)) {
      call.failed = 1;
      return;
    }
    const Layer& layer = call.layer[l];
    const int64_t row = chunk_begin + first, size = Sums::size(call);
    const View between{shared.gradient + first * shared.gradient_stride, shared.gradient_stride, kFloat32};
    const View grad_out = l + 1 == call.layers ? rows_of(call.grad_out, row) : between;
    const View grad_x = l == 0 ? rows_of(call.grad_x, row) : between;
    const View x = l == 0 ? rows_of(call.x, row) : rows_of(layer.z, row);
    clear(shared.sums + index * size, size);
    const ProductScope scope;
    BackwardLayer{call, shared.packed[l], layer, shared.chunk, scratch_block, needs, x, grad_out, grad_x, row, rows, l,
                  first, Sums(shared.sums + index * size, call)}
        .run();
  }

  void weight_gradients(int64_t l, const Needs& needs, int64_t tokens, bool accumulate, int64_t blocks) {
    // A task owns kGradientRows rows of one gradient, so no two threads add to one element; one more task adds the
    // blocks' column sums.
    const ChunkOperands& chunk = shared.chunk;
    const int64_t first = needs.w1 ? (w.out1 + kGradientRows - 1) / kGradientRows : 0;
    const int64_t second = needs.w2 ? (w.out2 + kGradientRows - 1) / kGradientRows : 0;
    auto task = [&](int64_t t) {
      if (t < first)
        gradient_rows(chunk.left1, w.out1, chunk.right1, w.in1, tokens, t, shared.grad_w1[l], accumulate);
      else if (t < first + second)
        gradient_rows(chunk.left2, w.out2, chunk.right2, w.in2, tokens, t - first, shared.grad_w2[l], accumulate);
      else
        reduce_sums(l, blocks);
    };
    parallel_tasks(first + second + 1, task);
  }

  void gradient_rows(const Element* left, int64_t rows, const Element* right, int64_t columns, int64_t tokens,
                     int64_t t, float* gradient, bool accumulate) {
    const int64_t i0 = t * kGradientRows, i1 = least(rows, i0 + kGradientRows);
    const ProductScope scope;
    // rows [i0, i1) of left.T @ right, [out, in]: the task's columns of `left` stay in cache while `right` goes by.
    for (int64_t j = 0; j < columns; j += kTileColumns)
      outer(left, rows, right, tokens, shared.chunk.capacity, i0, i1, j, columns - j, gradient, columns, accumulate);
  }

  void reduce_sums(int64_t l, int64_t blocks) {
    const int64_t size = Sums::size(call);
    float* total = shared.totals + l * size;
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t j = 0; j < size; j += kLanes) store(total + j, load(total + j) + load(shared.sums + b * size + j));
  }

  // Vectors, and weight gradients that were accumulated apart, to the caller's tensors.
  void finish() {
    auto task = [&](int64_t l) {
      const Layer& layer = call.layer[l];
      const Sums total(shared.totals + l * Sums::size(call), call);
      put(layer.grad_b1, w.out1, total.b1);
      put(layer.grad_b2, w.out2, total.b2);
      put(layer.grad_ln_weight, call.hidden, total.weight);
      put(layer.grad_ln_bias, call.hidden, total.bias);
      if (layer.grad_w1.dtype != kFloat32) put(layer.grad_w1, w.out1 * w.in1, shared.grad_w1[l]);
      if (layer.grad_w2.dtype != kFloat32) put(layer.grad_w2, w.out2 * w.in2, shared.grad_w2[l]);
    };
    parallel_tasks(call.layers, task);
  }
  static void put(const View& v, int64_t width, const float* values) {
    if (v.data != nullptr) store_vector(v, width, values);
  }
};

inline int backward(Call& call) {
  if (call.tokens == 0) return 0;
  return Backward{call, {}}.run();
}
