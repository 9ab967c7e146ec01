// Scores of rows x codes in half precision, in registers: what is kept is one maximum for a row and
// a tile of codes.
#include "search.cuh"

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

// A thread's scores of 16 codes go into its running maxima, [8 j + lane / 4] as in quad_vector.
template <int kFragments>
__device__ __forceinline__ void update_maxima(const float (&sums)[2][kFragments][4],
                                              float (&best)[2 * kFragments]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {  // fmaxf passes over NaN
      best[2 * f] = fmaxf(fmaxf(best[2 * f], sums[i][f][0]), sums[i][f][1]);
      best[2 * f + 1] = fmaxf(fmaxf(best[2 * f + 1], sums[i][f][2]), sums[i][f][3]);
    }
  }
}

// The maxima of a tile for the warp's rows; each lane writes those of neighbouring rows.
template <int kFragments>
__device__ __forceinline__ void store_maxima(float (&best)[2 * kFragments], float* tile_max) {
  reduce_quad(best, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
  for (int i = 0; i < kFragments / 2; ++i) tile_max[32 * i + quad_vector()] = best[i];
}

// What a CUDA block of the coarse scores owns: its rows, and a run of tiles of codes.
struct ScoreBlock {
  int64_t row;  // from the first of the launch
  int64_t first_tile;
  int tiles;

  __device__ __forceinline__ ScoreBlock(const SearchArgs& args, int rows, int tiles_per_block)
      : row(static_cast<int64_t>(blockIdx.x) * rows),
        first_tile(static_cast<int64_t>(blockIdx.y) * tiles_per_block) {
    const int64_t left = num_tiles(args) - first_tile;
    tiles = left < tiles_per_block ? static_cast<int>(left) : tiles_per_block;
  }
};

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
// Grid: (blocks of 64 kFragments rows, runs of `tiles_per_block` tiles of codes); a block owns the
// maxima of its rows over its tiles. A warp holds kFragments fragments of 16 rows and multiplies
// them with each fragment of 16 codes in turn: 2 kFragments x kSteps products of 16 x 8 x 16 to
// kSteps loads of shared memory and 8 kFragments maxima.
// Shared memory: kStages tiles of 4 kSteps KiB, 36 KiB for TokenFlow's 40 channels.
// Bytes: 32 kSteps (rows * runs + codes * blocks of rows) read, from the L2, and
// 4 rows * tiles written. Operations: 32 kSteps rows codes; bound by the tensor cores.
template <int kSteps, int kFragments>
__global__ void __launch_bounds__(kScoreThreads, kSteps <= 3 ? 4 : (kSteps == 4 ? 3 : 2))
    coarse_score_kernel(const __grid_constant__ SearchArgs args, int64_t first_row,
                        int64_t num_rows, int tiles_per_block) {
  constexpr int kTile = kSteps * kTileFragments * kWarpSize;
  if (is_dropped(args)) return;
  const ScoreBlock block(args, kScoreWarps * kFragments * kFragmentVectors, tiles_per_block);
  const int64_t warp_row = block.row + warp_index() * kFragments * kFragmentVectors;
  const bool has_rows = warp_row < num_rows;
  uint4 rows[kSteps][kFragments];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const int64_t n = first_row + warp_row + f * kFragmentVectors;
      rows[s][f] = args.packed.fragments[fragment_index(n, s, kSteps) + lane_index()];
    }
  }

  uint4* shared = shared_memory<uint4>();
  const uint4* next = args.codes.fragments + block.first_tile * kTile;
  int fetched = 0, into = 0;
  const auto fetch = [&] {
    if (fetched < block.tiles) copy_block<kTile>(shared + into * kTile, next);
    commit_copies();
    ++fetched;
    next += kTile;
    into = next_stage<kStages>(into);
  };
  for (int i = 0; i < kStages - 1; ++i) fetch();
  const int64_t stride = padded_rows(num_rows);
  float* tile_max = args.tile_max + block.first_tile * stride + warp_row;
  int from = 0;
  for (int i = 0; i < block.tiles; ++i) {
    wait_for_copies<kStages - 2>();
    block_barrier();  // tile i is there, and tile i - 1 is no longer read
    fetch();
    const uint4* codes = shared + from * kTile + lane_index();
    from = next_stage<kStages>(from);
    if (!has_rows) continue;
    float best[2 * kFragments];
#pragma unroll
    for (float& value : best) value = -infinity();
    // Not unrolled: loads would move ahead until registers are spilled, and other warps hide them.
#pragma unroll 1
    for (int c = 0; c < kTileFragments; ++c) {
      float sums[2][kFragments][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        multiply_step(sums, rows[s], codes[(s * kTileFragments + c) * kWarpSize]);
      }
      update_maxima(sums, best);
    }
    store_maxima<kFragments>(best, tile_max);
    tile_max += stride;
  }
}

