// Entry points: a plain C interface, called through ctypes (kernels/backends/cpu.py). No PyTorch header is needed, so
// one build serves every PyTorch version; threads are PyTorch's own (`torch_parallel_for` of its stable C interface,
// handed over as a function pointer).
//
// Rejected: a torch.library registration here. Its boxed call with six tensor lists costs more than this interface,
// ties the build to PyTorch's headers, and the op is registered once for all backends in Python.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <initializer_list>

#include "decode.h"
#include "ffn.h"
#include "runtime.h"

namespace ffnas {
namespace generic { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }
namespace amx_fp32 { extern const Kernels kernels; }
namespace neon { extern const Kernels kernels; }

namespace {

// Keep in step with kernels/backends/cpu.py: the layout of a call's words and of what is saved, status codes,
// instruction sets.
constexpr int64_t kAbiVersion = 8;
enum Status : int {
  kOk = 0,
  kOutOfMemory = 1,
  kBadProgram = 2,
  kBadCall = 3,
  kCrowded = 4,  // done; told once
  kBadFile = 5,
};
enum Isa : int {
  kGeneric = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kAvx512Bf16 = 3,
  kAmx = 4,
  kAmxFloat32 = 5,
  kNeon = 6,
  kIsaCount = 7,
};

const Kernels* kernels_of(int64_t isa) {
  switch (isa) {
    case kGeneric: return &generic::kernels;
#ifdef FFNAS_WITH_AVX2
    case kAvx2: return &avx2::kernels;
#endif
#ifdef FFNAS_WITH_AVX512
    case kAvx512: return &avx512::kernels;
#endif
#ifdef FFNAS_WITH_AVX512BF16
    case kAvx512Bf16: return &avx512bf16::kernels;
#endif
#ifdef FFNAS_WITH_AMX
    case kAmx: return &amx::kernels;
    case kAmxFloat32: return &amx_fp32::kernels;
#endif
#ifdef FFNAS_WITH_NEON
    case kNeon: return &neon::kernels;
#endif
    default: return nullptr;
  }
}

// The best instruction set of this machine, up to `limit`, for float32 or bfloat16 products.
int64_t best_isa(bool bf16_products, int64_t limit) {
  int64_t best = kGeneric;
  for (int64_t isa = 0; isa < kIsaCount && isa <= limit; ++isa) {
    const bool serves = bf16_products ? isa != kAmxFloat32 : isa != kAvx512Bf16 && isa != kAmx;
    if (serves && kernels_of(isa) != nullptr && cpu_runs(static_cast<int>(isa))) best = isa;
  }
  return best;
}

// Reads the words of a call in order.
struct Reader {
  const int64_t* at;
  int64_t next() { return *at++; }
  View view() {
    View v;
    v.data = reinterpret_cast<void*>(static_cast<intptr_t>(at[0]));
    v.stride = at[1];
    v.dtype = static_cast<int32_t>(at[2]);
    at += 3;
    return v;
  }
};

constexpr int64_t kFewTokens = 48;  // below, cutting the weights takes longer than AMX's float32 products save
int64_t isa_for(int64_t isa, int64_t tokens) { return isa == kAmxFloat32 && tokens < kFewTokens ? kAvx512 : isa; }
constexpr int64_t kScalarWords = 11;
constexpr int64_t kViewWords = 3;

// Asks for huge pages under a large, freshly allocated result: faulting it in by small pages takes longer than writing
// it (0.8 ms against 0.5 ms for 9 MB).
void prefer_huge_pages(const View& v, int64_t rows, int64_t columns) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kWorthwhile = uintptr_t{4} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(v.data) + kPage - 1) / kPage * kPage;
  const uintptr_t size = static_cast<uintptr_t>(rows * columns * (v.dtype == kFloat32 ? 4 : 2)) / kPage * kPage;
  if (v.data != nullptr && size > kWorthwhile) madvise(reinterpret_cast<void*>(begin), size - kPage, MADV_HUGEPAGE);
#endif
}

