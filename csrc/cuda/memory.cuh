// Groups of four neighbouring elements between global memory, in any dtype, and float registers.
//
// The dtype is a number at run time: a uniform branch next to a memory access costs nothing that can be seen, and
// spares the product of all dtypes of activations, products and parameters in compiled kernels. A group inside the row
// and aligned to its size is one access of 8 or 16 bytes; rows of odd width, or views that start anywhere, go
// element-wise.
#pragma once

#include "device.h"

namespace ffnas {
namespace cuda {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Matrix of the caller, row-major with last stride 1; data == nullptr where absent.
struct View {
  void* data;
  int64_t stride;  // in elements
  int64_t dtype;
};

FFNAS_DEVICE bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <class T>
FFNAS_DEVICE void load_elements(const T* p, int count, float (&v)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = j < count ? float_of(p[j]) : 0.0f;
}
template <class T>
FFNAS_DEVICE void store_elements(T* p, int count, const float (&v)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (j < count) p[j] = element_of<T>(v[j]);
}

// Four elements that are loaded and stored at once.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};
using Float4 = Four<float>;

template <class T>
FFNAS_DEVICE void load_group(const T* p, int count, float (&v)[4]) {
  if (count >= 4 && aligned(p, sizeof(Four<T>))) {
    const Four<T> f = *reinterpret_cast<const Four<T>*>(p);
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = float_of(f.v[j]);
  } else {
    load_elements(p, count, v);
  }
}
template <class T>
FFNAS_DEVICE void store_group(T* p, int count, const float (&v)[4]) {
  if (count >= 4 && aligned(p, sizeof(Four<T>))) {
    Four<T> f;
#pragma unroll
    for (int j = 0; j < 4; ++j) f.v[j] = element_of<T>(v[j]);
    *reinterpret_cast<Four<T>*>(p) = f;
  } else {
    store_elements(p, count, v);
  }
}

// Columns column..column + 3 of a row, zero past `width`.
FFNAS_DEVICE void load4(const View& m, int64_t row, int column, int width, float (&v)[4]) {
  const int64_t at = row * m.stride + column;
  const int count = width - column;
  if (m.dtype == kFloat32) {
    load_group(static_cast<const float*>(m.data) + at, count, v);
  } else if (m.dtype == kBFloat16) {
    load_group(static_cast<const BFloat16*>(m.data) + at, count, v);
  } else {
    load_group(static_cast<const Half*>(m.data) + at, count, v);
  }
}
FFNAS_DEVICE void store4(const View& m, int64_t row, int column, int width, const float (&v)[4]) {
  const int64_t at = row * m.stride + column;
  const int count = width - column;
  if (m.dtype == kFloat32) {
    store_group(static_cast<float*>(m.data) + at, count, v);
  } else if (m.dtype == kBFloat16) {
    store_group(static_cast<BFloat16*>(m.data) + at, count, v);
  } else {
    store_group(static_cast<Half*>(m.data) + at, count, v);
  }
}

// Shared memory handed out front to back; every piece starts on 16 bytes.
class Carver {
 public:
  FFNAS_DEVICE explicit Carver(uint8_t* base) : at_(base) {}
  template <class T>
  FFNAS_DEVICE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(at_);
    at_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }
  FFNAS_DEVICE uint8_t* rest() const { return at_; }

 private:
  uint8_t* at_;
};

}  // namespace cuda
}  // namespace ffnas