constexpr int kWideFragments = 2;
constexpr int kWideRows = kScoreWarps * kWideFragments * kFragmentVectors;
constexpr int kWideStages = 4;
constexpr int kWideChunk = kWideSteps * kTileFragments * kWarpSize;  // of rows, and of codes
static_assert(kWideRows == kTileVectors, "a block's rows are a tile of packed vectors");

// Operands of any number of steps, kWideSteps at a time on both sides.
// Grid: (blocks of kWideRows rows, runs of `tiles_per_block` tiles of codes). A warp holds the
// scores of 32 rows and a tile of codes. Shared memory: kWideStages chunks of both operands, 64
// KiB. Bytes: a block reads its rows again for each of its tiles. Bound by the tensor cores, or by
// the L2 (32 bytes a clock and multiprocessor at the rate of compute
// capability 8.0).
__global__ void __launch_bounds__(kScoreThreads, 2)
    coarse_score_wide_kernel(const __grid_constant__ SearchArgs args, int64_t first_row,
                             int64_t num_rows, int tiles_per_block) {
  if (is_dropped(args)) return;
  const ScoreBlock block(args, kWideRows, tiles_per_block);
  const int warp_row = warp_index() * kWideFragments * kFragmentVectors;
  const int chunks = operand_steps(args.layout.dim) / kWideSteps;
  uint4* shared = shared_memory<uint4>();
  const uint4* rows =
      args.packed.fragments + (first_row + block.row) / kTileVectors * chunks * kWideChunk;
  const uint4* codes = args.codes.fragments + block.first_tile * chunks * kWideChunk;

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
  const int64_t stride = padded_rows(num_rows);
  float* tile_max = args.tile_max + block.first_tile * stride + block.row + warp_row;
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
    float best[2 * kWideFragments];
#pragma unroll
    for (float& value : best) value = -infinity();
#pragma unroll
    for (int c = 0; c < kTileFragments; ++c) update_maxima(sums[c], best);
    store_maxima<kWideFragments>(best, tile_max);
    tile_max += stride;
  }
}

using CoarseScoreKernel = void (*)(SearchArgs, int64_t, int64_t, int);

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

}  // namespace

cudaError_t launch_coarse_score(const SearchArgs& args, int64_t first_row, int64_t num_rows,
                                cudaStream_t stream) {
  const int steps = operand_steps(args.layout.dim);
  CoarseScoreKernel kernel = coarse_score_wide_kernel;
  int rows = kWideRows, shared_vectors = 2 * kWideChunk * kWideStages;
  if (steps <= kMostSteps) {
    // A coarse scale has few rows: fewer of a block's would be there.
    const bool few = num_rows <= kBlockRows / 2;
    kernel = few ? coarse_score_kernel_for<2>(steps) : coarse_score_kernel_for<4>(steps);
    rows = few ? kBlockRows / 2 : kBlockRows;
    shared_vectors = steps * kTileFragments * kWarpSize * kStages;
  }
  const int64_t row_blocks = ceil_div(num_rows, rows);
  const int64_t tiles = ceil_div(args.layout.codes, kTileCodes);
  // At most coarse_score_blocks runs, and the second grid dimension ends at 65,535.
  const int64_t tiles_per_block = ceil_div(tiles, ceil_div(args.coarse_score_blocks, row_blocks));
  const dim3 grid(static_cast<unsigned>(row_blocks),
                  static_cast<unsigned>(ceil_div(tiles, tiles_per_block)));
  return launch(kernel, grid, kScoreThreads, static_cast<size_t>(shared_vectors) * sizeof(uint4),
                stream, args, first_row, num_rows, static_cast<int>(tiles_per_block));
}

}  // namespace tokenflow::cuda
