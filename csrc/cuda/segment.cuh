// The interpreter: runs one segment of a program on four neighbouring columns of a row per thread.
//
// The program is read from device memory and packed into shared memory once per block, one word an instruction; a
// thread then walks the list. All threads of a warp run the same instruction, so no branch here diverges.
//
// Where registers live. The program names up to 20 registers, and a register array indexed at run time would become
// local memory. So the interpreter is an accumulator machine:
//   - the result of the last instruction stays in machine registers, and so do the four inputs, chosen by a short
//     ladder of uniform branches;
//   - a temporary lives in a slot in shared memory, [slot][thread] of float4: conflict-free and private to the thread,
//     hence without barriers;
//   - the packing marks results that are only read by the next instruction. They are never stored, and most segments
//     (activations, gates, sums of products with x) touch no slot at all.
// An instruction costs about 20 issue slots of decoding per warp over 4 elements a thread (by count), next
// to 60 to 100 for an exponential on them.
//
// Chosen over a switch on register numbers around 20 x 4 machine registers (moves in and out for each operand, and
// half the warps per multiprocessor), and over one slot access per operand (three times the shared memory traffic).
// Segments longer than the packed area read their tail from device memory, where it stays in L1.
#pragma once

#include "activations.cuh"
#include "memory.cuh"

namespace ffnas {
namespace cuda {

constexpr int kCodeWords = 192;
// Scan for readers of a result, in instructions; past it the result is stored.
constexpr int kReadAhead = 48;

// Packed instruction: opcode 8 bits, dst, a, b, c 5 bits each, and two marks.
constexpr uint32_t kStoreBit = 1u << 28;
constexpr uint32_t kReadsBBit = 1u << 29;

FFNAS_DEVICE int opcode_of(uint32_t w) { return static_cast<int>(w & 0xff); }
FFNAS_DEVICE int dst_of(uint32_t w) { return static_cast<int>(w >> 8 & 31); }
FFNAS_DEVICE int a_of(uint32_t w) { return static_cast<int>(w >> 13 & 31); }
FFNAS_DEVICE int b_of(uint32_t w) { return static_cast<int>(w >> 18 & 31); }
FFNAS_DEVICE int c_of(uint32_t w) { return static_cast<int>(w >> 23 & 31); }

FFNAS_DEVICE bool reads_b(int opcode) {
  return opcode <= kOpMax || opcode == kOpMaxGrad || (opcode > kGradientOffset && opcode < kDualOffset) ||
         (opcode > kDualOffset && opcode < kPairOffset);
}
FFNAS_DEVICE bool has_two_results(int opcode) { return opcode > kDualOffset; }

FFNAS_DEVICE uint32_t pack(const int32_t* instruction) {
  const uint32_t head = static_cast<uint32_t>(instruction[0]);
  const int opcode = static_cast<int>(head & 0xff);
  return (head & 0xff) | static_cast<uint32_t>(instruction[1]) << 8 | static_cast<uint32_t>(instruction[2]) << 13 |
         static_cast<uint32_t>(instruction[3]) << 18 | (head >> 8) << 23 | kStoreBit |
         (reads_b(opcode) ? kReadsBBit : 0u);
}

// One segment as the block sees it; lives in shared memory.
struct SegmentCode {
  const int32_t* tail;  // all instructions, in device memory
  int32_t count;
  uint32_t inputs;
  int32_t value, dx, da, db;
  uint32_t code[kCodeWords];

  FFNAS_DEVICE uint32_t word(int i) const { return i < kCodeWords ? code[i] : pack(tail + kInstructionWords * i); }
  FFNAS_DEVICE bool reads(int r) const { return inputs >> r & 1; }
};

// Whether a result in `dst` of instruction i can be read by anything but instruction i + 1 or, if last, as an output.
FFNAS_DEVICE bool outlives_next(const SegmentCode& s, int i, int dst) {
  const int end = s.count < i + kReadAhead ? s.count : i + kReadAhead;
  for (int k = i + 1; k < end; ++k) {
    const uint32_t w = pack(s.tail + kInstructionWords * k);
    const int opcode = opcode_of(w);
    const bool reads_c = opcode == kOpMaxGrad && c_of(w) == dst;
    const bool reads = a_of(w) == dst || (reads_b(opcode) && b_of(w) == dst) || reads_c;
    if (reads && k > i + 1) return true;
    if (dst_of(w) == dst || (has_two_results(opcode) && c_of(w) == dst)) return false;
  }
  if (end < s.count) return true;
  return i + 1 < s.count && (s.value == dst || s.dx == dst || s.da == dst || s.db == dst);
}

// Packs segment `k` of a program into `s`. All threads of the block call it; a barrier must follow.
FFNAS_DEVICE void load_segment(SegmentCode& s, const int32_t* program, int k, int threads) {
  const int32_t* entry = program + kHeaderWords + kSegmentWords * k;
  const int count = entry[kSegmentCount];
  if (thread() == 0) {
    s.tail = program + entry[kSegmentOffset];
    s.count = count;
    s.inputs = static_cast<uint32_t>(entry[kSegmentInputs]);
    s.value = entry[kSegmentValue];
    s.dx = entry[kSegmentDx];
    s.da = entry[kSegmentDa];
    s.db = entry[kSegmentDb];
  }
  sync_threads();
  for (int i = thread(); i < count && i < kCodeWords; i += threads) {
    uint32_t w = pack(s.tail + kInstructionWords * i);
    if (!outlives_next(s, i, dst_of(w))) w &= ~kStoreBit;
    s.code[i] = w;
  }
}

// Slots of the calling thread: temporaries a program may use times the threads of the block.
struct Slots {
  Float4* own;
  int threads;
  FFNAS_DEVICE Slots(Float4* base, int threads) : own(base + thread()), threads(threads) {}
  FFNAS_DEVICE Float4& at(int r) const { return own[(r - kNumInputs) * threads]; }
};

// Runs a segment, then hands out its outputs. x, a, b, g hold the inputs that the segment reads.
struct Machine {
  float x[4], a[4], b[4], g[4], last[4];
  int last_register;

