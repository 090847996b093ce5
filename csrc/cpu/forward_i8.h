// Forward of a stack of FFNs on codes, for inference: as forward.h, but the second product's operand is coded when all
// of a row is known, so it stands in floats before. Included inside an ISA namespace.

struct CodeForwardShared {
  struct Vectors {
    float *b1, *b2, *ln_weight, *ln_bias;
  };
  Vectors* layer;

  void carve(Carver& c, const Call& call) {
    const Widths w = widths_of(call);
    layer = c.take<Vectors>(call.layers);
    for (int64_t l = 0; l < call.layers; ++l) {
      Vectors sizes, &to = layer == nullptr ? sizes : layer[l];
      to.b1 = c.take<float>(padded_width(w.out1));
      to.b2 = c.take<float>(padded_width(w.out2));
      to.ln_weight = c.take<float>(padded_width(w.out2));
      to.ln_bias = c.take<float>(padded_width(w.out2));
    }
  }
  void fill(const Call& call) const {
    const Widths w = widths_of(call);
    for (int64_t l = 0; l < call.layers; ++l) {
      const Layer& from = call.layer[l];
      load_vector(from.b1, w.out1, padded_width(w.out1), layer[l].b1);
      load_vector(from.b2, w.out2, padded_width(w.out2), layer[l].b2);
      load_vector(from.ln_weight, w.out2, padded_width(w.out2), layer[l].ln_weight);
      load_vector(from.ln_bias, w.out2, padded_width(w.out2), layer[l].ln_bias);
    }
  }
};

struct CodeForwardBlock {
  Registers reg;
  Code *first, *second;  // operands of the two products
  RowCode *row1, *row2;
  float* m;      // an operand before it is coded
  Range* range;  // of its rows
  int32_t* panel[2];
  float *z, *between;  // LayerNorm's input; what lies between two FFNs
  int64_t m_stride, z_stride;

  void carve(Carver& c, const Call& call, int64_t most_rows) {
    const Widths w = widths_of(call);
    const int64_t rows = round_up(most_rows, kTileRows);
    reg.carve(c);
    m_stride = padded_width(most(w.in1, w.in2));
    z_stride = padded_width(w.out2);
    first = c.take<Code>(rows * code_stride(w.in1));
    second = c.take<Code>(rows * code_stride(w.in2));
    row1 = c.take<RowCode>(rows);
    row2 = c.take<RowCode>(rows);
    m = c.take<float>(rows * m_stride);
    range = c.take<Range>(rows);
    for (int32_t*& p : panel) p = c.take<int32_t>(rows * kTileColumns);
    z = c.take<float>(rows * z_stride);
    between = c.take<float>(rows * z_stride);
  }
};

// m = op(product), and what its rows reach
template <class Op>
struct CodeMidRow {
  SumsRow sums;
  float* m;
  int64_t stride, columns;
  Range* range;
  void run() {
    Range now = *range;
    for (int j = 0; j < kTileColumns; j += kLanes) {
      F v = Op::value(sums.value(j));
      if (columns < kTileColumns) v = keep_lanes(v, static_cast<int>(least(most(columns - j, 0), kLanes)));
      store(m + j, v);
      now.add(v);
    }
    *range = now;
    sums.next();
    m += stride;
    ++range;
  }
};

// The only operator of a segment of the product's result, kOpIdentity where there is none; -1 if it is anything else.
inline int32_t lone_operator(const SegmentCode& s) {
  if (s.count == 0) return s.value == kRegisterA ? kOpIdentity : -1;
  const Instruction& in = s.code[0];
  return s.count == 1 && in.a == kRegisterA && in.dst == s.value ? in.opcode : -1;
}
// fn(Operator{}) for the unary operator `op`; false if it is none.
template <class Fn>
inline bool with_lone_operator(int32_t op, const Fn& fn) {
  switch (op) {
#define FFNAS_CASE(NAME, CODE) \
  case CODE: fn(NAME{}); return true;
    FFNAS_UNARY_OPERATORS(FFNAS_CASE)
#undef FFNAS_CASE
    default: return false;
  }
}

// One layer on the rows of one block.
struct CodeForwardLayer {
  const Call& call;
  const CodeForwardShared::Vectors& vectors;
  CodeForwardBlock& block;
  const PackedCodes w1, w2;
  const float* x;
  int64_t x_stride, rows;
  const View out;

  void run() {
    const Program& program = call.program;
    const Widths w = widths_of(call);
    operand(program.segment[kPre], w.in1, block.first, block.row1);
    if (program.parallel) {
      operand(program.segment[kMid], w.in2, block.second, block.row2);
    } else {
      for (int64_t r = 0; r < rows; ++r) block.range[r] = {zero(), zero()};
      if (!first_beside(w)) first_product(w);
      const int64_t stride = code_stride(w.in2);
      for (int64_t r = 0; r < rows; ++r) {
        const float inverse = code_of(block.range[r], block.row2[r]);
        write_codes(block.m + r * block.m_stride, w.in2, inverse, block.row2[r], block.second + r * stride);
      }
    }
    if (!second_beside(w)) second_product(w);
    normalize_rows(block.z, block.z_stride, rows, w.out2, call.eps, vectors.ln_weight, vectors.ln_bias, out, nullptr);
  }

 private:
  View x_view() const { return {const_cast<float*>(x), x_stride, kFloat32}; }

