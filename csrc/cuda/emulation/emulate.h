// device.h on the CPU, for tests: the threads of a block are fibers of one system thread, run in turn; blocks follow
// one another. Everything is deterministic.
//
// A fiber runs until it waits at a barrier; shuffles, ldmatrix and mma exchange data through a warp barrier. What it
// finds:
//   - shared memory past what the launch asked for: it ends at an unreadable page;
//   - reads of shared memory nobody wrote: it starts as NaN in every block;
//   - missing barriers: `set_order(-1)` runs the threads backwards, and results must not change;
//   - barriers not reached by all threads: the emulation stops with a message.
// It says nothing about speed, rounding of the device's own functions, or memory ordering within a warp.
//
// Chosen: fibers, switched by _setjmp/_longjmp (tens of nanoseconds). Rejected: one std::thread per CUDA thread, which
// is slow and differs from run to run.
#pragma once

#include <functional>

#define FFNAS_DEVICE inline
#define FFNAS_KERNEL(threads, blocks) void
#define FFNAS_ARGUMENT const

namespace ffnas {
namespace cuda {
namespace emulation {

struct Place {
  int thread, block, blocks;
  uint8_t* shared;
};
extern Place place;  // of the running fiber

void sync_block();
// Gives every lane's `bytes` at `own` to all lanes: returns the 32 entries, `kEntry` bytes apart.
const uint8_t* exchange(const void* own, size_t bytes);
constexpr size_t kEntry = 32;

void run(int grid, int threads, int64_t shared, const std::function<void()>& kernel);

}  // namespace emulation

inline int thread() { return emulation::place.thread; }
inline int block() { return emulation::place.block; }
inline int blocks() { return emulation::place.blocks; }
inline void sync_threads() { emulation::sync_block(); }
inline void sync_warp() { emulation::exchange(nullptr, 0); }
inline void stop() { __builtin_trap(); }
inline uint8_t* shared_memory() { return emulation::place.shared; }
inline float reciprocal(float x) { return 1.0f / x; }
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }

inline float shuffle_xor(float v, int mask) {
  const uint8_t* all = emulation::exchange(&v, sizeof v);
  memcpy(&v, all + ((thread() % kWarp) ^ mask) * emulation::kEntry, sizeof v);
  return v;
}

inline uint16_t bits_of(float v, BFloat16) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  if (v != v) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline uint16_t bits_of(float v, Half) {
  const _Float16 h = static_cast<_Float16>(v);
  uint16_t bits;
  memcpy(&bits, &h, sizeof bits);
  return bits;
}
inline float float_of(Half v) {
  _Float16 h;
  memcpy(&h, &v.bits, sizeof h);
  return static_cast<float>(h);
}

void load_matrices(uint32_t (&r)[4], const void* row);
void load_matrices_transposed(uint32_t (&r)[4], const void* row);
void multiply_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16);
void multiply_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half);

template <class T>
struct Same {
  using Type = T;
};

template <class... A>
int launch(void (*kernel)(A...), int grid, int threads, int64_t shared, void*,
           const typename Same<A>::Type&... arguments) {
  emulation::run(grid, threads, shared, [&] { kernel(arguments...); });
  return 0;
}

inline int probe() { return 0; }

struct DeviceScope {
  explicit DeviceScope(int) {}
};

}  // namespace cuda
}  // namespace ffnas
