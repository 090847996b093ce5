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

// Reads the words of a model in order, and knows where its matrices may lie: anywhere (addresses, from a caller that has
// checked them), or inside the bytes of a weights file (offsets, from a file that anybody may have written).
struct ModelReader {
  const int64_t* at;
  const int64_t* end;
  char* weights = nullptr;
  int64_t weights_size = 0;
  const int32_t* programs = nullptr;
  int64_t program_words = 0;
  bool wrong = false;

  int64_t next() {
    if (at < end) return *at++;
    wrong = true;
    return 0;
  }
  // A matrix of float32 or, by address, of bfloat16 rows; absent where its first word is 0.
  View view(int64_t rows, int64_t width) {
    View v;
    const int64_t where = next();
    v.data = reinterpret_cast<void*>(static_cast<intptr_t>(where));
    v.stride = next();
    v.dtype = static_cast<int32_t>(next());
    if (where == 0) return v;
    if (rows < 1 || width < 1 || v.stride < (rows > 1 ? width : 0)) wrong = true;
    if (weights == nullptr || wrong) return v;
    const int64_t room = (weights_size - where) / 4;  // floats
    if (v.dtype != kFloat32 || where < 8 || where % 4 != 0 || where > weights_size || width > room ||
        (rows > 1 && rows - 1 > (room - width) / v.stride)) {
      wrong = true;
      v.data = nullptr;
    } else {
      v.data = weights + where;
    }
    return v;
  }
  View required(int64_t rows, int64_t width) {
    const View v = view(rows, width);
    wrong = wrong || v.data == nullptr;
    return v;
  }
  // A dense layer of these sizes; all of it absent where it is not `wanted`.
  Dense dense(bool wanted, int64_t outputs, int64_t inputs) {
    Dense d;
    d.w = view(outputs, inputs);
    d.b = view(1, outputs);
    d.outputs = next();
    d.inputs = next();
    const bool there = d.w.data != nullptr && d.b.data != nullptr && d.outputs == outputs && d.inputs == inputs;
    if (wanted ? !there : d.w.data != nullptr) wrong = true;
    return d;
  }
  Norm norm(int64_t width) {
    Norm n;
    n.weight = required(1, width);
    n.bias = required(1, width);
    return n;
  }
  // A program's words and their number; nullptr where there is none.
  const int32_t* program(int64_t& count) {
    const int64_t where = next();
    count = next();
    if (wrong || count < 1) return nullptr;
    if (weights == nullptr) return reinterpret_cast<const int32_t*>(static_cast<intptr_t>(where));
    return where < 0 || where > program_words || count > program_words - where ? nullptr : programs + where;
  }
};

}  // namespace
}  // namespace ffnas

#include "encoder_file.h"

namespace ffnas {
namespace {

class Encoder {
 public:
  Encoder(int64_t isa, int threads) : isa_(isa), pool_(threads) {}

