// A whole encoder as one call: token ids in, scores or hidden states out. Part of api.cpp.
//
// Rows of padding are dropped at the start: all that follows works on the real tokens of all samples, one after the other.
// Weights are packed at the first call of an instruction set and stay so; activations lie in scratch memory of the calling
// thread, which grows to the largest batch it has seen.
#pragma once

#include <algorithm>
#include <vector>

#include "encoder_model.h"
#include "encoder_rows.h"
#include "pool.h"

namespace ffnas {

struct EncoderInput {
  const int64_t* ids;     // [batch, length]
  const uint8_t* mask;    // [batch, length], not 0 at real tokens; nullptr: all real
  const int64_t* types;   // [batch, length]; nullptr: all 0
  int64_t batch, length;
  const int64_t* places = nullptr;  // scores per token: of these alone, counted through [batch, length], each a real one
  int64_t place_count = 0;
};

// Who packs weights and multiplies by them: an instruction set in floating point, or on codes (int8.h).
struct Products {
  int (*linear)(LinearCall&);
  int (*forward)(Call&);
  int64_t (*packed_bytes)(int64_t tokens, int64_t outputs, int64_t inputs);
  void (*pack)(const View& w, int64_t outputs, int64_t inputs, void* packed);
  int32_t attention_type;  // of attention's operands
};

// One pass. All buffers hold float32 rows, but those of queries, keys, values and contexts, whose type is that of
// attention's operands: bfloat16 where products are, which round them to it anyway.
class EncoderPass {
 public:
  // `products` are those of embeddings and layers, `others` pool and answer.
  EncoderPass(const EncoderModel& model, const PackedEncoder& packed, const Products& products, const LossKernels& others,
              const EncoderInput& in)
      : m_(model), packed_(packed), products_(products), others_(others), in_(in) {}

  int run(int64_t asked, float padding, float* out) {
    const int64_t wanted = asked & ~int64_t{kOfLengthOne};
    const bool short_last = wanted == kWantFirst || (m_.pooling == kFirstToken && (wanted == kWantPooled || (wanted == kWantHead && m_.head == kSequenceHead)));
    if (!gather(short_last)) return kBadCall;
    if (!room()) return kOutOfMemory;
    if (const int failed = embeddings()) return failed;
    int64_t last = -1;
    for (size_t l = 0; l < m_.layers.size(); ++l)
      if (m_.layers[l].heads != 0 || m_.layers[l].stack != 0) last = static_cast<int64_t>(l);
    for (int64_t l = 0; l <= last; ++l)
      if (const int failed = layer(l, short_last && l == last)) return failed;
    if (wanted == kWantHidden) return scatter(x_, m_.hidden, 0.0f, out);
    if (wanted == kWantHead && m_.per_token()) return in_.places == nullptr ? token_scores(padding, out) : scores_at_places(out);
    if (const int failed = pool(wanted, short_last && last >= 0)) return failed;
    if (wanted == kWantHead) return dense(others_.linear, m_.classifier, packed_.classifier, rows(y_, in_.batch, m_.hidden), in_.batch, rows(out, in_.batch, m_.labels));
    for (int64_t b = 0; b < in_.batch && (asked & kOfLengthOne) != 0; ++b) to_length_one(y_ + b * m_.hidden, m_.hidden);
    return copy(y_, in_.batch * m_.hidden, out);
  }

 private:
  int64_t tokens() const { return static_cast<int64_t>(ids_.size()); }
  static View rows(float* data, int64_t, int64_t width) { return {data, width, kFloat32}; }

  // The real tokens; false where an id, a type or a position is outside its table, or a sample has no token. Where the
  // first token is read (`first`), it has to be real: a model of layers would read the padding that stands there.
  bool gather(bool first) {
    start_.push_back(0);
    for (int64_t b = 0; b < in_.batch; ++b) {
      if (first && in_.mask != nullptr && in_.mask[b * in_.length] == 0) return false;
      for (int64_t i = 0; i < in_.length; ++i) {
        const int64_t at = b * in_.length + i;
        if (in_.mask != nullptr && in_.mask[at] == 0) continue;
        const int64_t type = in_.types == nullptr ? 0 : in_.types[at];
        if (in_.ids[at] < 0 || in_.ids[at] >= m_.vocabulary || type < 0 || type >= m_.types || i >= m_.positions) return false;
        ids_.push_back(static_cast<int32_t>(in_.ids[at]));
        types_.push_back(static_cast<int32_t>(type));
        positions_.push_back(static_cast<int32_t>(i));
        places_.push_back(at);
      }
      if (tokens() == start_.back()) return false;
      start_.push_back(tokens());
    }
    return true;
  }

