// A stable radix sort of (index, row number). No float is involved, and no atomic that shows.
#include "sort_pairs.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kSortThreads = 256;
constexpr int kSortWarps = kSortThreads / kWarpSize;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
static_assert(kSortThreads == kDigits, "a thread owns a digit");
// Blocks of a pass: each reads the counts of all, so there is no launch that scans them. About as
// many as a device has multiprocessors; more pairs make the tiles longer.
constexpr int64_t kMostTiles = 128;

// Pairs in their order before a pass; the first pass reads them from the indices.
struct SortPass {
  const int64_t* indices;  // [num_rows] in the first pass, else null
  int64_t codes;
  int64_t num_rows;
  const uint32_t* keys_in;
  const uint32_t* rows_in;
  uint32_t* keys_out;
  uint32_t* rows_out;
  int* num_pairs;  // those whose index names a code: counted by the first pass, which drops others
  int* digit_counts;  // [tiles][kDigits]
  int* chunks_done;   // [chunks], set to zero by the first pass
  int64_t chunks;
  int tiles;
  int rounds;  // of kSortThreads pairs in a tile
  int shift;

  // Whether there is a pair at position i, and its key.
  __device__ __forceinline__ bool read(int64_t i, int64_t count, uint32_t* key) const {
    if (i >= count) return false;
    if (!indices) {
      *key = keys_in[i];
      return true;
    }
    const int64_t index = indices[i];
    *key = static_cast<uint32_t>(index);
    return index >= 0 && index < codes;
  }
  __device__ __forceinline__ int64_t count() const { return indices ? num_rows : *num_pairs; }
  __device__ __forceinline__ int64_t first_of_tile() const {
    return static_cast<int64_t>(blockIdx.x) * rounds * kSortThreads;
  }
  __device__ __forceinline__ int digit(uint32_t key) const {
    return static_cast<int>(key >> shift) & (kDigits - 1);
  }
};

// Grid: a block for every tile; it owns the tile's counts of digits. Shared memory: a counter a
// digit (1 KiB). Bytes: 8 a row in the first pass, 4 a pair in others, 1 KiB of counts a tile;
// bound by latency, and by integer atomics of shared memory where many pairs have one digit.
__global__ void __launch_bounds__(kSortThreads)
    count_digits_kernel(const __grid_constant__ SortPass pass) {
  int* counts = shared_memory<int>();
  counts[threadIdx.x] = 0;
  block_barrier();
  const int64_t first = pass.first_of_tile(), count = pass.count();
  for (int r = 0; r < pass.rounds; ++r) {
    const int64_t i = first + r * kSortThreads + threadIdx.x;
    uint32_t key = 0;
    if (pass.read(i, count, &key)) atomic_add(counts + pass.digit(key), 1);
  }
  if (pass.indices) {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x; i < pass.chunks;
         i += static_cast<int64_t>(pass.tiles) * kSortThreads) {
      pass.chunks_done[i] = 0;
    }
  }
  block_barrier();
  pass.digit_counts[static_cast<int>(blockIdx.x) * kDigits + static_cast<int>(threadIdx.x)] =
      counts[threadIdx.x];
}

__device__ __forceinline__ int inclusive_scan_warp(int value) {
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int below = shuffle_up(value, step);
    if (lane_index() >= step) value += below;
  }
  return value;
}

struct ScatterShared {
  int totals[kSortWarps];  // pairs with a digit of the warp's
  // Of the round's pairs, those of a warp with a digit, then the position of the first of them. Two
  // rounds take turns, so that one is cleared while the other is read.
  int positions[2][kSortWarps][kDigits];
};