  Status read(ModelReader& in, double eps) {
    EncoderModel& m = model_;
    for (int64_t* v : {&m.hidden, &m.head_size, &m.vocabulary, &m.positions, &m.types, &m.embedding, &m.width}) *v = in.next();
    m.eps = static_cast<float>(eps);
    for (int64_t v : {m.hidden, m.head_size, m.vocabulary, m.positions, m.types, m.width})
      if (v < 1 || v > kMost) return kBadCall;
    if (m.embedding < kFullTable || m.embedding > kTrigram) return kBadCall;
    const bool full = m.embedding == kFullTable;
    if (full && m.width != m.hidden) return kBadCall;
    m.token_table = in.required(m.vocabulary, m.width);
    m.position_table = in.required(m.positions, m.hidden);
    m.type_table = in.required(m.types, m.hidden);
    m.embedding_dense = in.dense(!full, m.hidden, m.embedding == kTrigram ? 3 * m.width : m.width);
    m.embedding_norm = in.norm(m.hidden);
    for (int64_t* v : {&m.pooling, &m.activation, &m.head, &m.labels}) *v = in.next();
    if (in.wrong || m.pooling < kNoPooling || m.pooling > kMeanOfTokens || m.activation < kActTanh || m.activation > kActGeluErf ||
        m.head < kNoHead || m.head > kMaskHead || (m.head == kSequenceHead && m.pooling == kNoPooling) ||
        (m.head != kNoHead && (m.labels < 1 || m.labels > kMost)))
      return kBadCall;
    m.pooler = in.dense(m.pooling == kFirstToken, m.hidden, m.hidden);
    const bool masks = m.head == kMaskHead;
    m.head_width = in.next();
    if (masks ? m.head_width < 1 || m.head_width > kMost : m.head_width != 0) return kBadCall;
    m.head_dense = in.dense(masks, m.head_width, m.hidden);
    if (masks) m.head_norm = in.norm(m.head_width);
    m.classifier = in.dense(m.head != kNoHead, m.labels, masks ? m.head_width : m.hidden);
    const int64_t layers = in.next();
    if (in.wrong || layers < 1 || layers > kMostLayers) return kBadCall;
    m.layers.resize(static_cast<size_t>(layers));
    for (EncoderLayer& layer : m.layers)
      if (const Status status = read_layer(in, layer)) return status;
    deep_ = m.hidden > kInt8Depth || m.embedding_dense.inputs > kInt8Depth;
    for (const EncoderLayer& layer : m.layers) deep_ = deep_ || layer.inner > kInt8Depth || layer.output.inputs > kInt8Depth;
    return in.wrong || in.at != in.end ? kBadCall : kOk;
  }

  const EncoderModel& model() const { return model_; }
  // The memory that a model's matrices lie in, where it is not the caller's.
  void own(Mapped&& weights) { weights_ = std::move(weights); }

  int64_t isa() const { return isa_; }

  // On instruction set `asked`, or what serves so few tokens in its place.
  int run(int64_t asked, const EncoderInput& in, int64_t wanted, float padding, float* out) {
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
    const Int8Kernels* codes = deep_ ? nullptr : int8_kernels_of(asked);
    const int64_t isa = asked < kInt8First ? isa_for(asked, tokens) : base_of(asked);
    const Kernels* kernels = kernels_of(isa);
    const LossKernels* others = loss_kernels_of(isa);
    if (kernels == nullptr || others == nullptr || !can(wanted) || (in.places != nullptr && !(wanted == kWantHead && model_.per_token())))
      return kBadCall;
    const int32_t type = isa == kAmx || isa == kAvx512Bf16 ? kBFloat16 : kFloat32;
    const Products plain{others->linear, kernels->forward, kernels->packed_bytes, kernels->pack, type};
    const Products products =
        codes == nullptr ? plain : Products{codes->linear, codes->forward, codes->packed_bytes, codes->pack, type};
    PackedEncoder& packed = codes == nullptr ? packed_[isa] : packed_codes_[asked - kInt8First];
    {
      const std::lock_guard<std::mutex> packing(packing_);
      if (!packed.ready && !pack(products, plain, packed)) return kOutOfMemory;
    }
    return EncoderPass(model_, packed, products, *others, in).run(wanted, padding, out);
  }

 private:
  static constexpr int64_t kMostLayers = 1024, kMostStack = 64, kMost = int64_t{1} << 28;

  bool can(int64_t wanted) const {
    switch (wanted) {
      case kWantHead: return model_.head != kNoHead;
      case kWantPooled:
      case kWantPooled + kOfLengthOne: return model_.pooling != kNoPooling;
      case kWantHidden:
      case kWantMean:
      case kWantFirst:
      case kWantMax:
      case kWantMean + kOfLengthOne:
      case kWantFirst + kOfLengthOne:
      case kWantMax + kOfLengthOne: return true;
      default: return false;
    }
  }

