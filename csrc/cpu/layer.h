// What forward and backward share: packed weights, registers of the interpreter, and the flow of tiles between the
// caller's matrices and a product. Included inside an ISA namespace.

constexpr int64_t kBlockRows = 96;  // rows that pass through a layer while they stay in L2; a multiple of kTileRows

template <class Fn>
inline void parallel_tasks(int64_t tasks, Fn& fn) {
  run_tasks(tasks, [](void* ctx, int64_t task) { (*static_cast<Fn*>(ctx))(task); }, &fn);
}

// Bump allocator over one scratch arena; sizes first (base == nullptr), pointers on the second pass.
struct Carver {
  char* base = nullptr;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    used += (bytes + 63) / 64 * 64;
#ifdef __SANITIZE_ADDRESS__
    if (base != nullptr) __asan_poison_memory_region(base + used, 64);  // make neighbours tell
    used += 64;
#endif
    return base == nullptr ? nullptr : p;
  }
};

// Carves `T` twice: once to learn its size, once to place it. False when out of memory.
template <class T, class... Args>
inline bool carve(Arena arena, T& out, const Args&... args) {
  Carver carver;
  out.carve(carver, args...);
  carver.base = static_cast<char*>(scratch(arena, carver.used + 64));
  if (carver.base == nullptr) return false;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(carver.base, carver.used);
#endif
  carver.used = 0;
  out.carve(carver, args...);
  return true;
}

inline int64_t panels(int64_t width) { return (width + kTileColumns - 1) / kTileColumns; }
inline int64_t padded_width(int64_t width) { return panels(width) * kTileColumns; }

// Widths of the two products, forward: h = p [., in1] @ w1.T, y = m [., in2] @ w2.T.
struct Widths {
  int64_t in1, out1, in2, out2;
};
inline Widths widths_of(const Call& call) {
  return {call.hidden, call.inner, call.inner, call.hidden};  // in the parallel form hidden == inner
}

inline int64_t packed_elements(int64_t outputs, int64_t inputs) { return panels(outputs) * panel_elements(inputs); }
// A weight in panels for forward, where the caller keeps it packed, or room for it.
inline Element* packed_or_room(void* kept, Carver& c, int64_t outputs, int64_t inputs) {
  return kept != nullptr ? static_cast<Element*>(kept) : c.take<Element>(packed_elements(outputs, inputs));
}

// Both weights of one layer in panels, vectors as zero-padded floats.
struct PackedLayer {
  Element *w1, *w2;
  float *b1, *b2, *ln_weight, *ln_bias;

  // transposed: panels over the outputs, for forward; otherwise panels over the inputs, for gradients of operands.
  void carve(Carver& c, const Widths& w, const Layer& layer, bool transposed) {
    w1 = transposed ? packed_or_room(layer.packed1, c, w.out1, w.in1) : c.take<Element>(packed_elements(w.in1, w.out1));
    w2 = transposed ? packed_or_room(layer.packed2, c, w.out2, w.in2) : c.take<Element>(packed_elements(w.in2, w.out2));
    b1 = c.take<float>(padded_width(w.out1));
    b2 = c.take<float>(padded_width(w.out2));
    ln_weight = c.take<float>(padded_width(w.out2));
    ln_bias = c.take<float>(padded_width(w.out2));
  }
};

inline void pack_weight_panel(const View& w, int64_t outputs, int64_t inputs, int64_t p, bool transposed,
                              Element* packed) {
  const int64_t depth = transposed ? inputs : outputs, width = transposed ? outputs : inputs;
  const int64_t first = p * kTileColumns;
  Element* to = packed + p * panel_elements(depth);
  if (w.dtype == kFloat32)
    pack_panel(static_cast<const float*>(w.data), w.stride, depth, first, width - first, transposed, to);
  else
    pack_panel(static_cast<const bf16*>(w.data), w.stride, depth, first, width - first, transposed, to);
}

// Packs every layer, in parallel over panels; the vectors alone without `weights`, and where the caller kept those.
inline void pack_layers(const Call& call, PackedLayer* packed, bool transposed, bool weights) {
  const Widths w = widths_of(call);
  const int64_t first = weights ? panels(transposed ? w.out1 : w.in1) : 0;
  const int64_t second = weights ? panels(transposed ? w.out2 : w.in2) : 0;
  const int64_t per_layer = first + second + 1;
  auto task = [&](int64_t t) {
    const Layer& layer = call.layer[t / per_layer];
    PackedLayer& to = packed[t / per_layer];
    const int64_t p = t % per_layer;
    if (p < first) {
      if (layer.packed1 == nullptr) pack_weight_panel(layer.w1, w.out1, w.in1, p, transposed, to.w1);
    } else if (p < first + second) {
      if (layer.packed2 == nullptr) pack_weight_panel(layer.w2, w.out2, w.in2, p - first, transposed, to.w2);
    } else {
      load_vector(layer.b1, w.out1, padded_width(w.out1), to.b1);
      load_vector(layer.b2, w.out2, padded_width(w.out2), to.b2);
      load_vector(layer.ln_weight, w.out2, padded_width(w.out2), to.ln_weight);
      load_vector(layer.ln_bias, w.out2, padded_width(w.out2), to.ln_bias);
    }
  };
  parallel_tasks(per_layer * call.layers, task);
}