// Grid: a block for every tile; it owns the positions of its pairs: after the pairs of all tiles
// with a lower digit and those of earlier tiles with the same. A thread keeps a digit and adds up
// its counts over the tiles. Pairs of a round keep their order: by warp, then by lane. Shared
// memory: 16 KiB. Bytes: the counts of all tiles (1 KiB each, from the L2), 8 read and 8 written a
// pair, the writes scattered by digit. Bound by latency: tiles / 8 reads of the counts one after
// the other, then two barriers a round.
__global__ void __launch_bounds__(kSortThreads)
    scatter_kernel(const __grid_constant__ SortPass pass) {
  ScatterShared& shared = *shared_memory<ScatterShared>();
  const int own = static_cast<int>(threadIdx.x), warp = warp_index(), lane = lane_index();
  int earlier = 0, total = 0;
#pragma unroll 8
  for (int t = 0; t < pass.tiles; ++t) {
    const int count = pass.digit_counts[t * kDigits + own];
    if (t < static_cast<int>(blockIdx.x)) earlier += count;
    total += count;
  }
  const int up_to_own = inclusive_scan_warp(total);
  if (lane == kWarpSize - 1) shared.totals[warp] = up_to_own;
  for (int w = 0; w < kSortWarps; ++w) shared.positions[0][w][own] = 0;
  block_barrier();
  int next = earlier + up_to_own - total;  // where the tile's next pair with the own digit goes
  for (int w = 0; w < warp; ++w) next += shared.totals[w];
  if (pass.indices && blockIdx.x == 0 && own == kDigits - 1) *pass.num_pairs = next + total;

  const int64_t first = pass.first_of_tile(), count = pass.count();
  for (int r = 0; r < pass.rounds; ++r) {
    int(*positions)[kDigits] = shared.positions[r % 2];
    const int64_t i = first + r * kSortThreads + threadIdx.x;
    uint32_t key = 0;
    const bool present = pass.read(i, count, &key);
    const int digit = pass.digit(key);
    unsigned same = ballot(present);  // lanes with this lane's digit
    for (int bit = 0; bit < kDigitBits; ++bit) {
      const bool set = (digit >> bit & 1) != 0;
      const unsigned lanes = ballot(set);
      same &= set ? lanes : ~lanes;
    }
    const int before = count_bits(same & ((1u << lane) - 1));
    if (present && before == 0) positions[warp][digit] = count_bits(same);
    block_barrier();
    for (int w = 0; w < kSortWarps; ++w) {
      const int pairs = positions[w][own];
      positions[w][own] = next;
      next += pairs;
      shared.positions[1 - r % 2][w][own] = 0;
    }
    block_barrier();
    if (present) {
      const int position = positions[warp][digit] + before;
      pass.keys_out[position] = key;
      pass.rows_out[position] = pass.indices ? static_cast<uint32_t>(i) : pass.rows_in[i];
    }
  }
}

}  // namespace

PairSort::PairSort(Workspace& workspace, int64_t num_rows) {
  for (uint32_t*& half : keys) half = workspace.take<uint32_t>(num_rows);
  for (uint32_t*& half : rows) half = workspace.take<uint32_t>(num_rows);
  rounds = static_cast<int>(ceil_div(num_rows, kMostTiles * kSortThreads));
  tiles = rounds == 0 ? 0 : static_cast<int>(ceil_div(num_rows, rounds * kSortThreads));
  digit_counts = workspace.take<int>(static_cast<int64_t>(tiles) * kDigits);
  num_pairs = workspace.take<int>(1);
}

cudaError_t launch_sort_pairs(const PairSort& sort, const int64_t* indices, int64_t codes,
                              int64_t num_rows, int* chunks_done, int64_t chunks,
                              SortedPairs* pairs, cudaStream_t stream) {
  int sorted = 0;  // which of the two sets of pairs is the latest
  for (int shift = 0; shift == 0 || (codes - 1) >> shift != 0; shift += kDigitBits) {
    SortPass pass = {};
    pass.indices = shift == 0 ? indices : nullptr;
    pass.codes = codes;
    pass.num_rows = num_rows;
    pass.keys_in = sort.keys[sorted];
    pass.rows_in = sort.rows[sorted];
    sorted = 1 - sorted;
    pass.keys_out = sort.keys[sorted];
    pass.rows_out = sort.rows[sorted];
    pass.num_pairs = sort.num_pairs;
    pass.digit_counts = sort.digit_counts;
    pass.chunks_done = chunks_done;
    pass.chunks = chunks;
    pass.tiles = sort.tiles;
    pass.rounds = sort.rounds;
    pass.shift = shift;
    const dim3 grid(static_cast<unsigned>(sort.tiles));
    TOKENFLOW_CUDA_TRY(
        launch(count_digits_kernel, grid, kSortThreads, kDigits * sizeof(int), stream, pass));
    TOKENFLOW_CUDA_TRY(
        launch(scatter_kernel, grid, kSortThreads, sizeof(ScatterShared), stream, pass));
  }
  *pairs = {sort.keys[sorted], sort.rows[sorted], sort.num_pairs};
  return cudaSuccess;
}

}  // namespace tokenflow::cuda
