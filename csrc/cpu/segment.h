// The interpreter: runs one segment of a program on a tile. Included inside `namespace ffnas::FFNAS_ISA`.
//
// A tile is rows x kTileColumns floats, contiguous; `count` is its number of floats. Each instruction sweeps the whole
// tile (12 to 64 vectors that stay in L1), so decoding costs one predictable jump per sweep. Nothing is compiled per
// program. kTileColumns is a multiple of kLanes.

template <class Op>
inline void sweep_value(float* d, const float* a, int count) {
  for (int i = 0; i < count; i += kLanes) store(d + i, Op::value(load(a + i)));
}
template <class Op>
inline void sweep_gradient(float* d, const float* a, const float* b, int count) {
  for (int i = 0; i < count; i += kLanes) {
    const F av = load(a + i);
    F f, g;
    Op::both(av, f, g);
    store(d + i, Op::gradient(av, load(b + i), g));
  }
}
template <class Op>
inline void sweep_dual(float* d, float* c, const float* a, const float* b, int count) {
  for (int i = 0; i < count; i += kLanes) {
    const F av = load(a + i), bv = load(b + i);
    F f, g;
    Op::both(av, f, g);
    store(d + i, Op::gradient(av, bv, g));
    store(c + i, f);
  }
}
template <class Op>
inline void sweep_pair(float* d, float* c, const float* a, int count) {
  for (int i = 0; i < count; i += kLanes) {
    F f, g;
    Op::both(load(a + i), f, g);
    store(d + i, g);
    store(c + i, f);
  }
}

// dst = column < hidden ? a : imm, the operator identity that stands in for columns x does not have.
inline void sweep_select(float* d, const float* a, int count, int first_column, int hidden, int which) {
  const float imm = which == 0 ? 0.0f : which == 1 ? 1.0f : -__builtin_inff();
  for (int i = 0; i < count; i += kTileColumns)
    for (int j = 0; j < kTileColumns; ++j) d[i + j] = first_column + j < hidden ? a[i + j] : imm;
}

#define FFNAS_CASES(NAME, CODE)                                                      \
  case CODE: sweep_value<NAME>(d, a, count); break;                                  \
  case CODE + kGradientOffset: sweep_gradient<NAME>(d, a, b, count); break;          \
  case CODE + kDualOffset: sweep_dual<NAME>(d, reg[in.c], a, b, count); break;       \
  case CODE + kPairOffset: sweep_pair<NAME>(d, reg[in.c], a, count); break;

// reg: kNumRegisters tiles; the inputs the segment reads hold data, the temporaries it uses have room. Flat: a function
// called per vector would fetch its constants for every one.
__attribute__((flatten)) inline void run_segment(const SegmentCode& s, float* const* reg, int count, int first_column,
                                                 int hidden) {
  for (int n = 0; n < s.count; ++n) {
    const Instruction& in = s.code[n];
    float* d = reg[in.dst];
    const float* a = reg[in.a];
    const float* b = reg[in.b];
    switch (in.opcode) {
      case kOpAdd:
        for (int i = 0; i < count; i += kLanes) store(d + i, load(a + i) + load(b + i));
        break;
      case kOpMul:
        for (int i = 0; i < count; i += kLanes) store(d + i, load(a + i) * load(b + i));
        break;
      case kOpMax:
        for (int i = 0; i < count; i += kLanes) store(d + i, maximum(load(a + i), load(b + i)));
        break;
      case kOpMaxGrad: {
        const float* c = reg[in.c];
        for (int i = 0; i < count; i += kLanes)
          store(d + i, maximum_gradient(load(a + i), load(b + i), load(c + i)));
        break;
      }
      case kOpSelect: sweep_select(d, a, count, first_column, hidden, in.b); break;
        FFNAS_UNARY_OPERATORS(FFNAS_CASES)
      default: __builtin_trap();  // decode.h refuses opcodes that are not in the table
    }
  }
}
#undef FFNAS_CASES
