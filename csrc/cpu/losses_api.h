// Entry point of the losses, of attention and of linear layers, part of api.cpp: one call as words and reals, decoded
// into the call of one kernel. Keep in step with kernels/backends/cpu_losses.py.
//
//     words: interface version, operation, instruction set, then what the operation's reader below takes
//     a tensor: address (0 where absent), batch, head and row stride in elements, dtype

namespace ffnas {
#define FFNAS_DECLARE(ISA) namespace ISA { extern const LossKernels loss_kernels; }
FFNAS_DECLARE(generic)
FFNAS_DECLARE(avx2)
FFNAS_DECLARE(avx512)
FFNAS_DECLARE(avx512bf16)
FFNAS_DECLARE(amx)
FFNAS_DECLARE(amx_fp32)
FFNAS_DECLARE(neon)
#undef FFNAS_DECLARE

namespace {

enum LossOperation : int64_t {
  kScoreMse = 0,
  kHiddenMse = 1,
  kSoftCrossEntropy = 2,
  kAttendForward = 3,
  kAttendBackward = 4,
  kLinear = 5,
  kCrfScan = 6,
};

const LossKernels* loss_kernels_of(int64_t isa) {
  switch (isa) {
    case kGeneric: return &generic::loss_kernels;
#ifdef FFNAS_WITH_AVX2
    case kAvx2: return &avx2::loss_kernels;
#endif
#ifdef FFNAS_WITH_AVX512
    case kAvx512: return &avx512::loss_kernels;
#endif
#ifdef FFNAS_WITH_AVX512BF16
    case kAvx512Bf16: return &avx512bf16::loss_kernels;
#endif
#ifdef FFNAS_WITH_AMX
    case kAmx: return &amx::loss_kernels;
    case kAmxFloat32: return &amx_fp32::loss_kernels;
#endif
#ifdef FFNAS_WITH_NEON
    case kNeon: return &neon::loss_kernels;
#endif
    default: return nullptr;
  }
}

struct LossReader : Reader {
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<intptr_t>(next()));
  }
  Heads heads() {
    Heads t;
    t.data = pointer<void>();
    t.batch = next();
    t.head = next();
    t.row = next();
    t.dtype = static_cast<int32_t>(next());
    return t;
  }
  Mask mask() {
    Mask m;
    m.real = pointer<const uint8_t>();
    m.batch = next();
    m.length = next();
    return m;
  }
};

int run_score(LossReader& in, const double* reals, const LossKernels& kernels) {
  ScoreCall call = {};
  call.loss = in.pointer<float>();
  call.mask = in.mask();
  for (int64_t* v : {&call.layers, &call.heads, &call.d_s, &call.d_t}) *v = in.next();
  call.form = static_cast<ScoreForm>(in.next());
  call.scale_s = static_cast<float>(reals[0]);
  call.scale_t = static_cast<float>(reals[1]);
  if (call.layers < 1 || call.heads < 1 || call.d_s < 1 || call.d_t < 1) return kBadCall;
  call.layer = static_cast<ScoreLayer*>(scratch(kLayers, static_cast<size_t>(call.layers) * sizeof(ScoreLayer)));
  if (call.layer == nullptr) return kOutOfMemory;
  for (int64_t l = 0; l < call.layers; ++l) {
    ScoreLayer& layer = call.layer[l];
    for (Heads* t : {&layer.q_s, &layer.k_s, &layer.q_t, &layer.k_t, &layer.grad_q, &layer.grad_k}) *t = in.heads();
  }
  return kernels.score_mse(call) ? kOutOfMemory : kOk;
}

int run_hidden(LossReader& in, const LossKernels& kernels) {
  HiddenCall call = {};
  call.loss = in.pointer<float>();
  call.mask = in.mask();
  for (int64_t* v : {&call.layers, &call.d_s, &call.d_t}) *v = in.next();
  for (View* v : {&call.weight, &call.bias, &call.grad_weight, &call.grad_bias}) *v = in.view();
  if (call.layers < 1 || call.d_s < 1 || call.d_t < 1) return kBadCall;
  call.layer = static_cast<HiddenLayer*>(scratch(kLayers, static_cast<size_t>(call.layers) * sizeof(HiddenLayer)));
  if (call.layer == nullptr) return kOutOfMemory;
  for (int64_t l = 0; l < call.layers; ++l)
    for (Heads* t : {&call.layer[l].h_s, &call.layer[l].h_t, &call.layer[l].grad}) *t = in.heads();
  return kernels.hidden_mse(call) ? kOutOfMemory : kOk;
}

