// Sums of rows by index without atomics on floats: a stable radix sort of (index, row number), then
// every code adds its own rows in row order.
#include <climits>

#include "quantizer.h"
#include "search.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kSortThreads = 256;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kSortWarps = kSortThreads / kWarpSize;
constexpr int kSortRounds = 8;
constexpr int kSortTile = kSortThreads * kSortRounds;  // pairs a block sorts by one digit
static_assert(kSortThreads == kDigits, "a thread owns a digit");

constexpr int kSumThreads = 256;
constexpr int kSumWarps = kSumThreads / kWarpSize;
// A code with more rows than this is summed by the whole block.
constexpr int64_t kLongSegment = 512;

struct SortPass {
  const int64_t* indices;   // of the first pass, else null
  const uint32_t* keys_in;  // of later passes
  const uint32_t* rows_in;  // likewise
  uint32_t* keys_out;
  uint32_t* rows_out;
  int* offsets;   // [kDigits][tiles]
  int64_t codes;  // also the key of an index that names no code: it sorts last
  int64_t count;
  int64_t tiles;
  int shift;

  __device__ __forceinline__ uint32_t key(int64_t i) const {
    if (!indices) return keys_in[i];
    return static_cast<uint32_t>(indices[i] >= 0 && indices[i] < codes ? indices[i] : codes);
  }
  __device__ __forceinline__ int digit(uint32_t key) const {
    return static_cast<int>(key >> shift) & (kDigits - 1);
  }
};

// Grid: a block for every tile of kSortTile pairs; it owns the tile's histogram. Shared memory: a
// counter a digit (1 KiB). Bytes: 4 to 8 a pair; bound by shared atomics on integers.
__global__ void __launch_bounds__(kSortThreads)
    count_digits_kernel(const __grid_constant__ SortPass pass) {
  int* counts = shared_memory<int>();
  counts[threadIdx.x] = 0;
  block_barrier();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSortTile;
  for (int r = 0; r < kSortRounds; ++r) {
    const int64_t i = first + r * kSortThreads + threadIdx.x;
    if (i < pass.count) atomic_add(counts + pass.digit(pass.key(i)), 1);
  }
  block_barrier();
  pass.offsets[threadIdx.x * pass.tiles + blockIdx.x] = counts[threadIdx.x];
}

__device__ __forceinline__ int inclusive_scan_warp(int value) {
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int below = shuffle_up(value, step);
    if (lane_index() >= step) value += below;
  }
  return value;
}

// Grid: one block, which turns counts into where each digit of each tile begins. Shared memory: an
// int a warp. Bytes: 8 a counter, in rounds of kSortThreads: bound by latency, 13 rounds for the
// 26,144 tokens of a batch of 32.
__global__ void __launch_bounds__(kSortThreads) exclusive_scan_kernel(int* values, int64_t count) {
  int* warp_totals = shared_memory<int>();
  int carry = 0;
  for (int64_t first = 0; first < count; first += kSortThreads) {
    const int64_t i = first + threadIdx.x;
    const int value = i < count ? values[i] : 0;
    const int inclusive = inclusive_scan_warp(value);
    if (lane_index() == kWarpSize - 1) warp_totals[warp_index()] = inclusive;
    block_barrier();
    int before = carry;
    for (int w = 0; w < kSortWarps; ++w) {
      if (w < warp_index()) before += warp_totals[w];
      carry += warp_totals[w];
    }
    if (i < count) values[i] = before + inclusive - value;
    block_barrier();
  }
}

struct ScatterShared {
  int next[kDigits];              // where the tile's next pair with this digit goes
  int warp[kSortWarps][kDigits];  // pairs of a warp with this digit, then where they begin
};

