// Scores of rows x codes in half precision, in registers: what is kept is one record for a row and
// a few tiles of codes. Here with products of a warp, which every device has.
#include <cstdint>

#include "coarse_score.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kScoreThreads = 128;
constexpr int kScoreWarps = kScoreThreads / kWarpSize;

// Tiles of codes on their way to a block: one is multiplied while the next two are loaded.
constexpr int kStages = 3;

// A warp's part of one fragment of rows times one fragment of codes; sums [code / 8] of one step.
template <int kFragments>
__device__ __forceinline__ void multiply_step(float (&sums)[2][kFragments][4],
                                              const uint4 (&rows)[kFragments], const uint4& codes) {
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    const uint4& row = rows[f];
    multiply_add_16x8x16(sums[0][f], row.x, row.y, row.z, row.w, codes.x, codes.y);
    multiply_add_16x8x16(sums[1][f], row.x, row.y, row.z, row.w, codes.z, codes.w);
  }
}

// Writes the warp's records; each lane those of neighbouring rows. `to` is that of the warp's first
// row, and `stride` further is that of the next.
template <int kFragments>
__device__ __forceinline__ void store_records(Records<2 * kFragments>& records, ScoreRecord* to,
                                              int64_t stride) {
  reduce_quad(records.row, merge_records);
#pragma unroll
  for (int i = 0; i < kFragments / 2; ++i) to[(32 * i + quad_vector()) * stride] = records.row[i];
}

// Copies kCount times 16 bytes to shared memory with the whole block.
template <int kCount>
__device__ __forceinline__ void copy_block(uint4* to, const uint4* from) {
  static_assert(kCount % kScoreThreads == 0, "as many for each thread");
  to += threadIdx.x;
  from += threadIdx.x;
#pragma unroll
  for (int i = 0; i < kCount; i += kScoreThreads) copy_async(to + i, from + i);
}

// The stage after `stage`, of kCount that take turns.
template <int kCount>
__device__ __forceinline__ int next_stage(int stage) {
  return stage + 1 == kCount ? 0 : stage + 1;
}

// Operands of kSteps steps, held in registers on the side of the rows.
// Grid: (blocks of 64 kFragments rows, runs of tiles of codes, codebooks); a block owns the records
// of its rows over its tiles. A warp holds kFragments fragments of 16 rows and multiplies them with
// each fragment of 16 codes in turn: 2 kFragments x kSteps products of 16 x 8 x 16 to kSteps loads
// of shared memory and 14 kFragments instructions for the records. Shared memory: kStages tiles of
// 4 kSteps KiB, 36 KiB for TokenFlow's 40 channels. Bytes: 32 kSteps (rows * runs + codes * blocks
// of rows) read, from the L2, and 8 rows * records written. Operations: 32 kSteps rows codes; bound
// by the tensor cores.
template <int kSteps, int kFragments>
__global__ void __launch_bounds__(kScoreThreads, kSteps <= 3 ? 4 : (kSteps == 4 ? 3 : 2))
    coarse_score_kernel(const __grid_constant__ SearchArgs args, int64_t first_row,
                        int64_t num_rows, const ScoreRuns runs) {
  constexpr int kTile = kSteps * kTileFragments * kWarpSize;
  if (is_dropped(args)) return;
  const ScoreBlock block(args, kScoreWarps * kFragments * kFragmentVectors, runs);
  const int64_t warp_row = block.row + warp_index() * kFragments * kFragmentVectors;
  const bool has_rows = warp_row < num_rows;
  uint4 rows[kSteps][kFragments];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const int64_t n = block.packed_row(args) + first_row + warp_row + f * kFragmentVectors;
      rows[s][f] = args.packed.fragments[fragment_index(n, s, kSteps) + lane_index()];
    }
  }

  uint4* shared = shared_memory<uint4>();
  const uint4* next = args.codes.fragments + block.packed_tile(args) * kTile;
  int fetched = 0, into = 0;
  const auto fetch = [&] {
    if (fetched < block.tiles) copy_block<kTile>(shared + into * kTile, next);
    commit_copies();
    ++fetched;
    next += kTile;
    into = next_stage<kStages>(into);
  };
  for (int i = 0; i < kStages - 1; ++i) fetch();
  Records<2 * kFragments> records;
  records.clear();
  int from = 0;
  for (int i = 0; i < block.tiles; ++i) {
    wait_for_copies<kStages - 2>();
    block_barrier();  // tile i is there, and tile i - 1 is no longer read
    fetch();
    const uint4* codes = shared + from * kTile + lane_index();
    from = next_stage<kStages>(from);
    if (!has_rows) continue;
    int tag = group_tag(i & (runs.record_tiles - 1), 0, lane_index() % 4);
    // Not unrolled: loads would move ahead until registers are spilled, and other warps hide them.
#pragma unroll 1
    for (int c = 0; c < kTileFragments; ++c) {
      float sums[2][kFragments][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        multiply_step(sums, rows[s], codes[(s * kTileFragments + c) * kWarpSize]);
      }
      update_records(sums, tag, records);
      tag += group_tag(0, 1, 0);
    }
    if (ends_record(runs, block, i)) {
      store_records<kFragments>(records,
                                records_of(args, runs, num_rows, block.book) +
                                    record_index(runs, block, warp_row - block.row, i),
                                runs.num_records);
      records.clear();
    }
  }
}

