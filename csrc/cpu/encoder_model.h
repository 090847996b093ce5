// A whole encoder: sizes and where its weights are; and those weights as products want them. Part of api.cpp.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "ffn.h"

namespace ffnas {

enum Embedding : int64_t { kFullTable = 0, kFactorized = 1, kTrigram = 2 };
enum Pooling : int64_t { kNoPooling = 0, kFirstToken = 1, kMeanOfTokens = 2 };
enum Head : int64_t { kNoHead = 0, kSequenceHead = 1, kTokenHead = 2, kMaskHead = 3 };
// Scores; the last layer's rows; the model's own pooling; or mean, first and largest of the last layer's rows. The last
// four may be made of length 1 (+ kOfLengthOne).
enum Wanted : int64_t { kWantHead = 0, kWantHidden = 1, kWantPooled = 2, kWantMean = 3, kWantFirst = 4, kWantMax = 5, kOfLengthOne = 16 };

struct Dense {
  View w, b;
  int64_t outputs = 0, inputs = 0;
};
struct Norm {
  View weight, bias;
};
struct EncoderLayer {
  int64_t heads = 0, stack = 0, inner = 0;
  Dense query, key, value, output;
  Norm norm;
  Program program = {};
  std::vector<Instruction> code;
  std::vector<Dense> first, second;
  std::vector<Norm> norms;
};

struct EncoderModel {
  int64_t hidden, head_size, vocabulary, positions, types, embedding, width;  // width: of the token table
  float eps;
  View token_table, position_table, type_table;
  Dense embedding_dense;
  Norm embedding_norm;
  std::vector<EncoderLayer> layers;
  int64_t pooling, activation, head, labels;
  Dense pooler, classifier;
  int64_t head_width;  // of the layer before the classifier, where mask filling has one
  Dense head_dense;
  Norm head_norm;

  bool per_token() const { return head == kTokenHead || head == kMaskHead; }
};

// Memory from malloc, freed with its owner.
struct Freed {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Freed>;

// The weights as one instruction set wants them.
struct PackedEncoder {
  struct Layer {
    Buffer query, key, value, output;
    std::vector<Buffer> first, second;
  };
  bool ready = false;
  Buffer embedding, pooler, classifier, head_dense;
  std::vector<Layer> layers;
};

}  // namespace ffnas