// Grid: a block for every tile of kSortTile pairs; it owns the places that the scan gave the tile.
// The pairs of a round keep their order: by warp, then by lane. Shared memory: 9 KiB.
// Bytes: 8 read and 8 written a pair, the writes scattered by digit, which bounds it.
__global__ void __launch_bounds__(kSortThreads)
    scatter_kernel(const __grid_constant__ SortPass pass) {
  ScatterShared& shared = *shared_memory<ScatterShared>();
  const int own = static_cast<int>(threadIdx.x);  // the digit that this thread keeps
  shared.next[own] = pass.offsets[own * pass.tiles + blockIdx.x];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSortTile;
  for (int r = 0; r < kSortRounds; ++r) {
    const int64_t i = first + r * kSortThreads + threadIdx.x;
    const bool present = i < pass.count;
    const uint32_t key = present ? pass.key(i) : 0;
    const int digit = pass.digit(key);
    for (int w = 0; w < kSortWarps; ++w) shared.warp[w][own] = 0;
    block_barrier();
    unsigned same = ballot(present);  // lanes with this lane's digit
    for (int bit = 0; bit < kDigitBits; ++bit) {
      const bool set = (digit >> bit & 1) != 0;
      const unsigned lanes = ballot(set);
      same &= set ? lanes : ~lanes;
    }
    const int before = count_bits(same & ((1u << lane_index()) - 1));
    if (present && before == 0) shared.warp[warp_index()][digit] = count_bits(same);
    block_barrier();
    for (int w = 0; w < kSortWarps; ++w) {
      const int count = shared.warp[w][own];
      shared.warp[w][own] = shared.next[own];
      shared.next[own] += count;
    }
    block_barrier();
    if (present) {
      const int place = shared.warp[warp_index()][digit] + before;
      pass.keys_out[place] = key;
      pass.rows_out[place] = pass.indices ? static_cast<uint32_t>(i) : pass.rows_in[i];
    }
    block_barrier();
  }
}