constexpr int kWideFragments = 2;
constexpr int kWideRows = kScoreWarps * kWideFragments * kFragmentVectors;
constexpr int kWideStages = 4;
constexpr int kWideChunk = kWideSteps * kTileFragments * kWarpSize;  // of rows, and of codes
static_assert(kWideRows == kTileVectors, "a block's rows are a tile of packed vectors");
static_assert(kWideRows == kBlockRows / 2, "see score_block_rows");

// Operands of any number of steps, kWideSteps at a time on both sides.
// Grid: (blocks of kWideRows rows, runs of tiles of codes, codebooks). A warp holds the
// scores of 32 rows and a tile of codes. Shared memory: kWideStages chunks of both operands, 64
// KiB. Bytes: a block reads its rows again for each of its tiles. Bound by the tensor cores, or by
// the L2 (32 bytes a clock and multiprocessor at the rate of compute
// capability 8.0).
__global__ void __launch_bounds__(kScoreThreads, 2)
    coarse_score_wide_kernel(const __grid_constant__ SearchArgs args, int64_t first_row,
                             int64_t num_rows, const ScoreRuns runs) {
  if (is_dropped(args)) return;
  const ScoreBlock block(args, kWideRows, runs);
  const int warp_row = warp_index() * kWideFragments * kFragmentVectors;
  const int chunks = operand_steps(args.layout.dim) / kWideSteps;
  uint4* shared = shared_memory<uint4>();
  const uint4* rows = args.packed.fragments + (block.packed_row(args) + first_row + block.row) /
                                                  kTileVectors * chunks * kWideChunk;
  const uint4* codes = args.codes.fragments + block.packed_tile(args) * chunks * kWideChunk;

  const int64_t steps = static_cast<int64_t>(block.tiles) * chunks;
  int64_t fetched = 0;
  int fetched_chunk = 0, into = 0;
  const auto fetch = [&] {
    if (fetched < steps) {
      uint4* stage = shared + into * 2 * kWideChunk;
      copy_block<kWideChunk>(stage, rows + fetched_chunk * kWideChunk);
      copy_block<kWideChunk>(stage + kWideChunk, codes + fetched * kWideChunk);
    }
    commit_copies();
    ++fetched;
    fetched_chunk = fetched_chunk + 1 == chunks ? 0 : fetched_chunk + 1;
    into = next_stage<kWideStages>(into);
  };
  for (int i = 0; i < kWideStages - 1; ++i) fetch();
  Records<2 * kWideFragments> records;
  records.clear();
  int from = 0;
  for (int i = 0; i < block.tiles; ++i) {
    float sums[kTileFragments][2][kWideFragments][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_for_copies<kWideStages - 2>();
      block_barrier();  // this chunk is there, and the one before is no longer read
      fetch();
      const uint4* stage = shared + from * 2 * kWideChunk + lane_index();
      from = next_stage<kWideStages>(from);
#pragma unroll
      for (int s = 0; s < kWideSteps; ++s) {
        const uint4* step = stage + s * kTileFragments * kWarpSize;
        uint4 row[kWideFragments];
#pragma unroll
        for (int f = 0; f < kWideFragments; ++f) {
          row[f] = step[(warp_row / kFragmentVectors + f) * kWarpSize];
        }
#pragma unroll
        for (int c = 0; c < kTileFragments; ++c) {
          multiply_step(sums[c], row, step[kWideChunk + c * kWarpSize]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kTileFragments; ++c) {
      update_records(sums[c], group_tag(i & (runs.record_tiles - 1), c, lane_index() % 4), records);
    }
    if (ends_record(runs, block, i)) {
      store_records<kWideFragments>(
          records,
          records_of(args, runs, num_rows, block.book) + record_index(runs, block, warp_row, i),
          runs.num_records);
      records.clear();
    }
  }
}

using CoarseScoreKernel = void (*)(SearchArgs, int64_t, int64_t, ScoreRuns);

template <int kFragments>
CoarseScoreKernel coarse_score_kernel_for(int steps) {
  switch (steps) {
    case 1:
      return coarse_score_kernel<1, kFragments>;
    case 2:
      return coarse_score_kernel<2, kFragments>;
    case 3:
      return coarse_score_kernel<3, kFragments>;
    case 4:
      return coarse_score_kernel<4, kFragments>;
    default:
      static_assert(kMostSteps == 5, "a kernel for every number of steps");
      return coarse_score_kernel<5, kFragments>;
  }
}

// Blocks that keep a multiprocessor's tensor cores busy: one fewer than it holds at once (see
// __launch_bounds__), or the one of four warpgroups.
int enough_blocks(const PackedCodes& codes, int steps) {
  if (codes.order == FragmentOrder::kByWord) return 1;
  return steps <= 3 ? 3 : (steps == 4 ? 2 : 1);
}

}  // namespace

// Few tiles a block make many blocks, each of which begins by loading rows; many leave some
// multiprocessors idle at the end. Of what a block may take (1, 2 or a multiple of 4 tiles, so that
// records end with it), the number is chosen for which the busiest multiprocessor has least to do,
// when a block's beginning counts as half a tile.
ScoreRuns::ScoreRuns(const SearchArgs& args, int64_t num_rows) {
  const int steps = operand_steps(args.layout.dim);
  const int64_t tiles = num_tiles(args.layout);
  const int64_t row_blocks =
      args.layout.books * ceil_div(num_rows, score_block_rows(steps, num_rows));
  const int64_t enough = enough_blocks(args.codes, steps);
  // The second grid dimension ends at 65,535.
  int64_t least = ceil_div(tiles, int64_t{65535});
  if (num_rows > kFewRows || least > 2) least = ceil_div(least, kRecordTiles) * kRecordTiles;
  int64_t best_cost = INT64_MAX;
  for (int64_t t = least; t < tiles + kRecordTiles; t += t < kRecordTiles ? t : kRecordTiles) {
    const int64_t blocks = ceil_div(row_blocks * ceil_div(tiles, t), int64_t{args.multiprocessors});
    const int64_t cost = (blocks > enough ? blocks : enough) * (2 * (t < tiles ? t : tiles) + 1);
    if (cost < best_cost) {
      best_cost = cost;
      tiles_per_block = static_cast<int>(t);
    }
    if (blocks <= enough) break;  // more tiles take longer
  }
  record_tiles = tiles_per_block < kRecordTiles ? tiles_per_block : kRecordTiles;
  num_records = ceil_div(tiles, record_tiles);
}

cudaError_t launch_coarse_score(const SearchArgs& args, int64_t first_row, int64_t num_rows,
                                const ScoreRuns& runs, cudaStream_t stream) {
  if (args.codes.order == FragmentOrder::kByWord) {
    return launch_warpgroup_score(args, first_row, num_rows, runs, stream);
  }
  const int steps = operand_steps(args.layout.dim);
  CoarseScoreKernel kernel = coarse_score_wide_kernel;
  int shared_vectors = 2 * kWideChunk * kWideStages;
  if (steps <= kMostSteps) {
    kernel = has_few_rows(num_rows) ? coarse_score_kernel_for<2>(steps)
                                    : coarse_score_kernel_for<4>(steps);
    shared_vectors = steps * kTileFragments * kWarpSize * kStages;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(num_rows, score_block_rows(steps, num_rows))),
                  static_cast<unsigned>(ceil_div(num_tiles(args.layout), runs.tiles_per_block)),
                  static_cast<unsigned>(args.layout.books));
  return launch(kernel, grid, kScoreThreads, static_cast<size_t>(shared_vectors) * sizeof(uint4),
                stream, args, first_row, num_rows, runs);
}

}  // namespace tokenflow::cuda
