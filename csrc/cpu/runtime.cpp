// Scratch memory of each thread, and work shared among PyTorch's threads or those of a pool.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <time.h>

#include <cstdlib>

#include "ffn.h"
#include "pool.h"
#include "runtime.h"

namespace ffnas {
namespace {

using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
using GetNumThreads = int32_t (*)(uint32_t*);
ParallelFor parallel_for = nullptr;
GetNumThreads get_num_threads = nullptr;

struct ThreadScratch {
  void* base[kArenas] = {};
  size_t size[kArenas] = {};
  ~ThreadScratch() {
    for (void* p : base) std::free(p);
  }
};
thread_local ThreadScratch thread_scratch;

int64_t clock_ns(clockid_t clock) {
  timespec t;
  return clock_gettime(clock, &t) == 0 ? t.tv_sec * int64_t{1000000000} + t.tv_nsec : 0;
}

struct Work {
  TaskFn fn;
  void* ctx;
  int64_t tasks, next;
  int64_t busy;  // processor time of all threads in tasks, where it is measured: -1 elsewhere
};

void work(int64_t, int64_t, void* ctx) {
  Work& w = *static_cast<Work*>(ctx);
  const bool measured = w.busy >= 0;
  const int64_t begin = measured ? clock_ns(CLOCK_THREAD_CPUTIME_ID) : 0;
  for (;;) {
    const int64_t task = __atomic_fetch_add(&w.next, 1, __ATOMIC_RELAXED);
    if (task >= w.tasks) break;
    w.fn(w.ctx, task);
  }
  if (measured) __atomic_fetch_add(&w.busy, clock_ns(CLOCK_THREAD_CPUTIME_ID) - begin, __ATOMIC_RELAXED);
}

// Whether a thread that shares out its work is better off alone.
//
// PyTorch's threads wait for one another at the end of every parallel region, spinning. Beside another busy process the
// thread that is waited for may have lost its core, to that process or to one that spins: two threads then get less
// done than one. Seen here as processor time spent in tasks, by all threads together, per time that passes: the cores
// that are put to use. Where that is less than one, the caller does the tasks alone for a while, compares, and looks
// again later. Which thread does a task changes no bit of a result.
struct Crowd {
  static constexpr int64_t kEnough = 20 * 1000000;                    // ns of work by which either way is judged
  static constexpr int64_t kShortest = 100 * 1000;  // ns: of regions below, processor time is not asked for
  static constexpr int64_t kPause = 250 * 1000000, kLongest = 8000 * int64_t{1000000};
  bool alone = false;
  int64_t wall = 0, busy = 0;         // of what is judged now
  int64_t again = 0, pause = kPause;  // when the other way is tried next
  int64_t usual = 0;                  // ns of a region, smoothed
  double cores[2] = {0, 1};           // put to use: shared, alone

  // After a region that took so long. True where it is the first time that the caller goes on alone.
  bool note(int64_t now, int64_t took, int64_t spent) {
    usual += (took - usual) / 8;
    if (alone && now >= again) return share(0);  // are the others gone?
    if (spent < 0) return false;
    wall += took;
    busy += spent;
    if (wall < kEnough) return false;
    cores[alone] = static_cast<double>(busy) / static_cast<double>(wall);
    wall = busy = 0;
    if (alone) return cores[1] < cores[0] ? share(now + pause) : false;  // slow either way
    if (cores[0] > kWorthwhile) pause = kPause;
    if (cores[0] > kWorthwhile || now < again) return false;
    alone = true;
    again = now + pause;
    pause = pause * 2 < kLongest ? pause * 2 : kLongest;
    return true;
  }

 private:
  static constexpr double kWorthwhile = 0.95;
  bool share(int64_t until) {
    alone = false;
    again = until;
    wall = busy = 0;
    return false;
  }
};
thread_local Crowd crowd;
thread_local Pool* own_pool = nullptr;
bool seen = false, told = false;

}  // namespace

void set_threads(void* for_each, void* count) {
  parallel_for = reinterpret_cast<ParallelFor>(for_each);
  get_num_threads = reinterpret_cast<GetNumThreads>(count);
}

void* scratch(Arena arena, size_t bytes) {
  ThreadScratch& s = thread_scratch;
  if (s.size[arena] < bytes) {
    std::free(s.base[arena]);
    const size_t page = bytes < kHugePage / 2 ? kPage : kHugePage;
    s.size[arena] = (bytes + page - 1) / page * page;
    s.base[arena] = std::aligned_alloc(page, s.size[arena]);
    if (s.base[arena] == nullptr) s.size[arena] = 0;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (page == kHugePage && s.base[arena] != nullptr) madvise(s.base[arena], s.size[arena], MADV_HUGEPAGE);
#endif
  }
  return s.base[arena];
}

Pool* use_pool(Pool* pool) {
  Pool* before = own_pool;
  own_pool = pool;
  return before;
}

int num_threads() {
  if (own_pool != nullptr) return own_pool->threads();
  uint32_t n = 1;
  if (parallel_for == nullptr || get_num_threads == nullptr || get_num_threads(&n) != 0) return 1;
  return n < 1 ? 1 : static_cast<int>(n);
}

void run_tasks(int64_t tasks, TaskFn fn, void* ctx) {
  if (own_pool != nullptr) return own_pool->run(tasks, fn, ctx);
  Work w{fn, ctx, tasks, 0, -1};
  const int64_t threads = num_threads() < tasks ? num_threads() : tasks;
  if (threads <= 1) return work(0, 1, &w);
  if (crowd.usual >= Crowd::kShortest) w.busy = 0;
  const int64_t begin = clock_ns(CLOCK_MONOTONIC);
  if (crowd.alone || parallel_for(0, threads, 1, work, &w) != 0) work(0, 1, &w);
  const int64_t now = clock_ns(CLOCK_MONOTONIC);
  if (crowd.note(now, now - begin, w.busy)) __atomic_store_n(&seen, true, __ATOMIC_RELAXED);
}

bool note_region(int64_t now, int64_t took, int64_t spent) {
  if (crowd.note(now, took, spent)) __atomic_store_n(&seen, true, __ATOMIC_RELAXED);
  return crowd.alone;
}

bool newly_crowded() {
  return __atomic_load_n(&seen, __ATOMIC_RELAXED) && !__atomic_exchange_n(&told, true, __ATOMIC_RELAXED);
}

}  // namespace ffnas
