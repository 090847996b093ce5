// Entry points of whole encoders, part of api.cpp. Keep in step with kernels/runtime/library.py.
//
//     words of a model: interface version, then what `read_model` takes; a matrix is address, row stride, dtype;
//     a dense layer is weight, bias, outputs, inputs; a norm is weight, bias
#pragma once

#include <mutex>
#include <new>

#include "encoder.h"

namespace ffnas {
namespace {

struct BoundedReader {
  const int64_t* at;
  const int64_t* end;
  bool short_of = false;
  int64_t next() {
    if (at < end) return *at++;
    short_of = true;
    return 0;
  }
  View view() {
    View v;
    v.data = reinterpret_cast<void*>(static_cast<intptr_t>(next()));
    v.stride = next();
    v.dtype = static_cast<int32_t>(next());
    return v;
  }
  Dense dense() {
    Dense d;
    d.w = view();
    d.b = view();
    d.outputs = next();
    d.inputs = next();
    return d;
  }
  Norm norm() {
    Norm n;
    n.weight = view();
    n.bias = view();
    return n;
  }
};

class Encoder {
 public:
  Encoder(int64_t isa, int threads) : isa_(isa), pool_(threads) {}

  Status read(BoundedReader& in, double eps) {
    EncoderModel& m = model_;
    for (int64_t* v : {&m.hidden, &m.head_size, &m.vocabulary, &m.positions, &m.types, &m.embedding, &m.width}) *v = in.next();
    m.eps = static_cast<float>(eps);
    for (View* v : {&m.token_table, &m.position_table, &m.type_table}) *v = in.view();
    m.embedding_dense = in.dense();
    m.embedding_norm = in.norm();
    for (int64_t* v : {&m.pooling, &m.activation, &m.head}) *v = in.next();
    m.pooler = in.dense();
    m.classifier = in.dense();
    const int64_t layers = in.next();
    if (in.short_of || m.hidden < 1 || m.head_size < 1 || layers < 1 || layers > kMostLayers) return kBadCall;
    m.layers.resize(static_cast<size_t>(layers));
    for (EncoderLayer& layer : m.layers)
      if (const Status status = read_layer(in, layer)) return status;
    return in.short_of || in.at != in.end ? kBadCall : kOk;
  }

  int run(const EncoderInput& in, Wanted wanted, float padding, float* out) {
    // Who finds the pool at work for somebody else goes on alone, instead of waiting: no bit depends on it.
    std::unique_lock<std::mutex> hold(pool_.lock(), std::defer_lock);
    Pool alone(1);
    struct Using {
      Pool* before;
      explicit Using(Pool* pool) : before(use_pool(pool)) {}
      ~Using() { use_pool(before); }
    } own(pool_.threads() > 1 && hold.try_lock() ? &pool_ : &alone);
    int64_t tokens = in.batch * in.length;
    if (in.mask != nullptr) {
      tokens = 0;
      for (int64_t i = 0; i < in.batch * in.length; ++i) tokens += in.mask[i] != 0;
    }
    const int64_t isa = isa_for(isa_, tokens);
    const Kernels* kernels = kernels_of(isa);
    const LossKernels* others = loss_kernels_of(isa);
    if (kernels == nullptr || others == nullptr) return kBadCall;
    PackedEncoder& packed = packed_[isa];
    {
      const std::lock_guard<std::mutex> packing(packing_);
      if (!packed.ready && !pack(*kernels, packed)) return kOutOfMemory;
    }
    return EncoderPass(model_, packed, *kernels, *others, in).run(wanted, padding, out);
  }

 private:
  static constexpr int64_t kMostLayers = 1024, kMostStack = 64;

  Status read_layer(BoundedReader& in, EncoderLayer& layer) {
    for (int64_t* v : {&layer.heads, &layer.stack, &layer.inner}) *v = in.next();
    if (in.short_of || layer.heads < 0 || layer.stack < 0 || layer.stack > kMostStack) return kBadCall;
    if (layer.heads != 0) {
      for (Dense* d : {&layer.query, &layer.key, &layer.value, &layer.output}) *d = in.dense();
      layer.norm = in.norm();
    }
    if (layer.stack == 0) return kOk;
    if (layer.inner < 1) return kBadCall;
    const auto* words = reinterpret_cast<const int32_t*>(static_cast<intptr_t>(in.next()));
    const int64_t count = in.next();
    if (in.short_of || words == nullptr || !decode(words, count, layer.program)) return kBadProgram;
    if (layer.program.parallel && model_.hidden != layer.inner) return kBadProgram;
    own_code(layer);
    for (int64_t i = 0; i < layer.stack; ++i) {
      layer.first.push_back(in.dense());
      layer.second.push_back(in.dense());
      layer.norms.push_back(in.norm());
    }
    return kOk;
  }