  Status read_layer(ModelReader& in, EncoderLayer& layer) {
    for (int64_t* v : {&layer.heads, &layer.stack, &layer.inner}) *v = in.next();
    if (in.wrong || layer.heads < 0 || layer.heads > kMost || layer.stack < 0 || layer.stack > kMostStack) return kBadCall;
    const int64_t hidden = model_.hidden, width = layer.heads * model_.head_size;
    if (layer.heads != 0) {
      if (width > kMost) return kBadCall;
      for (Dense* d : {&layer.query, &layer.key, &layer.value}) *d = in.dense(true, width, hidden);
      layer.output = in.dense(true, hidden, width);
      layer.norm = in.norm(hidden);
    }
    if (layer.stack == 0) return in.wrong ? kBadCall : kOk;
    if (layer.inner < 1 || layer.inner > kMost) return kBadCall;
    int64_t count = 0;
    const int32_t* words = in.program(count);
    if (words == nullptr || !decode(words, count, layer.program)) return kBadProgram;
    if (layer.program.parallel && hidden != layer.inner) return kBadProgram;
    own_code(layer);
    for (int64_t i = 0; i < layer.stack; ++i) {
      layer.first.push_back(in.dense(true, layer.inner, hidden));
      layer.second.push_back(in.dense(true, hidden, layer.inner));
      layer.norms.push_back(in.norm(hidden));
    }
    return in.wrong ? kBadCall : kOk;
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

  static bool pack(const Products& products, const Dense& d, Buffer& to) {
    if (d.w.data == nullptr) return true;
    constexpr int64_t kMany = int64_t{1} << 20;  // tokens of a call that certainly packs
    const auto bytes = static_cast<size_t>(products.packed_bytes(kMany, d.outputs, d.inputs));
    to.reset(std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage + kPage));
    if (to == nullptr) return false;
    products.pack(d.w, d.outputs, d.inputs, to.get());
    return true;
  }

  // The embeddings' and the layers' weights for `products`, those after the last layer for `plain`.
  bool pack(const Products& products, const Products& plain, PackedEncoder& to) {
    bool ok = pack(products, model_.embedding_dense, to.embedding) && pack(plain, model_.pooler, to.pooler) &&
              pack(plain, model_.classifier, to.classifier) && pack(plain, model_.head_dense, to.head_dense);
    to.layers.clear();
    to.layers.resize(model_.layers.size());
    for (size_t l = 0; l < model_.layers.size() && ok; ++l) {
      const EncoderLayer& from = model_.layers[l];
      PackedEncoder::Layer& p = to.layers[l];
      ok = pack(products, from.query, p.query) && pack(products, from.key, p.key) && pack(products, from.value, p.value) &&
           pack(products, from.output, p.output);
      p.first.resize(from.first.size());
      p.second.resize(from.first.size());
      for (size_t i = 0; i < from.first.size() && ok; ++i)
        ok = pack(products, from.first[i], p.first[i]) && pack(products, from.second[i], p.second[i]);
    }
    return to.ready = ok;
  }

  const int64_t isa_;
  EncoderModel model_ = {};
  Mapped weights_;
  PackedEncoder packed_[kIsaCount], packed_codes_[kInt8End - kInt8First];
  bool deep_ = false;  // whether a product is too deep for codes
  std::mutex packing_;
  Pool pool_;
};

}  // namespace
}  // namespace ffnas

