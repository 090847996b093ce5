// Kernels around rows.cuh: forward, backward with column sums, and the second stage of those sums. C interface at the
// end.
//
// Teams walk the rows with the stride of the grid and keep their column sums in shared memory; at the end a block adds
// those of its teams and writes one partial row per sum. A second kernel adds the blocks' rows in a fixed order: the
// same bits on every run, without atomics.
//
// Chosen: z and the sums in shared memory, one kernel for any width. Rejected: register tiles by width (a kernel per
// width class for a few percent of shared memory traffic), and atomics for the sums.
#include "calls.h"

namespace ffnas {
namespace cuda {

constexpr int kRowWarps = 4;   // warps of a block whose teams are warps
constexpr int kWideWarps = 8;  // warps of a block that is one team

// Sums that must be kept, in front of absent ones: kSumDy2 is the last, so a count says it all.
FFNAS_DEVICE int sums_of(const Rows& rows) { return rows.dy2.data != nullptr ? kRowSums : kRowSums - 1; }

template <int kWarps, int kBlockWarps>
FFNAS_KERNEL(kBlockWarps* kWarp, 1)
rows_fwd_kernel(FFNAS_ARGUMENT Rows rows, const int32_t* program, int slots_per_thread, int64_t tokens) {
  constexpr int kThreads = kBlockWarps * kWarp, kTeams = kBlockWarps / kWarps;
  Carver carver(shared_memory());
  SegmentCode* post = carver.take<SegmentCode>(1);
  float* scratch = carver.take<float>(kBlockWarps);
  const Slots slots(carver.take<Float4>(kThreads * slots_per_thread), kThreads);
  const int team = thread() / (kWarps * kWarp);
  float* z = carver.take<float>(0) + team * padded(rows.hidden);
  load_segment(*post, program, kPost, kThreads);
  sync_threads();
  for (int64_t row = int64_t{block()} * kTeams + team; row < tokens; row += int64_t{blocks()} * kTeams)
    row_forward(rows, row, *post, slots, z, Team<kWarps>{scratch});
}

template <int kWarps, int kBlockWarps>
FFNAS_KERNEL(kBlockWarps* kWarp, 1)
rows_bwd_kernel(FFNAS_ARGUMENT Rows rows, const int32_t* program, int slots_per_thread, int64_t tokens,
                float* partial) {
  constexpr int kThreads = kBlockWarps * kWarp, kTeams = kBlockWarps / kWarps;
  const int width = padded(rows.hidden), kinds = sums_of(rows);
  Carver carver(shared_memory());
  SegmentCode* segments = carver.take<SegmentCode>(2);
  float* scratch = carver.take<float>(kBlockWarps);
  const Slots slots(carver.take<Float4>(kThreads * slots_per_thread), kThreads);
  float* all_sums = carver.take<float>(int64_t{kTeams} * kinds * width);
  const int team = thread() / (kWarps * kWarp);
  float* sums = all_sums + team * kinds * width;
  float* z = carver.take<float>(0) + team * width;
  load_segment(segments[0], program, kPost, kThreads);
  load_segment(segments[1], program, kPostBwd, kThreads);
  for (int i = thread(); i < kTeams * kinds * width; i += kThreads) all_sums[i] = 0.0f;
  sync_threads();
  for (int64_t row = int64_t{block()} * kTeams + team; row < tokens; row += int64_t{blocks()} * kTeams)
    row_backward<kWarps, kRowSums>(rows, row, segments, slots, z, sums, width, Team<kWarps>{scratch});
  sync_threads();
  float* own = partial + int64_t{block()} * kinds * width;
  for (int i = thread(); i < kinds * width; i += kThreads) {
    float total = 0.0f;
    for (int k = 0; k < kTeams; ++k) total += all_sums[k * kinds * width + i];
    own[i] = total;
  }
}

// Block b adds 32 columns of one kind over all rows of `partial` [count, kinds, width].
FFNAS_KERNEL(8 * kWarp, 1)
column_sums_kernel(const float* partial, int count, int kinds, int width, int hidden, FFNAS_ARGUMENT SumOutputs out) {
  float* share = Carver(shared_memory()).take<float>(8 * kWarp);
  const int columns = (width + kWarp - 1) / kWarp;
  const int kind = block() / columns, column = block() % columns * kWarp + lane();
  float total = 0.0f;
  if (column < hidden)
    for (int k = warp(); k < count; k += 8) total += partial[(int64_t{k} * kinds + kind) * width + column];
  share[thread()] = total;
  sync_threads();
  if (warp() != 0 || column >= hidden) return;
  total = 0.0f;
#pragma unroll
  for (int k = 0; k < 8; ++k) total += share[k * kWarp + lane()];
  const View& to = out.of[kind];
  if (to.data == nullptr) return;
  if (to.dtype == kFloat32) {
    static_cast<float*>(to.data)[column] = total;
  } else if (to.dtype == kBFloat16) {
    static_cast<BFloat16*>(to.data)[column] = element_of<BFloat16>(total);
  } else {
    static_cast<Half*>(to.data)[column] = element_of<Half>(total);
  }
}

namespace {

int64_t round16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Bytes of dynamic shared memory of a block, with `warps` warps in `teams` teams.
int64_t shared_bytes(int64_t hidden, int slots, int warps, int teams, int segments, int kinds) {
  const int64_t width = (hidden + 3) / 4 * 4;
  return round16(segments * int64_t{sizeof(SegmentCode)}) + round16(warps * 4) + int64_t{warps} * kWarp * slots * 16 +
         round16(int64_t{teams} * (kinds + 1) * width * 4);
}

}  // namespace
}  // namespace cuda
}  // namespace ffnas