int run(const int64_t* words, int64_t count, double eps, double drop_scale, bool backward) {
  Reader in{words};
  if (count < kScalarWords || in.next() != kAbiVersion) return kBadCall;
  Call call = {};
  const int64_t isa = in.next();
  call.tokens = in.next();
  const Kernels* kernels = kernels_of(isa_for(isa, call.tokens));
  call.hidden = in.next();
  call.inner = in.next();
  call.layers = in.next();
  call.has_ln = in.next() != 0;
  call.seed = static_cast<uint64_t>(in.next());
  call.drop_threshold = static_cast<uint64_t>(in.next());
  const auto* program = reinterpret_cast<const int32_t*>(static_cast<intptr_t>(in.next()));
  const int64_t program_words = in.next();
  call.eps = static_cast<float>(eps);
  call.drop_scale = static_cast<float>(drop_scale);
  if (kernels == nullptr || call.tokens < 0 || call.hidden < 1 || call.inner < 1 || call.layers < 1) return kBadCall;
  const int64_t views = backward ? 3 + 17 * call.layers : 2 + 11 * call.layers;
  if (count != kScalarWords + kViewWords * views + (backward ? 0 : 2 * call.layers)) return kBadCall;
  if (!decode(program, program_words, call.program)) return kBadProgram;
  if (call.program.parallel && call.hidden != call.inner) return kBadProgram;
  if (backward) {
    call.grad_out = in.view();
    call.x = in.view();
    call.grad_x = in.view();
  } else {
    call.x = in.view();
    call.out = in.view();
  }
  call.layer = static_cast<Layer*>(scratch(kLayers, static_cast<size_t>(call.layers) * sizeof(Layer)));
  if (call.layer == nullptr) return kOutOfMemory;
  for (int64_t l = 0; l < call.layers; ++l) {
    Layer& layer = call.layer[l];
    layer = {};
    for (View* v : {&layer.w1, &layer.b1, &layer.w2, &layer.b2, &layer.ln_weight, &layer.ln_bias, &layer.z, &layer.h,
                    &layer.y, &layer.sum, &layer.stats})
      *v = in.view();
    if (!backward) {
      for (void** p : {&layer.packed1, &layer.packed2}) *p = reinterpret_cast<void*>(static_cast<intptr_t>(in.next()));
      continue;
    }
    for (View* v : {&layer.grad_w1, &layer.grad_b1, &layer.grad_w2, &layer.grad_b2, &layer.grad_ln_weight,
                    &layer.grad_ln_bias})
      *v = in.view();
    if (!saved_present(call.program, layer, l == 0, call.has_ln)) return kBadProgram;
  }
  prefer_huge_pages(backward ? call.grad_x : call.out, call.tokens, call.hidden);
  for (int64_t l = 0; l < call.layers && !backward; ++l) {
    prefer_huge_pages(call.layer[l].z, call.tokens, call.hidden);
    prefer_huge_pages(call.layer[l].h, call.tokens, call.inner);
    prefer_huge_pages(call.layer[l].y, call.tokens, call.hidden);
    prefer_huge_pages(call.layer[l].sum, call.tokens, call.hidden);
  }
  const int failed = backward ? kernels->backward(call) : kernels->forward(call);
  return failed ? kOutOfMemory : newly_crowded() ? kCrowded : kOk;
}

}  // namespace

}  // namespace ffnas

#include "losses_api.h"

#define FFNAS_EXPORT extern "C" __attribute__((visibility("default")))

#include "int8_api.h"

#include "encoder_api.h"
#include "write_watch.h"

