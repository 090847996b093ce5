// What kernels need of the process they run in, beside `scratch`, `num_threads` and `run_tasks` (ffn.h).
#pragma once

#include <cstddef>

namespace ffnas {

constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;

// PyTorch's `torch_parallel_for` and `torch_get_num_threads`. Both may be null: then everything runs on the caller.
void set_threads(void* parallel_for, void* get_num_threads);

}  // namespace ffnas