using namespace ffnas::cuda;

// Shared memory of a block in bytes, so that the caller can choose between narrow and wide teams, and decline.
FFNAS_EXPORT int64_t ffnas_rows_shared(int64_t hidden, int64_t slots, int64_t wide, int64_t backward) {
  const int warps = wide ? kWideWarps : kRowWarps;
  return shared_bytes(hidden, static_cast<int>(slots), warps, wide ? 1 : warps, backward ? 2 : 1,
                      backward ? kRowSums : 0);
}

FFNAS_EXPORT int ffnas_rows_forward(const RowCall* call) {
  const DeviceScope scope(static_cast<int>(call->device));
  const int slots = static_cast<int>(call->slots), grid = static_cast<int>(call->blocks);
  const int64_t shared = ffnas_rows_shared(call->rows.hidden, slots, call->wide, 0);
  if (call->wide)
    return launch(rows_fwd_kernel<kWideWarps, kWideWarps>, grid, kWideWarps * kWarp, shared, call->stream, call->rows,
                  call->program, slots, call->tokens);
  return launch(rows_fwd_kernel<1, kRowWarps>, grid, kRowWarps * kWarp, shared, call->stream, call->rows, call->program,
                slots, call->tokens);
}

FFNAS_EXPORT int ffnas_rows_backward(const RowCall* call) {
  const DeviceScope scope(static_cast<int>(call->device));
  const int slots = static_cast<int>(call->slots), grid = static_cast<int>(call->blocks);
  const int64_t shared = ffnas_rows_shared(call->rows.hidden, slots, call->wide, 1);
  const int status =
      call->wide ? launch(rows_bwd_kernel<kWideWarps, kWideWarps>, grid, kWideWarps * kWarp, shared, call->stream,
                          call->rows, call->program, slots, call->tokens, call->partial)
                 : launch(rows_bwd_kernel<1, kRowWarps>, grid, kRowWarps * kWarp, shared, call->stream, call->rows,
                          call->program, slots, call->tokens, call->partial);
  if (status != 0) return status;
  const int kinds = call->rows.dy2.data != nullptr ? kRowSums : kRowSums - 1;
  const int hidden = static_cast<int>(call->rows.hidden), width = (hidden + 3) / 4 * 4;
  return launch(column_sums_kernel, kinds * ((width + kWarp - 1) / kWarp), 8 * kWarp, 8 * kWarp * 4, call->stream,
                call->partial, grid, kinds, width, hidden, call->sums);
}