// A model from its words, whose arrays must outlive it; nullptr and a status where that cannot be.
FFNAS_EXPORT void* ffnas_encoder_new(const int64_t* words, int64_t count, double eps, int64_t isa, int64_t threads, int* status) {
  using namespace ffnas;
  *status = kBadCall;
  ModelReader in{words, words + count};
  if (in.next() != kAbiVersion || !serves(isa) || threads < 1 || threads > 4096) return nullptr;
  try {
    auto encoder = std::make_unique<Encoder>(isa, static_cast<int>(threads));
    *status = encoder->read(in, eps);
    return *status == kOk ? encoder.release() : nullptr;
  } catch (const std::exception&) {  // no memory, or no more threads
    *status = kOutOfMemory;
    return nullptr;
  }
}
// A model from a folder written by `ffnas export RUN --native FOLDER`, for an instruction set.
FFNAS_EXPORT void* ffnas_encoder_read(const char* folder, int64_t isa, int64_t threads, int* status) {
  using namespace ffnas;
  *status = kBadCall;
  if (folder == nullptr || !serves(isa) || threads < 1 || threads > 4096) return nullptr;
  try {
    EncoderFile file;
    if ((*status = file.read(folder)) != kOk) return nullptr;
    auto encoder = std::make_unique<Encoder>(isa, static_cast<int>(threads));
    ModelReader in = file.reader();
    *status = encoder->read(in, file.eps());
    if (*status != kOk) return nullptr;
    encoder->own(file.release_weights());
    return encoder.release();
  } catch (const std::exception&) {
    *status = kOutOfMemory;
    return nullptr;
  }
}
// See csrc/ffnas_encoder.h, also for what follows.
FFNAS_EXPORT void* ffnas_encoder_open(const char* folder, int precision, int threads, int* status) {
  *status = ffnas::kBadCall;
  if (precision < 0 || precision > 2) return nullptr;
  return ffnas_encoder_read(folder, precision == 2 ? ffnas::best_int8() : ffnas::best_isa(precision == 1, ffnas::kIsaCount - 1), threads, status);
}
FFNAS_EXPORT int64_t ffnas_encoder_size(void* encoder, int which) {
  const ffnas::EncoderModel& m = static_cast<ffnas::Encoder*>(encoder)->model();
  switch (which) {
    case 0: return m.head == ffnas::kNoHead ? 0 : m.labels;
    case 1: return m.per_token();
    case 2: return m.hidden;
    case 3: return m.positions;
    case 4: return m.pooling != ffnas::kNoPooling;
    case 5: return m.head;
    default: return -1;
  }
}
// A pass on an instruction set other than the model's own; else as `ffnas_encoder_run`, or, with `places`, as
// `ffnas_encoder_run_at`.
FFNAS_EXPORT int ffnas_encoder_run_on(void* encoder, int64_t isa, const int64_t* ids, const uint8_t* mask, const int64_t* types,
                                      int64_t batch, int64_t length, int64_t wanted, double padding, const int64_t* places,
                                      int64_t count, float* out) {
  using namespace ffnas;
  if (batch < 1 || length < 1 || (places != nullptr && count < 1)) return kBadCall;
  try {
    return static_cast<Encoder*>(encoder)->run(isa, {ids, mask, types, batch, length, places, count}, wanted,
                                               static_cast<float>(padding), out);
  } catch (const std::exception&) {
    return kOutOfMemory;
  }
}
FFNAS_EXPORT int ffnas_encoder_run(void* encoder, const int64_t* ids, const uint8_t* mask, const int64_t* types, int64_t batch,
                                   int64_t length, int64_t wanted, double padding, float* out) {
  return ffnas_encoder_run_on(encoder, static_cast<ffnas::Encoder*>(encoder)->isa(), ids, mask, types, batch, length, wanted,
                              padding, nullptr, 0, out);
}
FFNAS_EXPORT int ffnas_encoder_run_at(void* encoder, const int64_t* ids, const uint8_t* mask, const int64_t* types, int64_t batch,
                                      int64_t length, const int64_t* places, int64_t count, float* out) {
  if (places == nullptr) return ffnas::kBadCall;
  return ffnas_encoder_run_on(encoder, static_cast<ffnas::Encoder*>(encoder)->isa(), ids, mask, types, batch, length,
                              ffnas::kWantHead, 0.0, places, count, out);
}
FFNAS_EXPORT void ffnas_encoder_free(void* encoder) { delete static_cast<ffnas::Encoder*>(encoder); }