  bool room() {
    int64_t heads = 0, wide = 0;
    for (const EncoderLayer& l : m_.layers) heads = heads < l.heads ? l.heads : heads;
    const int64_t inputs = m_.embedding == kFullTable ? 0 : m_.embedding_dense.inputs;
    if (wide < inputs) wide = inputs;
    if (wide < 3 * heads * m_.head_size) wide = 3 * heads * m_.head_size;
    const int64_t n = tokens() < in_.batch ? in_.batch : tokens();
    const auto aligned = [](int64_t floats) { return (floats + 15) / 16 * 16; };
    const int64_t context = aligned(n * heads * m_.head_size), row = aligned(n * m_.hidden);
    const int64_t scores = m_.per_token() ? head_rows() * (m_.head_width + m_.labels) : 0;
    const int64_t rest = std::max(aligned(n * wide), aligned(scores));
    auto* base = static_cast<float*>(scratch(kEncoder, static_cast<size_t>(rest + context + 2 * row) * sizeof(float)));
    if (base == nullptr) return false;
    x_ = base;
    y_ = x_ + row;
    context_ = y_ + row;
    wide_ = context_ + context;
    return true;
  }

  int embeddings() {
    EmbedCall call = {};
    call.rows = tokens();
    call.hidden = m_.hidden;
    call.ids = ids_.data();
    call.positions = positions_.data();
    call.types = types_.data();
    call.position = m_.position_table;
    call.type = m_.type_table;
    call.eps = m_.eps;
    if (m_.embedding == kFullTable) {
      call.token = m_.token_table;
      call.ln_weight = m_.embedding_norm.weight;
      call.ln_bias = m_.embedding_norm.bias;
      call.out = rows(x_, tokens(), m_.hidden);
      return others_.embed(call) ? kOutOfMemory : kOk;
    }
    call.out = rows(y_, tokens(), m_.hidden);  // what the dense layer's result is added to
    if (others_.embed(call)) return kOutOfMemory;
    table_rows();
    return norm_dense(m_.embedding_dense, packed_.embedding, rows(wide_, tokens(), m_.embedding_dense.inputs), tokens(), y_,
                      m_.embedding_norm, x_);
  }

  // Rows of the token table; of three neighbours (next, current, previous) where embeddings are trigrams.
  void table_rows() {
    const auto* table = static_cast<const float*>(m_.token_table.data);
    const size_t bytes = static_cast<size_t>(m_.width) * sizeof(float);
    float* to = wide_;
    for (int64_t b = 0; b < in_.batch; ++b)
      for (int64_t t = start_[static_cast<size_t>(b)]; t < start_[static_cast<size_t>(b) + 1]; ++t) {
        const int64_t i = positions_[static_cast<size_t>(t)];
        const bool three = m_.embedding == kTrigram;
        for (int64_t step = three ? 1 : 0; step >= (three ? -1 : 0); --step, to += m_.width) {
          const int64_t from = i + step;
          const int64_t id = from < 0 || from >= in_.length ? -1 : in_.ids[b * in_.length + from];
          if (id < 0 || id >= m_.vocabulary)  // past the ends; ids of padding are read, but not checked before
            __builtin_memset(to, 0, bytes);
          else
            __builtin_memcpy(to, table + id * m_.width, bytes);
        }
      }
  }

  static int dense(int (*linear)(LinearCall&), const Dense& d, const Buffer& packed, const View& x, int64_t count, const View& out) {
    LinearCall call = {};
    call.tokens = count;
    call.inputs = d.inputs;
    call.layers = 1;
    call.x = x;
    call.layer[0] = {d.w, d.b, out, d.outputs, packed.get()};
    return linear(call) ? kOutOfMemory : kOk;
  }

  // LayerNorm(residual + x @ w.T + b)
  int norm_dense(const Dense& d, const Buffer& packed, const View& x, int64_t count, float* residual, const Norm& norm, float* out) {
    LinearCall call = {};
    call.tokens = count;
    call.inputs = d.inputs;
    call.layers = 1;
    call.x = x;
    call.residual = rows(residual, count, d.outputs);
    call.ln_weight = norm.weight;
    call.ln_bias = norm.bias;
    call.eps = m_.eps;
    call.layer[0] = {d.w, d.b, rows(out, count, d.outputs), d.outputs, packed.get()};
    return products_.linear(call) ? kOutOfMemory : kOk;
  }

