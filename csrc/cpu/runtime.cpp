// Scratch memory of each thread, and work shared among PyTorch's threads.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>

#include "ffn.h"
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

struct Work {
  TaskFn fn;
  void* ctx;
  int64_t tasks, next;
};

void work(int64_t, int64_t, void* ctx) {
  Work& w = *static_cast<Work*>(ctx);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&w.next, 1, __ATOMIC_RELAXED);
    if (task >= w.tasks) return;
    w.fn(w.ctx, task);
  }
}

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

int num_threads() {
  uint32_t n = 1;
  if (parallel_for == nullptr || get_num_threads == nullptr || get_num_threads(&n) != 0) return 1;
  return n < 1 ? 1 : static_cast<int>(n);
}

void run_tasks(int64_t tasks, TaskFn fn, void* ctx) {
  Work w{fn, ctx, tasks, 0};
  const int64_t threads = num_threads() < tasks ? num_threads() : tasks;
  if (threads <= 1 || parallel_for(0, threads, 1, work, &w) != 0) work(0, 1, &w);
}

}  // namespace ffnas