inline int64_t packed_bytes(int64_t tokens, int64_t outputs, int64_t inputs) {
  return tokens <= kSkinnyTokens ? 0 : packed_elements(outputs, inputs) * static_cast<int64_t>(sizeof(Element));
}
inline void pack(const View& w, int64_t outputs, int64_t inputs, void* packed) {
  auto task = [&](int64_t p) { pack_weight_panel(w, outputs, inputs, p, true, static_cast<Element*>(packed)); };
  parallel_tasks(panels(outputs), task);
}

// The interpreter's registers: one tile each; and room for two panels of a product over a block's rows.
struct Registers {
  float* tile[kNumRegisters];
  float* panel[2];

  void carve(Carver& c) {
    for (float*& t : tile) t = c.take<float>(kTileFloats);
    for (float*& p : panel) p = c.take<float>((kBlockRows + kTileRows) * kTileColumns);
  }
  float* operator[](int32_t r) const { return tile[r]; }
  void run(const SegmentCode& s, int rows, int64_t column, int64_t hidden) {
    run_segment(s, tile, rows * kTileColumns, static_cast<int>(column), static_cast<int>(hidden));
  }
};

inline bool reads(const SegmentCode& s, int32_t reg) { return (s.inputs >> reg) & 1u; }

// Calls fn(row, rows) for the row groups of a block: one tile high each.
template <class Fn>
inline void for_row_groups(int64_t rows, Fn&& fn) {
  for (int64_t r = 0; r < rows; r += kTileRows) fn(r, static_cast<int>(least(kTileRows, rows - r)));
}

// Calls fn(row, rows, column) for every tile of a block, columns outermost: a panel of the weight stays in cache while
// the rows go by.
template <class Fn>
inline void for_tiles(int64_t rows, int64_t width, Fn&& fn) {
  for (int64_t c = 0; c < width; c += kTileColumns) for_row_groups(rows, [&](int64_t r, int n) { fn(r, n, c); });
}

// The same where each tile begins with a product: multiply(rows, column, to) does those of all rows of a panel, fn then
// finds its tile in register `reg`. Element-wise work between the products would push their operands out of the L1
// cache: on AMX a tile then took 2800 cycles instead of 1750 (bfloat16, 32 x 540 x 32), 6500 instead of 5700 (float32).
template <class Multiply, class Fn>
inline void for_products(int64_t rows, int64_t width, Registers& registers, int32_t reg, Multiply&& multiply, Fn&& fn) {
  float* own = registers.tile[reg];
  for (int64_t c = 0; c < width; c += kTileColumns) {
    multiply(static_cast<int>(rows), c, registers.panel[0]);
    for_row_groups(rows, [&](int64_t r, int n) {
      registers.tile[reg] = registers.panel[0] + r * kTileColumns;
      fn(r, n, c);
    });
  }
  registers.tile[reg] = own;
}

// The same, rows outermost: what is read from memory for the first time is read in streams.
template <class Fn>
inline void for_tiles_by_rows(int64_t rows, int64_t width, Fn&& fn) {
  for_row_groups(rows, [&](int64_t r, int n) {
    for (int64_t c = 0; c < width; c += kTileColumns) fn(r, n, c);
  });
}

// Rows [first, first + rows) of `v` as a view of their own.
inline View rows_of(const View& v, int64_t first) {
  const int64_t size = v.dtype == kFloat32 ? 4 : 2;
  return {v.data == nullptr ? nullptr : static_cast<char*>(v.data) + first * v.stride * size, v.stride, v.dtype};
}

inline void copy_operand(const View& x, int64_t rows, int64_t width, Element* a, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    if (x.dtype == kFloat32)
      copy_operand_row(static_cast<const float*>(x.data) + r * x.stride, width, a + r * stride);
    else
      copy_operand_row(static_cast<const bf16*>(x.data) + r * x.stride, width, a + r * stride);
}

// Operand rows of an element-wise segment of x alone: value(x), the input of a product.
inline void fill_operand(const SegmentCode& s, Registers& reg, const View& x, int64_t rows, int64_t width, Element* a,
                         int64_t stride) {
  if (s.value == kRegisterX) return copy_operand(x, rows, width, a, stride);
  for_tiles_by_rows(rows, width, [&](int64_t r, int n, int64_t c) {
    load_tile(x, r, c, n, width, reg[kRegisterX]);
    reg.run(s, n, c, width);
    store_operand(reg[s.value], n, width - c, a + r * stride + operand_column(c), stride);
  });
}

// Rows a block should have so that all threads get work and blocks stay within kBlockRows.
inline int64_t block_rows(int64_t tokens) {
  const int64_t share = (tokens + num_threads() - 1) / num_threads();
  return least(kBlockRows, round_up(share, kBlockUnit));
}
