// Programs as kernels run them: the caller's words, checked for what protects memory, in memory of this thread. Part of
// api.cpp, inside its anonymous namespace's reach: nobody else sees undecoded words.
#pragma once

#include <initializer_list>

#include "ffn.h"

namespace ffnas {
namespace {

bool known_opcode(int32_t op) {
  switch (op) {
    case kOpAdd:
    case kOpMul:
    case kOpMax:
    case kOpSelect:
    case kOpMaxGrad: return true;
#define FFNAS_KNOWN(NAME, CODE)      \
  case CODE:                         \
  case CODE + kGradientOffset:       \
  case CODE + kDualOffset:           \
  case CODE + kPairOffset: return true;
      FFNAS_UNARY_OPERATORS(FFNAS_KNOWN)
#undef FFNAS_KNOWN
    default: return false;
  }
}

bool known_register(int32_t reg) { return reg >= 0 && reg < kNumRegisters; }

// Whether every output a kernel will use names a register.
bool outputs_present(const Program& p) {
  const auto ok = [&](Segment k, bool value, bool dx, bool da, bool db) {
    const SegmentCode& s = p.segment[k];
    return (!value || s.value != kNone) && (!dx || s.dx != kNone) && (!da || s.da != kNone) && (!db || s.db != kNone);
  };
  const bool parallel = p.parallel;
  return ok(kPre, true, false, false, false) && ok(kMid, true, false, false, false) &&
         ok(kPost, true, false, false, false) && ok(kPreBwd, false, true, false, false) &&
         ok(kPreBwdv, true, true, false, false) && ok(kMidBwd, false, parallel, !parallel, false) &&
         ok(kMidBwdv, true, parallel, !parallel, false) && ok(kPostBwd, false, false, true, parallel);
}

// Bit r set: register r holds something when segment k begins.
uint32_t inputs_of(int k, bool parallel) {
  const int place = k % 3;
  uint32_t held = 1u << kRegisterX;
  if (place == 2 || (place == 1 && !parallel)) held |= 1u << kRegisterA;
  if (place == 2 && parallel) held |= 1u << kRegisterB;
  if (k >= kPreBwd) held |= 1u << kRegisterG;
  return held;
}

// The caller has validated the program; what protects memory is checked here again: every register named exists, holds
// something before it is read, and inputs are read only as the segment table says.
bool decode(const int32_t* words, int64_t length, Program& program) {
  if (length < kFirstInstruction || words[kHeaderMagic] != kMagic || words[kHeaderVersion] != kVersion) return false;
  auto* room = static_cast<Instruction*>(scratch(kDecoded, static_cast<size_t>(length) * sizeof(Instruction)));
  if (room == nullptr) return false;
  program.parallel = words[kHeaderForm] == kParallel;
  int64_t used = 0;
  for (int k = 0; k < kNumSegments; ++k) {
    const int32_t* entry = words + kHeaderWords + k * kSegmentWords;
    SegmentCode& s = program.segment[k];
    const int64_t offset = entry[kSegmentOffset], count = entry[kSegmentCount];
    if (count < 0 || count > kMaxInstructions || offset < kFirstInstruction) return false;
    if (offset + count * kInstructionWords > length || used + count > length) return false;
    s = {room + used, static_cast<int32_t>(count), static_cast<uint32_t>(entry[kSegmentInputs]), entry[kSegmentValue],
         entry[kSegmentDx], entry[kSegmentDa], entry[kSegmentDb]};
    uint32_t held = inputs_of(k, program.parallel), read = 0;
    for (int64_t n = 0; n < count; ++n) {
      const int32_t* w = words + offset + n * kInstructionWords;
      const Instruction in{w[0] & 0xFF, w[1], w[2], w[3], w[0] >> 8};
      if (!known_opcode(in.opcode) || in.dst < kNumInputs || (in.opcode >= kDualOffset && in.c < kNumInputs))
        return false;
      if (!known_register(in.dst) || !known_register(in.a) || !known_register(in.b) || !known_register(in.c))
        return false;
      const bool two = in.opcode >= kGradientOffset && in.opcode < kPairOffset;
      const bool binary = in.opcode == kOpAdd || in.opcode == kOpMul || in.opcode == kOpMax || in.opcode == kOpMaxGrad;
      uint32_t sources = 1u << in.a;
      if (two || binary) sources |= 1u << in.b;
      if (in.opcode == kOpMaxGrad) sources |= 1u << in.c;
      if ((sources & ~held) != 0) return false;
      read |= sources;
      held |= 1u << in.dst;
      if (in.opcode >= kDualOffset) held |= 1u << in.c;
      room[used++] = in;
    }
    for (int32_t reg : {s.value, s.dx, s.da, s.db}) {
      if (reg == kNone) continue;
      if (!known_register(reg) || (held >> reg & 1u) == 0) return false;
      read |= 1u << reg;
    }
    constexpr uint32_t input_bits = (1u << kNumInputs) - 1;
    if (s.inputs != (read & input_bits)) return false;
  }
  return outputs_present(program);
}

// Whether what a backward segment reads was saved: a program other than the forward pass's may read more.
bool saved_present(const Program& p, const Layer& layer, bool first, bool has_ln) {
  const auto reads = [&](Segment k, int32_t reg) { return (p.segment[k].inputs >> reg & 1u) != 0; };
  const bool needs_h = !p.parallel && (reads(kMidBwd, kRegisterA) || reads(kMidBwdv, kRegisterA));
  const View& a = p.parallel ? layer.h : layer.y;
  if (has_ln && layer.stats.data == nullptr) return false;
  if (has_ln && layer.y.data == nullptr && layer.sum.data == nullptr) return false;
  const bool recompute = has_ln && layer.sum.data == nullptr;  // LayerNorm's input comes from y again
  if ((reads(kPostBwd, kRegisterA) || (recompute && reads(kPost, kRegisterA))) && a.data == nullptr) return false;
  if ((reads(kPostBwd, kRegisterB) || (recompute && reads(kPost, kRegisterB))) && layer.y.data == nullptr) return false;
  return (first || layer.z.data != nullptr) && (!needs_h || layer.h.data != nullptr);
}

}  // namespace
}  // namespace ffnas
