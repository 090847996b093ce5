// Threads of a session's own. PyTorch's wait for one another at the end of every parallel region, all of them,
// spinning: beside another busy process a region takes as long as the slowest thread's next turn on a core. Here only
// threads that took a task are waited for. One that has lost its core, or sleeps, is not missed: the others do its
// share.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "ffn.h"

namespace ffnas {

class Pool {
 public:
  // `threads` with the caller's: threads - 1 are started.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs fn(ctx, task) for every task, the caller taking part; returns when all are done. One caller at a time.
  void run(int64_t tasks, TaskFn fn, void* ctx);

  // A caller that holds this lock has the pool to itself.
  std::mutex& lock() { return lock_; }

 private:
  void work();
  void serve(uint64_t* seen);
  void wait(uint64_t seen);

  // The job at hand. Written while it is closed and nobody is inside.
  TaskFn fn_ = nullptr;
  void* ctx_ = nullptr;
  int64_t tasks_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> open_{false};
  std::atomic<int> inside_{0};
  alignas(64) std::atomic<uint64_t> jobs_{0};  // how many there were
  std::atomic<int> asleep_{0};
  std::atomic<bool> ending_{false};
  std::mutex sleep_, lock_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace ffnas