  FFNAS_DEVICE void fetch(int r, const Slots& slots, float (&v)[4]) const {
    if (r == last_register) {
      copy(last, v);
    } else if (r >= kNumInputs) {
      const Float4 f = slots.at(r);
      copy(f.v, v);
    } else if (r == kRegisterX) {
      copy(x, v);
    } else if (r == kRegisterA) {
      copy(a, v);
    } else if (r == kRegisterG) {
      copy(g, v);
    } else {
      copy(b, v);
    }
  }
  // Result r of the segment that just ran; zeros where it has none.
  FFNAS_DEVICE void output(int r, const Slots& slots, float (&v)[4]) const {
    if (r >= 0) {
      fetch(r, slots, v);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = 0.0f;
    }
  }
  FFNAS_DEVICE void run(const SegmentCode& s, const Slots& slots, int column, int hidden);

  static FFNAS_DEVICE void copy(const float (&from)[4], float (&to)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j] = from[j];
  }
};

#define FFNAS_VALUE_CASE(NAME, CODE) \
  case CODE:                         \
    for (int j = 0; j < 4; ++j) last[j] = NAME::value(p[j]); \
    break;
// A pair's first result is f'(p); a gradient's and a dual's is f'(p) * q.
#define FFNAS_BOTH_CASE(NAME, CODE)                               \
  case CODE:                                                      \
    for (int j = 0; j < 4; ++j) {                                 \
      float d;                                                    \
      NAME::both(p[j], second[j], d);                             \
      last[j] = pair ? d : NAME::gradient(p[j], q[j], d);         \
    }                                                             \
    break;

FFNAS_DEVICE void Machine::run(const SegmentCode& s, const Slots& slots, int column, int hidden) {
  last_register = kNone;
  for (int i = 0; i < s.count; ++i) {
    const uint32_t w = s.word(i);
    const int opcode = opcode_of(w);
    float p[4], q[4];
    fetch(a_of(w), slots, p);
    if (w & kReadsBBit) fetch(b_of(w), slots, q);
    if (opcode < kOpSelect) {
      switch (opcode) {
        case kOpAdd:
          for (int j = 0; j < 4; ++j) last[j] = p[j] + q[j];
          break;
        case kOpMul:
          for (int j = 0; j < 4; ++j) last[j] = p[j] * q[j];
          break;
        case kOpMax:
          for (int j = 0; j < 4; ++j) last[j] = maximum(p[j], q[j]);
          break;
          FFNAS_UNARY_OPERATORS(FFNAS_VALUE_CASE)
        default: stop();
      }
    } else if (opcode == kOpSelect) {
      const int which = b_of(w);
      const float filler = which == 0 ? 0.0f : which == 1 ? 1.0f : -INFINITY;
      for (int j = 0; j < 4; ++j) last[j] = column + j < hidden ? p[j] : filler;
    } else if (opcode == kOpMaxGrad) {
      float r[4];
      fetch(c_of(w), slots, r);
      for (int j = 0; j < 4; ++j) last[j] = maximum_gradient(p[j], q[j], r[j]);
    } else {
      const bool pair = opcode > kPairOffset;
      const int op = opcode - (pair ? kPairOffset : opcode > kDualOffset ? kDualOffset : kGradientOffset);
      float second[4];
      switch (op) {
        FFNAS_UNARY_OPERATORS(FFNAS_BOTH_CASE)
        default: stop();
      }
      if (has_two_results(opcode)) slots.at(c_of(w)) = {{second[0], second[1], second[2], second[3]}};
    }
    last_register = dst_of(w);
    if (w & kStoreBit) slots.at(last_register) = {{last[0], last[1], last[2], last[3]}};
  }
}
#undef FFNAS_VALUE_CASE
#undef FFNAS_BOTH_CASE

}  // namespace cuda
}  // namespace ffnas