  // The codes of a segment of x alone.
  void operand(const SegmentCode& s, int64_t width, Code* to, RowCode* row) {
    if (s.value == kRegisterX) return quantize_rows(x, x_stride, rows, width, to, row);
    for_tiles_by_rows(rows, width, [&](int64_t r, int n, int64_t c) {
      load_tile(x_view(), r, c, n, call.hidden, block.reg[kRegisterX]);
      block.reg.run(s, n, c, call.hidden);
      store_block(block.m + r * block.m_stride + c, block.m_stride, n, block.reg[s.value]);
    });
    quantize_rows(block.m, block.m_stride, rows, width, to, row);
  }

  bool first_beside(const Widths& w) {
    return with_lone_operator(lone_operator(call.program.segment[kMid]), [&](auto op) {
      for_sums(block.panel, rows, block.first, block.row1, w.in1, w1, w.out1, vectors.b1,
               [&](int64_t c, const SumsRow& sums) {
                 return CodeMidRow<decltype(op)>{sums, block.m + c, block.m_stride, w.out1 - c, block.range};
               });
    });
  }
  bool second_beside(const Widths& w) {
    return !call.program.parallel && with_lone_operator(lone_operator(call.program.segment[kPost]), [&](auto op) {
      for_sums(block.panel, rows, block.second, block.row2, w.in2, w2, w.out2, vectors.b2,
               [&](int64_t c, const SumsRow& sums) {
                 return AddRow<decltype(op)>{sums, x + c, x_stride, w.out2 - c, block.z + c, block.z_stride};
               });
    });
  }

  // Registers' tiles of a product, a panel at a time: fn(row, rows, column).
  void numbers(const Code* a, const RowCode* row, int64_t depth, const PackedCodes& w, int64_t c, int64_t width,
               const float* bias, int32_t* sums) {
    code_product(a, code_stride(depth), rows, w, depth, c, width, sums, SumsWork<NoRow>{});
    SumsRow from{sums, row, w.sums + c, w.scale + c, bias + c};
    for (int64_t r = 0; r < rows; ++r, from.next())  // in place: floats where the integers were
      for (int j = 0; j < kTileColumns; j += kLanes)
        store(reinterpret_cast<float*>(sums) + r * kTileColumns + j, from.value(j));
  }
  void tile_of(const int32_t* sums, int64_t r, int n, float* tile) const {
    __builtin_memcpy(tile, sums + r * kTileColumns, static_cast<size_t>(n) * kTileColumns * sizeof(float));
  }

  void first_product(const Widths& w) {
    const SegmentCode& mid = call.program.segment[kMid];
    Registers& reg = block.reg;
    for (int64_t c = 0; c < w.out1; c += kTileColumns) {
      numbers(block.first, block.row1, w.in1, w1, c, w.out1, vectors.b1, block.panel[0]);
      for_row_groups(rows, [&](int64_t r, int n) {
        tile_of(block.panel[0], r, n, reg[kRegisterA]);
        if (reads(mid, kRegisterX)) load_tile(x_view(), r, c, n, call.hidden, reg[kRegisterX]);
        reg.run(mid, n, c, call.hidden);
        for (int i = 0; i < n; ++i)
          for (int j = 0; j < kTileColumns; j += kLanes) {
            const F v = keep_lanes(load(reg[mid.value] + i * kTileColumns + j),
                                   static_cast<int>(least(most(w.out1 - c - j, 0), kLanes)));
            store(block.m + (r + i) * block.m_stride + c + j, v);
            block.range[r + i].add(v);
          }
      });
    }
  }

  void second_product(const Widths& w) {
    const SegmentCode& post = call.program.segment[kPost];
    const bool parallel = call.program.parallel;
    Registers& reg = block.reg;
    for (int64_t c = 0; c < w.out2; c += kTileColumns) {
      numbers(block.second, block.row2, w.in2, w2, c, w.out2, vectors.b2, block.panel[0]);
      if (parallel) numbers(block.first, block.row1, w.in1, w1, c, w.out1, vectors.b1, block.panel[1]);
      for_row_groups(rows, [&](int64_t r, int n) {
        tile_of(block.panel[0], r, n, reg[parallel ? kRegisterB : kRegisterA]);
        if (parallel) tile_of(block.panel[1], r, n, reg[kRegisterA]);
        load_tile(x_view(), r, c, n, call.hidden, reg[kRegisterX]);
        reg.run(post, n, c, call.hidden);
        add_to_block(reg[kRegisterX], reg[post.value], block.z + r * block.z_stride + c, block.z_stride, n);
      });
    }
  }
};

inline int code_forward(Call& call) {
  if (call.tokens == 0) return 0;
  CodeForwardShared shared;
  if (!carve(kShared, shared, call)) return 1;
  shared.fill(call);
  const Widths w = widths_of(call);
  const int64_t step = block_rows(call.tokens);
  auto task = [&](int64_t t) {
    CodeForwardBlock block;
    if (!carve(kPrivate, block, call, step)) {
      call.failed = 1;
      return;
    }
    const CodeScope scope;
    const int64_t first = t * step, rows = least(step, call.tokens - first);
    View x = rows_of(call.x, first);
    for (int64_t l = 0; l < call.layers; ++l) {
      const View out = l + 1 == call.layers ? rows_of(call.out, first) : View{block.between, block.z_stride, kFloat32};
      const Layer& layer = call.layer[l];
      CodeForwardLayer{call,
                       shared.layer[l],
                       block,
                       PackedCodes(layer.packed1, w.out1, w.in1),
                       PackedCodes(layer.packed2, w.out2, w.in2),
                       static_cast<const float*>(x.data),
                       x.stride,
                       rows,
                       out}
          .run();
      x = out;
    }
  };
  parallel_tasks((call.tokens + step - 1) / step, task);
  return call.failed;
}
