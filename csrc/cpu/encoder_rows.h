// Arithmetic on whole rows that is too little for kernels of an instruction set: poolings, activations, lengths. Part of
// api.cpp.
#pragma once

#include <cmath>
#include <cstdint>

namespace ffnas {

enum Activation : int64_t { kActTanh = 0, kActRelu = 1, kActGelu = 2, kActGeluErf = 3 };

inline float activated(int64_t activation, float v) {
  switch (activation) {
    case kActRelu: return v > 0.0f ? v : 0.0f;
    case kActGelu: return 0.5f * v * (1.0f + std::tanh(0.7978845608028654f * (v + 0.044715f * v * v * v)));
    case kActGeluErf: return 0.5f * v * (1.0f + std::erf(v * 0.7071067811865476f));
    default: return std::tanh(v);
  }
}

inline void activate(int64_t activation, float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = activated(activation, values[i]);
}

// out = the mean of `rows` rows.
inline void mean_of_rows(const float* x, int64_t rows, int64_t width, float* out) {
  for (int64_t j = 0; j < width; ++j) out[j] = 0.0f;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < width; ++j) out[j] += x[r * width + j];
  for (int64_t j = 0; j < width; ++j) out[j] /= static_cast<float>(rows);
}

// out = the largest of each column; not a number where one is none.
inline void max_of_rows(const float* x, int64_t rows, int64_t width, float* out) {
  __builtin_memcpy(out, x, static_cast<size_t>(width) * sizeof(float));
  for (int64_t r = 1; r < rows; ++r)
    for (int64_t j = 0; j < width; ++j) {
      const float v = x[r * width + j];
      out[j] = v > out[j] || v != v ? v : out[j];
    }
}

// Divides the row by its length, as torch.nn.functional.normalize does.
inline void to_length_one(float* row, int64_t width) {
  double squares = 0.0;
  for (int64_t j = 0; j < width; ++j) squares += static_cast<double>(row[j]) * row[j];
  const double length = std::sqrt(squares);
  const auto by = static_cast<float>(1.0 / (length < 1e-12 ? 1e-12 : length));
  for (int64_t j = 0; j < width; ++j) row[j] *= by;
}

// LayerNorm in place.
inline void normalize_row(float* row, int64_t width, float eps, const float* weight, const float* bias) {
  double sum = 0.0, squares = 0.0;
  for (int64_t j = 0; j < width; ++j) sum += row[j];
  const double mean = sum / static_cast<double>(width);
  for (int64_t j = 0; j < width; ++j) squares += (row[j] - mean) * (row[j] - mean);
  const double by = 1.0 / std::sqrt(squares / static_cast<double>(width) + static_cast<double>(eps));
  for (int64_t j = 0; j < width; ++j) row[j] = static_cast<float>((row[j] - mean) * by) * weight[j] + bias[j];
}

}  // namespace ffnas