// Both may be null: then everything runs on the calling thread.
FFNAS_EXPORT void ffnas_set_threads(void* parallel_for, void* get_num_threads) {
  ffnas::set_threads(parallel_for, get_num_threads);
}
#ifndef FFNAS_BUILD_KEY
#define FFNAS_BUILD_KEY "none"
#endif
// Names the sources this library was built from; kernels/build.py looks for it in the file.
FFNAS_EXPORT const char* ffnas_build_key() { return FFNAS_BUILD_KEY; }
FFNAS_EXPORT int64_t ffnas_abi_version() { return ffnas::kAbiVersion; }
// Whether the kernels of instruction set `isa` are in this build.
FFNAS_EXPORT int ffnas_built(int isa) { return ffnas::kernels_of(isa) != nullptr; }
// Whether this machine can run them.
FFNAS_EXPORT int ffnas_runs(int isa) { return ffnas::cpu_runs(isa) ? 1 : 0; }
// The best one up to `limit` that both hold for, for products in bfloat16 or in float32.
FFNAS_EXPORT int64_t ffnas_best_isa(int bf16_products, int64_t limit) { return ffnas::best_isa(bf16_products != 0, limit); }

// The instruction set that a call of so many tokens runs on, where `isa` was asked for.
FFNAS_EXPORT int64_t ffnas_isa_for(int64_t isa, int64_t tokens) { return ffnas::isa_for(isa, tokens); }
// Weights kept packed, see Kernels; both for an `isa` that `ffnas_isa_for` gave.
FFNAS_EXPORT int64_t ffnas_packed_bytes(int64_t isa, int64_t tokens, int64_t outputs, int64_t inputs) {
  const ffnas::Kernels* kernels = ffnas::kernels_of(isa);
  return kernels == nullptr || outputs < 1 || inputs < 1 ? 0 : kernels->packed_bytes(tokens, outputs, inputs);
}
FFNAS_EXPORT int ffnas_pack(int64_t isa, void* data, int64_t stride, int64_t dtype, int64_t outputs, int64_t inputs,
                            void* packed) {
  const ffnas::Kernels* kernels = ffnas::kernels_of(isa);
  if (kernels == nullptr || outputs < 1 || inputs < 1) return ffnas::kBadCall;
  kernels->pack({data, stride, static_cast<int32_t>(dtype)}, outputs, inputs, packed);
  return ffnas::kOk;
}
// Two numbers for each of `count` matrices, by which a write to one is noticed (fingerprint.h): four words each give
// address, bytes between rows, rows, and bytes of a row.
FFNAS_EXPORT int ffnas_fingerprints(int64_t isa, const int64_t* words, int64_t count, uint64_t* sums) {
  const ffnas::Kernels* kernels = ffnas::kernels_of(isa);
  if (kernels == nullptr || count < 0) return ffnas::kBadCall;
  static_assert(sizeof(ffnas::MatrixBytes) == 4 * sizeof(int64_t), "the words are read as they are");
  kernels->fingerprints(reinterpret_cast<const ffnas::MatrixBytes*>(words), count, sums);
  return ffnas::kOk;
}

FFNAS_EXPORT int ffnas_forward(const int64_t* words, int64_t count, double eps, double drop_scale) {
  return ffnas::run(words, count, eps, drop_scale, false);
}
FFNAS_EXPORT int ffnas_backward(const int64_t* words, int64_t count, double eps, double drop_scale) {
  return ffnas::run(words, count, eps, drop_scale, true);
}
FFNAS_EXPORT int ffnas_loss(const int64_t* words, const double* reals) { return ffnas::run_loss(words, reals); }
// Test hook, see runtime.h.
FFNAS_EXPORT int ffnas_note_region(int64_t now, int64_t took, int64_t spent) {
  return ffnas::note_region(now, took, spent);
}
// Test hook; mode 0 value, 1 derivative, 2 and 3 derivative and value of the pair instruction.
FFNAS_EXPORT int ffnas_unary(int isa, int32_t opcode, int32_t mode, const float* in, float* out, int64_t n) {
  const ffnas::Kernels* kernels = ffnas::kernels_of(isa);
  if (kernels == nullptr || mode < 0 || mode > 3) return ffnas::kBadCall;
  kernels->unary(opcode, mode, in, out, n);
  return ffnas::kOk;
}
