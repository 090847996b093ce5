// The fibers behind emulate.h, and ldmatrix and mma.sync as the PTX manual defines them.
#include "../device.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <vector>

namespace ffnas {
namespace cuda {
namespace emulation {

Place place;

namespace {

constexpr size_t kStack = 128 * 1024;

struct Warp {
  int arrived = 0;
  int64_t generation = 0;
  uint8_t entry[2][kWarp * kEntry];
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started, done;
  int64_t exchanges;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
uint8_t* stacks = nullptr;
size_t stack_count = 0;
jmp_buf caller;
const std::function<void()>* body;
int count, alive, arrived, idle, step = 1;
int64_t generation;

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "ffnas emulation: %s (block %d, thread %d)\n", what, place.block, place.thread);
  abort();
}

[[noreturn]] void resume(int k) {
  place.thread = k;
  if (fibers[k].started) _longjmp(fibers[k].resume, 1);
  fibers[k].started = true;
  setcontext(&fibers[k].start);
  fail("setcontext failed");
}

int following(int k) {
  do k = (k + step + count) % count;
  while (fibers[k].done);
  return k;
}

void yield() {
  if (++idle > 4 * count) fail("a barrier is not reached by all threads");
  const int self = place.thread;
  if (_setjmp(fibers[self].resume) == 0) resume(following(self));
}

void entry() {
  (*body)();
  fibers[place.thread].done = true;
  idle = 0;
  if (--alive == 0) _longjmp(caller, 1);
  if (arrived == alive) {
    arrived = 0;
    ++generation;
  }
  resume(following(place.thread));
}

void make_fibers(int threads) {
  count = alive = threads;
  arrived = idle = 0;
  fibers.resize(threads);
  warps.assign((threads + kWarp - 1) / kWarp, Warp());
  if (stack_count < static_cast<size_t>(threads)) {
    if (stacks != nullptr) munmap(stacks, stack_count * kStack);
    stack_count = threads;
    void* room = mmap(nullptr, stack_count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) fail("out of memory");
    stacks = static_cast<uint8_t*>(room);
  }
  for (int k = 0; k < threads; ++k) {
    Fiber& f = fibers[k];
    f.started = f.done = false;
    f.exchanges = 0;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stacks + k * kStack;
    f.start.uc_stack.ss_size = kStack;
    f.start.uc_link = nullptr;
    makecontext(&f.start, entry, 0);
  }
}

// Shared memory that ends where an unreadable page begins.
struct Shared {
  uint8_t* base;
  size_t room, page;
  uint8_t* data;
  explicit Shared(int64_t bytes) {
    page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    room = (static_cast<size_t>(bytes) + page - 1) / page * page + page;
    base = static_cast<uint8_t*>(mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED || mprotect(base + room - page, page, PROT_NONE) != 0) fail("out of memory");
    data = base + room - page - bytes;
  }
  ~Shared() { munmap(base, room); }
};

}  // namespace

void sync_block() {
  const int64_t before = generation;
  idle = 0;
  if (++arrived == alive) {
    arrived = 0;
    ++generation;
    return;
  }
  while (generation == before) yield();
}

const uint8_t* exchange(const void* own, size_t bytes) {
  Warp& w = warps[place.thread / kWarp];
  Fiber& f = fibers[place.thread];
  uint8_t* buffer = w.entry[f.exchanges++ % 2];
  if (bytes > 0) memcpy(buffer + place.thread % kWarp * kEntry, own, bytes);
  const int64_t before = w.generation;
  idle = 0;
  if (++w.arrived == kWarp) {
    w.arrived = 0;
    ++w.generation;
    return buffer;
  }
  while (w.generation == before) yield();
  return buffer;
}

void run(int grid, int threads, int64_t shared, const std::function<void()>& kernel) {
  if (threads % kWarp != 0 || shared % 16 != 0) fail("blocks are whole warps, shared memory a multiple of 16 bytes");
  const Shared memory(shared);
  body = &kernel;
  for (int b = 0; b < grid; ++b) {
    memset(memory.data, 0xff, static_cast<size_t>(shared));
    place = {0, b, grid, memory.data};
    make_fibers(threads);
    if (_setjmp(caller) == 0) resume(step > 0 ? 0 : count - 1);
  }
}

}  // namespace emulation

namespace {

// Row `row` of matrix `m` among the addresses the lanes gave.
const uint8_t* matrix_row(const uint8_t* all, int m, int row) {
  const uint8_t* address;
  memcpy(&address, all + (8 * m + row) * emulation::kEntry, sizeof address);
  return address;
}
uint16_t element(const uint8_t* row, int column) {
  uint16_t v;
  memcpy(&v, row + 2 * column, sizeof v);
  return v;
}

struct Operands {
  uint32_t a[4], b[2];
};

template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Operands own;
  memcpy(own.a, a, sizeof own.a);
  own.b[0] = b0;
  own.b[1] = b1;
  const uint8_t* all = emulation::exchange(&own, sizeof own);
  const auto half = [](uint32_t word, int k) { return float_of(T{static_cast<uint16_t>(word >> 16 * k)}); };
  const int group = lane() / 4, column = 2 * (lane() % 4);
  for (int i = 0; i < 4; ++i) {
    // c0, c1: row group, columns `column` and the next; c2, c3: row group + 8
    const int n = column + i % 2;
    double sum = 0.0;
    for (int k = 0; k < 16; ++k) {
      Operands left, right;
      memcpy(&left, all + (group * 4 + k % 8 / 2) * emulation::kEntry, sizeof left);
      memcpy(&right, all + (n * 4 + k % 8 / 2) * emulation::kEntry, sizeof right);
      const float p = half(left.a[i / 2 + 2 * (k / 8)], k % 2);
      const float q = half(right.b[k / 8], k % 2);
      sum += static_cast<double>(p) * static_cast<double>(q);
    }
    d[i] += static_cast<float>(sum);
  }
}

}  // namespace

void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint8_t* all = emulation::exchange(&row, sizeof row);
  for (int m = 0; m < 4; ++m) {
    const uint8_t* from = matrix_row(all, m, lane() / 4);
    r[m] = element(from, 2 * (lane() % 4)) | static_cast<uint32_t>(element(from, 2 * (lane() % 4) + 1)) << 16;
  }
}

void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const uint8_t* all = emulation::exchange(&row, sizeof row);
  for (int m = 0; m < 4; ++m) {
    const int k = 2 * (lane() % 4), column = lane() / 4;
    r[m] = element(matrix_row(all, m, k), column) |
           static_cast<uint32_t>(element(matrix_row(all, m, k + 1), column)) << 16;
  }
}

void multiply_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  multiply<BFloat16>(d, a, b0, b1);
}
void multiply_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  multiply<Half>(d, a, b0, b1);
}

}  // namespace cuda
}  // namespace ffnas

// +1 runs the threads of a block upwards, -1 downwards.
extern "C" __attribute__((visibility("default"))) void ffnas_emulation_order(int order) {
  ffnas::cuda::emulation::step = order;
}