// The first place whose key is not below `key`.
__device__ __forceinline__ int64_t lower_bound(const uint32_t* keys, int64_t count, uint32_t key) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (keys[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ double sum_column(const SegmentSumArgs<float>& args,
                                             const uint32_t* order, int64_t begin, int64_t end,
                                             int64_t d) {
  double sum = 0;
  for (int64_t k = begin; k < end; ++k) {
    sum += static_cast<double>(args.rows[static_cast<int64_t>(order[k]) * args.dim + d]);
  }
  return sum;
}

struct SumShared {
  int64_t begin[kSumWarps];
  int64_t end[kSumWarps];
  double partial[kSumWarps][kWarpSize];
};

// Grid: a warp a code, kSumWarps codes a block; a warp owns its code's sums. A code with more than
// kLongSegment rows is left to the whole block, cut in equal parts that are added in order.
// Shared memory: 2.1 KiB. Bytes: 4 dim rows read, 4 dim codes written; bound by memory.
__global__ void __launch_bounds__(kSumThreads)
    sum_segments_kernel(const __grid_constant__ SegmentSumArgs<float> args, const uint32_t* keys,
                        const uint32_t* order) {
  SumShared& shared = *shared_memory<SumShared>();
  const int warp = warp_index(), lane = lane_index();
  const int64_t first_code = static_cast<int64_t>(blockIdx.x) * kSumWarps;
  const int64_t code = first_code + warp;
  int64_t begin = 0, end = 0;
  if (code < args.codes) {
    begin = lower_bound(keys, args.num_rows, static_cast<uint32_t>(code));
    end = lower_bound(keys, args.num_rows, static_cast<uint32_t>(code + 1));
    if (lane == 0) args.counts[code] = end - begin;
    if (end - begin <= kLongSegment) {
      for (int64_t d = lane; d < args.dim; d += kWarpSize) {
        args.sums[code * args.dim + d] = static_cast<float>(sum_column(args, order, begin, end, d));
      }
    }
  }
  if (lane == 0) {
    shared.begin[warp] = begin;
    shared.end[warp] = end;
  }
  block_barrier();
  for (int w = 0; w < kSumWarps; ++w) {
    const int64_t count = shared.end[w] - shared.begin[w];
    if (count <= kLongSegment) continue;  // the same for the whole block
    const int64_t part = (count + kSumWarps - 1) / kSumWarps;
    const int64_t part_begin = shared.begin[w] + warp * part;
    const int64_t part_end = part_begin + part < shared.end[w] ? part_begin + part : shared.end[w];
    for (int64_t d0 = 0; d0 < args.dim; d0 += kWarpSize) {
      const int64_t d = d0 + lane;
      shared.partial[warp][lane] =
          d < args.dim ? sum_column(args, order, part_begin, part_end, d) : 0.0;
      block_barrier();
      if (warp == 0 && d < args.dim) {
        double total = 0;
        for (int v = 0; v < kSumWarps; ++v) total += shared.partial[v][lane];
        args.sums[(first_code + w) * args.dim + d] = static_cast<float>(total);
      }
      block_barrier();
    }
  }
}

struct SortScratch {
  uint32_t* keys[2];
  uint32_t* rows[2];
  int64_t tiles;
  int* offsets;

  SortScratch(Workspace& workspace, int64_t num_rows)
      : keys{workspace.take<uint32_t>(num_rows), workspace.take<uint32_t>(num_rows)},
        rows{workspace.take<uint32_t>(num_rows), workspace.take<uint32_t>(num_rows)},
        tiles(ceil_div(num_rows, kSortTile)),
        offsets(workspace.take<int>(kDigits * tiles)) {}
};

}  // namespace

size_t segment_sum_workspace_bytes(const SegmentSumArgs<float>& args) {
  Workspace workspace(nullptr);
  const SortScratch scratch(workspace, args.num_rows);
  (void)scratch;
  return workspace.bytes();
}

cudaError_t launch_segment_sum(const SegmentSumArgs<float>& args, void* workspace_memory,
                               cudaStream_t stream) {
  if (args.codes < 1 || args.codes > (int64_t{1} << 30) || args.num_rows < 0 ||
      args.num_rows > INT_MAX) {
    return cudaErrorInvalidValue;
  }
  if (args.num_rows == 0) {
    TF_CUDA_TRY(
        cudaMemsetAsync(args.counts, 0, static_cast<size_t>(args.codes) * sizeof(int64_t), stream));
    return cudaMemsetAsync(args.sums, 0, static_cast<size_t>(args.codes * args.dim) * sizeof(float),
                           stream);
  }
  Workspace workspace(workspace_memory);
  const SortScratch scratch(workspace, args.num_rows);
  int sorted = 0;  // which of the two sets of pairs is the latest
  for (int shift = 0; args.codes >> shift != 0; shift += kDigitBits) {
    SortPass pass = {};
    pass.indices = shift == 0 ? args.indices : nullptr;
    pass.keys_in = scratch.keys[sorted];
    pass.rows_in = scratch.rows[sorted];
    sorted = 1 - sorted;
    pass.keys_out = scratch.keys[sorted];
    pass.rows_out = scratch.rows[sorted];
    pass.offsets = scratch.offsets;
    pass.codes = args.codes;
    pass.count = args.num_rows;
    pass.tiles = scratch.tiles;
    pass.shift = shift;
    const dim3 grid(static_cast<unsigned>(scratch.tiles));
    TF_CUDA_TRY(
        launch(count_digits_kernel, grid, kSortThreads, kDigits * sizeof(int), stream, pass));
    TF_CUDA_TRY(launch(exclusive_scan_kernel, dim3(1), kSortThreads, kSortWarps * sizeof(int),
                       stream, scratch.offsets, kDigits * scratch.tiles));
    TF_CUDA_TRY(launch(scatter_kernel, grid, kSortThreads, sizeof(ScatterShared), stream, pass));
  }
  return launch(sum_segments_kernel, dim3(static_cast<unsigned>(ceil_div(args.codes, kSumWarps))),
                kSumThreads, sizeof(SumShared), stream, args, scratch.keys[sorted],
                scratch.rows[sorted]);
}

}  // namespace tokenflow::cuda