  // Instructions that `decode` left in scratch memory, in the layer's own.
  static void own_code(EncoderLayer& layer) {
    size_t count = 0;
    for (const SegmentCode& s : layer.program.segment) count += static_cast<size_t>(s.count);
    layer.code.reserve(count);
    for (SegmentCode& s : layer.program.segment) {
      const size_t at = layer.code.size();
      layer.code.insert(layer.code.end(), s.code, s.code + s.count);
      s.code = layer.code.data() + at;
    }
  }

  static bool pack(const Kernels& kernels, const Dense& d, Buffer& to) {
    if (d.w.data == nullptr) return true;
    constexpr int64_t kMany = int64_t{1} << 20;  // tokens of a call that certainly packs
    const auto bytes = static_cast<size_t>(kernels.packed_bytes(kMany, d.outputs, d.inputs));
    to.reset(std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage + kPage));
    if (to == nullptr) return false;
    kernels.pack(d.w, d.outputs, d.inputs, to.get());
    return true;
  }

  bool pack(const Kernels& kernels, PackedEncoder& to) {
    bool ok = pack(kernels, model_.embedding_dense, to.embedding) && pack(kernels, model_.pooler, to.pooler) &&
              pack(kernels, model_.classifier, to.classifier);
    to.layers.clear();
    to.layers.resize(model_.layers.size());
    for (size_t l = 0; l < model_.layers.size() && ok; ++l) {
      const EncoderLayer& from = model_.layers[l];
      PackedEncoder::Layer& p = to.layers[l];
      ok = pack(kernels, from.query, p.query) && pack(kernels, from.key, p.key) && pack(kernels, from.value, p.value) &&
           pack(kernels, from.output, p.output);
      p.first.resize(from.first.size());
      p.second.resize(from.first.size());
      for (size_t i = 0; i < from.first.size() && ok; ++i)
        ok = pack(kernels, from.first[i], p.first[i]) && pack(kernels, from.second[i], p.second[i]);
    }
    return to.ready = ok;
  }

  const int64_t isa_;
  EncoderModel model_ = {};
  PackedEncoder packed_[kIsaCount];
  std::mutex packing_;
  Pool pool_;
};

}  // namespace
}  // namespace ffnas

// A model from its words, whose arrays must outlive it; nullptr and a status where that cannot be.
FFNAS_EXPORT void* ffnas_encoder_new(const int64_t* words, int64_t count, double eps, int64_t isa, int64_t threads, int* status) {
  using namespace ffnas;
  *status = kBadCall;
  BoundedReader in{words, words + count};
  if (in.next() != kAbiVersion || kernels_of(isa) == nullptr || threads < 1 || threads > 4096) return nullptr;
  try {
    auto encoder = std::make_unique<Encoder>(isa, static_cast<int>(threads));
    *status = encoder->read(in, eps);
    return *status == kOk ? encoder.release() : nullptr;
  } catch (const std::exception&) {  // no memory, or no more threads
    *status = kOutOfMemory;
    return nullptr;
  }
}
// ids, types [batch, length] of int64, mask of bytes; types and mask may be null. `wanted`: see Wanted; `padding` stands at
// padded tokens of scores per token. kBadCall also where an id is outside the vocabulary or a sample has no token.
FFNAS_EXPORT int ffnas_encoder_run(void* encoder, const int64_t* ids, const uint8_t* mask, const int64_t* types, int64_t batch,
                                   int64_t length, int64_t wanted, double padding, float* out) {
  using namespace ffnas;
  if (batch < 1 || length < 1 || wanted < kWantHead || wanted > kWantPooled) return kBadCall;
  try {
    return static_cast<Encoder*>(encoder)->run({ids, mask, types, batch, length}, static_cast<Wanted>(wanted),
                                               static_cast<float>(padding), out);
  } catch (const std::exception&) {
    return kOutOfMemory;
  }
}
FFNAS_EXPORT void ffnas_encoder_free(void* encoder) { delete static_cast<ffnas::Encoder*>(encoder); }