int run_soft(LossReader& in, const double* reals, const LossKernels& kernels) {
  SoftCrossEntropyCall call = {};
  call.loss = in.pointer<float>();
  call.rows = in.next();
  call.classes = in.next();
  for (View* v : {&call.student, &call.teacher, &call.grad}) *v = in.view();
  call.temperature = static_cast<float>(reals[0]);
  if (call.rows < 0 || call.classes < 1) return kBadCall;
  return kernels.soft_cross_entropy(call) ? kOutOfMemory : kOk;
}

int run_attention(LossReader& in, const double* reals, const LossKernels& kernels, bool backward) {
  AttentionCall call = {};
  call.loss = in.pointer<float>();
  call.lse = in.pointer<float>();
  call.grad_loss = in.pointer<const float>();
  call.mask = in.mask();
  for (int64_t* v : {&call.heads, &call.d, &call.d_t}) *v = in.next();
  call.dropout.seed = static_cast<uint64_t>(in.next());
  call.dropout.drop_threshold = static_cast<uint64_t>(in.next());
  call.scale = static_cast<float>(reals[0]);
  call.scale_t = static_cast<float>(reals[1]);
  call.dropout.drop_scale = static_cast<float>(reals[2]);
  for (Heads* t : {&call.q, &call.k, &call.v, &call.q_t, &call.k_t, &call.context}) *t = in.heads();
  if (backward)
    for (Heads* t : {&call.grad_context, &call.grad_q, &call.grad_k, &call.grad_v}) *t = in.heads();
  if (call.heads < 1 || call.d < 1 || call.d_t < 0) return kBadCall;
  return (backward ? kernels.attention_backward(call) : kernels.attention_forward(call)) ? kOutOfMemory : kOk;
}

int run_linear(LossReader& in, const double* reals, const LossKernels& kernels) {
  LinearCall call = {};
  for (int64_t* v : {&call.tokens, &call.inputs, &call.layers}) *v = in.next();
  if (call.tokens < 0 || call.inputs < 1 || call.layers < 1 || call.layers > kMaxLinears) return kBadCall;
  for (View* v : {&call.x, &call.residual, &call.ln_weight, &call.ln_bias}) *v = in.view();
  if (call.residual.data != nullptr && call.layers != 1) return kBadCall;
  call.eps = static_cast<float>(reals[0]);
  for (int64_t l = 0; l < call.layers; ++l) {
    LinearLayer& layer = call.layer[l];
    for (View* v : {&layer.w, &layer.b, &layer.out}) *v = in.view();
    layer.outputs = in.next();
    layer.packed = in.pointer<void>();
    if (layer.outputs < 1) return kBadCall;
    prefer_huge_pages(layer.out, call.tokens, layer.outputs);
  }
  return kernels.linear(call) ? kOutOfMemory : kOk;
}

int run_crf(LossReader& in, const LossKernels& kernels) {
  CrfCall call = {};
  for (int64_t* v : {&call.sentences, &call.positions, &call.tags}) *v = in.next();
  call.best = in.next() != 0;
  for (const float** p : {&call.emissions, &call.transitions, &call.start, &call.end}) *p = in.pointer<const float>();
  call.lengths = in.pointer<const int64_t>();
  call.alpha = in.pointer<float>();
  call.total = in.pointer<double>();
  for (float** p : {&call.tag_marginals, &call.pair_counts}) *p = in.pointer<float>();
  if (call.sentences < 0 || call.positions < 0 || call.tags < 1 || call.tags > kMostCrfTags) return kBadCall;
  return kernels.crf_scan(call) ? kOutOfMemory : kOk;
}

int run_loss(const int64_t* words, const double* reals) {
  LossReader in{{words}};
  if (in.next() != kAbiVersion) return kBadCall;
  const int64_t operation = in.next();
  const LossKernels* kernels = loss_kernels_of(in.next());
  if (kernels == nullptr) return kBadCall;
  switch (operation) {
    case kScoreMse: return run_score(in, reals, *kernels);
    case kHiddenMse: return run_hidden(in, *kernels);
    case kSoftCrossEntropy: return run_soft(in, reals, *kernels);
    case kAttendForward: return run_attention(in, reals, *kernels, false);
    case kAttendBackward: return run_attention(in, reals, *kernels, true);
    case kLinear: return run_linear(in, reals, *kernels);
    case kCrfScan: return run_crf(in, *kernels);
    default: return kBadCall;
  }
}

}  // namespace
}  // namespace ffnas
