// Forward's element-wise work beside its products, on AMX: tile registers multiply one panel while vector units work on
// the panel before, a row or two after every few tile instructions. Included inside an ISA namespace, by forward.h.
//
// Only for segments that are one operator of the product's result, or none, as most of the released expressions are:
// instances of two templates, one for each operator, nothing compiled per program. No out-of-order window spans a whole
// tile's element-wise work, so products and sweeps one after the other do not overlap; bfloat16 forward takes 0.88,
// float32 0.91 of that time (540 wide, 4096 tokens). The interpreter's sweeps gain nothing from being cut in such
// pieces. Results are bit for bit the interpreter's.
//
// Tried and not kept: sums for LayerNorm's statistics in the same pass, and LayerNorm itself beside the next block's
// first product. What they save the products lose: these rows are in L2, as the operands are.

#ifdef FFNAS_AMX
// h and y are saved in the products' own type, and streamed to whole cache lines; elsewhere the interpreter works.
using Saved = std::conditional_t<kPlanes == 1, bf16, float>;
constexpr int32_t kSavedType = kPlanes == 1 ? kBFloat16 : kFloat32;
inline bool streams(const View& v, int32_t dtype) {
  return v.data == nullptr || (v.dtype == dtype && reinterpret_cast<uintptr_t>(v.data) % 64 == 0);
}
inline void save_row(float* to, F low, F high) {
  stream(to, low);
  stream(to + kLanes, high);
}
inline void save_row(float* to, F low, F high, __mmask32 valid) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(valid), low);
  _mm512_mask_storeu_ps(to + kLanes, static_cast<__mmask16>(valid >> kLanes), high);
}
inline __m512i bf16_row(F low, F high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low)), narrow(high), 1);
}
inline void save_row(bf16* to, F low, F high) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bf16_row(low, high));
}
inline void save_row(bf16* to, F low, F high, __mmask32 valid) {
  _mm512_mask_storeu_epi16(to, valid, bf16_row(low, high));
}

// The rows of a panel where they are saved, one after the other from the row of a block on; nowhere without `to`.
template <class T>
struct SavedRows {
  T* to;
  const View* view;
  int64_t row, column, tokens, left;  // left: rows of this group

  SavedRows() = default;
  SavedRows(const View& v, int64_t row, int64_t column, int64_t tokens)
      : to(nullptr), view(&v), row(row), column(column), tokens(tokens), left(0) {
    if (v.data != nullptr) enter();
  }
  void enter() {
    to = static_cast<T*>(view->data) + saved_at(*view, row, column, tokens);
    left = least(kBlockUnit, tokens - row);
  }
  void put(F low, F high, __mmask32 valid) {
    if (to == nullptr) return;
    if (valid == ~__mmask32{0})
      save_row(to, low, high);
    else
      save_row(to, low, high, valid);
    to += __builtin_popcount(valid);
    if (--left == 0 && (row += kBlockUnit) < tokens) enter();
  }
};

