// See pool.h.
#include "pool.h"

#include <time.h>

namespace ffnas {
namespace {

// How long a thread without work looks for more before it sleeps. Longer than what lies between two steps of one
// encoder pass, shorter than a turn on the core that somebody else may be waiting for.
constexpr int64_t kSpin = 60 * 1000;  // ns

int64_t now_ns() {
  timespec t;
  return clock_gettime(CLOCK_MONOTONIC, &t) == 0 ? t.tv_sec * int64_t{1000000000} + t.tv_nsec : 0;
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Looks for `ready` for a while; whether it came.
template <class Ready>
bool spin(Ready&& ready) {
  const int64_t until = now_ns() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      pause();
    }
  } while (now_ns() < until);
  return false;
}

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i)
    workers_.emplace_back([this] {
      uint64_t seen = 0;
      while (!ending_.load()) serve(&seen);
    });
}

Pool::~Pool() {
  {
    const std::lock_guard<std::mutex> hold(sleep_);
    ending_.store(true);
  }
  wake_.notify_all();
  for (std::thread& t : workers_) t.join();
}

void Pool::work() {
  for (;;) {
    const int64_t task = next_.fetch_add(1);
    if (task >= tasks_) return;
    fn_(ctx_, task);
    done_.fetch_add(1);
  }
}

// A worker's next job, if it comes in time to take part.
void Pool::serve(uint64_t* seen) {
  const uint64_t before = *seen;
  if (!spin([&] { return jobs_.load() != before || ending_.load(); })) wait(before);
  *seen = jobs_.load();
  inside_.fetch_add(1);
  if (open_.load()) work();  // closed: the others were faster. Sequential consistency: either we see it closed, or
  inside_.fetch_sub(1);      // `run` sees us inside and waits.
}

void Pool::wait(uint64_t seen) {
  std::unique_lock<std::mutex> hold(sleep_);
  asleep_.fetch_add(1);
  wake_.wait(hold, [&] { return jobs_.load() != seen || ending_.load(); });
  asleep_.fetch_sub(1);
}

void Pool::run(int64_t tasks, TaskFn fn, void* ctx) {
  if (workers_.empty() || tasks <= 1) {
    for (int64_t t = 0; t < tasks; ++t) fn(ctx, t);
    return;
  }
  fn_ = fn;
  ctx_ = ctx;
  tasks_ = tasks;
  next_.store(0);
  done_.store(0);
  open_.store(true);
  jobs_.fetch_add(1);
  if (asleep_.load() != 0) {
    {
      const std::lock_guard<std::mutex> hold(sleep_);
    }  // whoever is about to sleep has looked before this, or looks after
    wake_.notify_all();
  }
  work();
  const auto finished = [&] { return done_.load() == tasks; };
  while (!spin(finished)) std::this_thread::yield();  // a task's thread lost its core
  open_.store(false);
  const auto alone = [&] { return inside_.load() == 0; };
  while (!spin(alone)) std::this_thread::yield();
}

}  // namespace ffnas