  // Layer l, of the first tokens alone where `first`; its result is in x_.
  int layer(int64_t l, bool first) {
    const EncoderLayer& layer = m_.layers[static_cast<size_t>(l)];
    const PackedEncoder::Layer& packed = packed_.layers[static_cast<size_t>(l)];
    int64_t count = tokens();
    if (layer.heads != 0) {
      if (const int failed = attend(layer, packed, first)) return failed;
      if (first) count = in_.batch;
    } else if (first) {
      first_rows(y_);
      swap();
      count = in_.batch;
    }
    return layer.stack == 0 ? kOk : feed_forward(layer, packed, count);
  }

  int attend(const EncoderLayer& layer, const PackedEncoder::Layer& packed, bool first) {
    const int64_t width = layer.heads * m_.head_size, n = tokens(), count = first ? in_.batch : n;
    const int32_t type = products_.attention_type;
    const auto part = [&](int64_t i) {
      return View{reinterpret_cast<char*>(wide_) + i * n * width * (type == kFloat32 ? 4 : 2), width, type};
    };
    const View q = part(0), k = part(1), v = part(2);
    LinearCall call = {};
    call.tokens = n;
    call.inputs = m_.hidden;
    call.x = rows(x_, n, m_.hidden);
    call.layers = first ? 2 : 3;
    call.layer[0] = {layer.key.w, layer.key.b, k, width, packed.key.get()};
    call.layer[1] = {layer.value.w, layer.value.b, v, width, packed.value.get()};
    call.layer[2] = {layer.query.w, layer.query.b, q, width, packed.query.get()};
    if (products_.linear(call)) return kOutOfMemory;
    if (first) {
      first_rows(y_);
      swap();
      if (const int failed = dense(products_.linear, layer.query, packed.query, rows(x_, count, m_.hidden), count, q)) return failed;
    }
    RaggedAttention attention = {};
    attention.samples = in_.batch;
    attention.heads = layer.heads;
    attention.d = m_.head_size;
    attention.scale = 1.0f / std::sqrt(static_cast<float>(m_.head_size));
    attention.start = start_.data();
    attention.first = first;
    attention.q = q;
    attention.k = k;
    attention.v = v;
    const View context{context_, width, type};
    attention.context = context;
    if (others_.attention_ragged(attention)) return kOutOfMemory;
    const int failed = norm_dense(layer.output, packed.output, context, count, x_, layer.norm, y_);
    swap();
    return failed;
  }

  int feed_forward(const EncoderLayer& layer, const PackedEncoder::Layer& packed, int64_t count) {
    ffns_.assign(static_cast<size_t>(layer.stack), Layer{});
    for (size_t i = 0; i < ffns_.size(); ++i) {
      Layer& to = ffns_[i];
      to.w1 = layer.first[i].w;
      to.b1 = layer.first[i].b;
      to.w2 = layer.second[i].w;
      to.b2 = layer.second[i].b;
      to.ln_weight = layer.norms[i].weight;
      to.ln_bias = layer.norms[i].bias;
      to.packed1 = packed.first[i].get();
      to.packed2 = packed.second[i].get();
    }
    Call call = {};
    call.tokens = count;
    call.hidden = m_.hidden;
    call.inner = layer.inner;
    call.layers = layer.stack;
    call.has_ln = true;
    call.eps = m_.eps;
    call.program = layer.program;
    call.x = rows(x_, count, m_.hidden);
    call.out = rows(y_, count, m_.hidden);
    call.layer = ffns_.data();
    const int failed = products_.forward(call) ? kOutOfMemory : kOk;
    swap();
    return failed;
  }

