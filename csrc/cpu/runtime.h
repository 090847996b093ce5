// What kernels need of the process they run in, beside `scratch`, `num_threads` and `run_tasks` (ffn.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace ffnas {

constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;

// PyTorch's `torch_parallel_for` and `torch_get_num_threads`. Both may be null: then everything runs on the caller.
void set_threads(void* parallel_for, void* get_num_threads);

// The threads that work shared out by the calling thread runs on from now on: a pool's, or PyTorch's (nullptr). Returns
// what it was before.
class Pool;
Pool* use_pool(Pool* pool);

// Whether a thread of this process has begun, for the first time, to do alone what it shared out before, because the
// machine is crowded; true once.
bool newly_crowded();
// Test hook: what `run_tasks` notes after a region of the calling thread (times in ns; `spent`: processor time of all
// threads, -1 where it was not measured). Whether the next region runs on the caller alone.
bool note_region(int64_t now, int64_t took, int64_t spent);

}  // namespace ffnas