inline __mmask32 columns_below(int64_t n) { return n >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << n) - 1u); }
inline F load_masked(const bf16* p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
inline F load_masked(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }

// A row of a product, 32 columns; product_beside leaves the bias of three planes out.
struct ProductRow {
  const float *from, *bias;
  void take(F& low, F& high) {
    low = load(from);
    high = load(from + kLanes);
    if (kPlanes > 1) {
      low = low + load(bias);
      high = high + load(bias + kLanes);
    }
    from += kTileColumns;
  }
};

// second's operand = op(h)
template <class Op>
struct MidRow {
  ProductRow product;
  SavedRows<Saved> h;
  bf16* to;
  int64_t stride;
  __mmask32 valid;

  void run() {
    F low, high;
    product.take(low, high);
    h.put(low, high, valid);
    const Planes v = planes_of(Op::value(low), Op::value(high));
    for (int p = 0; p < kPlanes; ++p) _mm512_storeu_si512(to + 32 * p, _mm512_maskz_mov_epi16(valid, v.plane[p]));
    to += stride;
  }
};

// Z = x + op(y)
template <class Op, class T>
struct PostRow {
  ProductRow product;
  SavedRows<Saved> y;
  SavedRows<T> sum;
  const T* x;
  int64_t x_stride;
  __mmask32 valid;
  float* z;
  int64_t z_stride;

  void run() {
    F low, high;
    product.take(low, high);
    y.put(low, high, valid);
    low = load_masked(x, static_cast<__mmask16>(valid)) + Op::value(low);
    high = load_masked(x + kLanes, static_cast<__mmask16>(valid >> kLanes)) + Op::value(high);
    sum.put(low, high, valid);
    store(z, low);
    store(z + kLanes, high);
    x += x_stride;
    z += z_stride;
  }
};

// The rows of a panel that are still to do, `piece` of them at each step.
template <class Row>
struct PanelWork {
  Row row;
  int64_t left, piece;
  void step() { run(least(piece, left)); }
  void run(int64_t n) {
    left -= n;
    for (; n > 0; --n) row.run();
  }
};

// For every panel of a product over a block: multiplies, then hands its rows to row_of(column, products).
template <class RowOf>
__attribute__((flatten)) inline void products_beside(Registers& registers, int64_t rows, const bf16* a, int64_t stride,
                                                     const bf16* packed, int64_t depth, int64_t width,
                                                     const float* bias, const RowOf& row_of) {
  const int64_t steps = most((rows + 15) / 32 * (padded_depth(depth) / 32) * kProductsPerStep, 1);  // of full tiles
  PanelWork<decltype(row_of(0, ProductRow{}))> work{};
  work.piece = (rows + steps - 1) / steps;
  for (int64_t c = 0, k = 0; c < width; c += kTileColumns, ++k) {
    float* to = registers.panel[k % 2];
    work = product_beside(a, stride, 0, static_cast<int>(rows), packed, depth, c, width, bias + c, to, work);
    work.run(work.left);
    work.row = row_of(c, ProductRow{to, bias + c});
    work.left = rows;
  }
  work.run(work.left);
}

// The only operator of a segment of the product's result; kNone if it is anything else.
inline int32_t only_operator(const SegmentCode& s) {
  if (s.count == 0) return s.value == kRegisterA ? kOpIdentity : kNone;
  const Instruction& in = s.code[0];
  return s.count == 1 && in.a == kRegisterA && in.dst == s.value ? in.opcode : kNone;
}
// fn(Operator{}) for the unary operator `op`; false if it is none.
template <class Fn>
inline bool with_operator(int32_t op, const Fn& fn) {
  switch (op) {
#define FFNAS_CASE(NAME, CODE) case CODE: fn(NAME{}); return true;
    FFNAS_UNARY_OPERATORS(FFNAS_CASE)
#undef FFNAS_CASE
    default: return false;
  }
}

inline bool first_beside(const ForwardRows& f) {
  const Call& call = f.call;
  if (call.tokens <= kSkinnyTokens || !streams(f.layer.h, kSavedType)) return false;
  const Widths w = widths_of(call);
  return with_operator(only_operator(call.program.segment[kMid]), [&](auto op) {
    const auto row_of = [&](int64_t c, ProductRow product) {
      return MidRow<decltype(op)>{product, SavedRows<Saved>(f.layer.h, f.row, c, call.tokens),
                                  f.block.second + operand_column(c), f.block.stride2, columns_below(w.out1 - c)};
    };
    products_beside(f.block.reg, f.rows, f.block.first, f.block.stride1, f.packed.w1, w.in1, w.out1, f.packed.b1,
                    row_of);
  });
}

// x, and LayerNorm's input where it is saved, of type T.
template <class T>
inline bool second_beside_as(const ForwardRows& f) {
  const Call& call = f.call;
  const Widths w = widths_of(call);
  return with_operator(only_operator(call.program.segment[kPost]), [&](auto op) {
    const auto row_of = [&](int64_t c, ProductRow product) {
      return PostRow<decltype(op), T>{product,
                                      SavedRows<Saved>(f.layer.y, f.row, c, call.tokens),
                                      SavedRows<T>(f.layer.sum, f.row, c, call.tokens),
                                      static_cast<const T*>(f.x.data) + c,
                                      f.x.stride,
                                      columns_below(w.out2 - c),
                                      f.block.z + c,
                                      f.block.z_stride};
    };
    products_beside(f.block.reg, f.rows, f.block.second, f.block.stride2, f.packed.w2, w.in2, w.out2, f.packed.b2,
                    row_of);
  });
}
inline bool second_beside(const ForwardRows& f) {
  const Call& call = f.call;
  if (call.tokens <= kSkinnyTokens || call.program.parallel || !call.has_ln || call.drop_threshold != 0 ||
      !streams(f.layer.y, kSavedType) || !streams(f.layer.sum, f.x.dtype))
    return false;
  return f.x.dtype == kFloat32 ? second_beside_as<float>(f) : second_beside_as<bf16>(f);
}
#else
inline bool first_beside(const ForwardRows&) { return false; }
inline bool second_beside(const ForwardRows&) { return false; }
#endif