  // The samples' vectors, to y_.
  int pool(int64_t wanted, bool first_alone) {
    const bool own = wanted == kWantHead || wanted == kWantPooled;
    if (wanted == kWantMean || wanted == kWantMax || (own && m_.pooling == kMeanOfTokens)) {
      const auto of_rows = wanted == kWantMax ? max_of_rows : mean_of_rows;
      for (int64_t b = 0; b < in_.batch; ++b) {
        const int64_t from = start_[static_cast<size_t>(b)], to = start_[static_cast<size_t>(b) + 1];
        of_rows(x_ + from * m_.hidden, to - from, m_.hidden, y_ + b * m_.hidden);
      }
      return kOk;
    }
    if (!first_alone) {
      first_rows(y_);
      swap();
    }
    if (!own) return copy(x_, in_.batch * m_.hidden, y_);
    if (const int failed = dense(others_.linear, m_.pooler, packed_.pooler, rows(x_, in_.batch, m_.hidden), in_.batch, rows(y_, in_.batch, m_.hidden))) return failed;
    activate(m_.activation, y_, in_.batch * m_.hidden);
    return kOk;
  }

  // Rows whose scores are computed together, so that those of a vocabulary do not take the memory of all tokens.
  int64_t head_rows() const { return std::clamp<int64_t>((int64_t{1} << 21) / m_.labels, 32, 1024); }

  // Scores of `count` rows.
  int head(const float* x, int64_t count, float* out) {
    const View from = rows(const_cast<float*>(x), count, m_.hidden);
    if (m_.head == kTokenHead) return dense(others_.linear, m_.classifier, packed_.classifier, from, count, rows(out, count, m_.labels));
    const int64_t width = m_.head_width;
    float* inner = wide_ + head_rows() * m_.labels;
    if (const int failed = dense(others_.linear, m_.head_dense, packed_.head_dense, from, count, rows(inner, count, width))) return failed;
    activate(kActGelu, inner, count * width);
    const auto *weight = static_cast<const float*>(m_.head_norm.weight.data), *bias = static_cast<const float*>(m_.head_norm.bias.data);
    for (int64_t r = 0; r < count; ++r) normalize_row(inner + r * width, width, m_.eps, weight, bias);
    return dense(others_.linear, m_.classifier, packed_.classifier, rows(inner, count, width), count, rows(out, count, m_.labels));
  }

  int token_scores(float padding, float* out) {
    std::fill(out, out + in_.batch * in_.length * m_.labels, padding);
    for (int64_t t = 0; t < tokens(); t += head_rows()) {
      const int64_t count = std::min(head_rows(), tokens() - t);
      if (const int failed = head(x_ + t * m_.hidden, count, wide_)) return failed;
      for (int64_t r = 0; r < count; ++r)
        copy(wide_ + r * m_.labels, m_.labels, out + places_[static_cast<size_t>(t + r)] * m_.labels);
    }
    return kOk;
  }

  int scores_at_places(float* out) {
    for (int64_t p = 0; p < in_.place_count; p += head_rows()) {
      const int64_t count = std::min(head_rows(), in_.place_count - p);
      if (count > tokens()) return kBadCall;  // y_ has room for so many rows
      for (int64_t r = 0; r < count; ++r) {
        const auto found = std::lower_bound(places_.begin(), places_.end(), in_.places[p + r]);
        if (found == places_.end() || *found != in_.places[p + r]) return kBadCall;
        copy(x_ + (found - places_.begin()) * m_.hidden, m_.hidden, y_ + r * m_.hidden);
      }
      if (const int failed = head(y_, count, out + p * m_.labels)) return failed;
    }
    return kOk;
  }

  void first_rows(float* to) const {
    for (int64_t b = 0; b < in_.batch; ++b)
      __builtin_memcpy(to + b * m_.hidden, x_ + start_[static_cast<size_t>(b)] * m_.hidden, static_cast<size_t>(m_.hidden) * sizeof(float));
  }

  // Rows to their places in [batch, length, width], `padding` elsewhere.
  int scatter(const float* from, int64_t width, float padding, float* out) const {
    std::fill(out, out + in_.batch * in_.length * width, padding);
    for (int64_t t = 0; t < tokens(); ++t) copy(from + t * width, width, out + places_[static_cast<size_t>(t)] * width);
    return kOk;
  }

  static int copy(const float* from, int64_t count, float* to) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    return kOk;
  }
  void swap() {
    float* t = x_;
    x_ = y_;
    y_ = t;
  }

  const EncoderModel& m_;
  const PackedEncoder& packed_;
  const Products products_;
  const LossKernels& others_;
  const EncoderInput& in_;
  std::vector<int32_t> ids_, positions_, types_;
  std::vector<int64_t> start_, places_;
  std::vector<Layer> ffns_;
  float *x_ = nullptr, *y_ = nullptr, *context_ = nullptr, *wide_ = nullptr;
};

}  // namespace ffnas
