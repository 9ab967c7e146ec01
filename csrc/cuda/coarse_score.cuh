// What the kernels of the coarse scores share: a block's part of the scores, and its records.
#pragma once

#include "search.cuh"

namespace tokenflow::cuda {

// A coarse scale has few rows: fewer of a block's would be there.
inline bool has_few_rows(int64_t num_rows) { return num_rows <= kBlockRows / 2; }

// Rows of a block of the coarse scores, whichever kernel makes them.
inline int score_block_rows(int steps, int64_t num_rows) {
  return steps > kMostSteps || has_few_rows(num_rows) ? kBlockRows / 2 : kBlockRows;
}

// A thread's records of a number of rows, [8 j + lane / 4] as in quad_vector.
template <int kRows>
struct Records {
  ScoreRecord row[kRows];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (ScoreRecord& record : row) record = {-infinity(), -infinity()};
  }
};

// A thread's scores of a group for each row go into its records.
template <int kFragments>
__device__ __forceinline__ void update_records(const float (&sums)[2][kFragments][4], int tag,
                                               Records<2 * kFragments>& records) {
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // fmaxf passes over NaN
      const float score = with_tag(fmaxf(fmaxf(sums[0][f][2 * half], sums[0][f][2 * half + 1]),
                                         fmaxf(sums[1][f][2 * half], sums[1][f][2 * half + 1])),
                                   tag);
      ScoreRecord& record = records.row[2 * f + half];
      record.runner_up = fmaxf(record.runner_up, fminf(record.best, score));
      record.best = fmaxf(record.best, score);
    }
  }
}

// The records of the same row in several lanes, or of several parts of a record, as one.
__device__ __forceinline__ ScoreRecord merge_records(const ScoreRecord& a, const ScoreRecord& b) {
  return {fmaxf(a.best, b.best), fmaxf(fmaxf(a.runner_up, b.runner_up), fminf(a.best, b.best))};
}

// What a CUDA block of the coarse scores owns: its rows, and a run of tiles of codes.
struct ScoreBlock {
  int64_t book;
  int64_t row;  // from the book's first of the launch
  int64_t first_tile;
  int tiles;

  __device__ __forceinline__ ScoreBlock(const SearchArgs& args, int rows, const ScoreRuns& runs)
      : book(blockIdx.z),
        row(static_cast<int64_t>(blockIdx.x) * rows),
        first_tile(static_cast<int64_t>(blockIdx.y) * runs.tiles_per_block) {
    const int64_t left = num_tiles(args.layout) - first_tile;
    tiles = left < runs.tiles_per_block ? static_cast<int>(left) : runs.tiles_per_block;
  }

  // The packed rows of the book's search begin here, and its tiles of codes.
  __device__ __forceinline__ int64_t packed_row(const SearchArgs& args) const {
    return book * padded_rows(args.num_rows);
  }
  __device__ __forceinline__ int64_t packed_tile(const SearchArgs& args) const {
    return book * num_tiles(args.layout) + first_tile;
  }
};

// Whether the block's tile i is the last of a record.
__device__ __forceinline__ bool ends_record(const ScoreRuns& runs, const ScoreBlock& block, int i) {
  return ((i + 1) & (runs.record_tiles - 1)) == 0 || i + 1 == block.tiles;
}

// Of row `row` of the block and its tile i.
__device__ __forceinline__ int64_t record_index(const ScoreRuns& runs, const ScoreBlock& block,
                                                int64_t row, int i) {
  const unsigned tile = static_cast<unsigned>(block.first_tile) + static_cast<unsigned>(i);
  return (block.row + row) * runs.num_records + tile / static_cast<unsigned>(runs.record_tiles);
}

// With warpgroups of four warps, on devices of compute capability 9.0. The codes are packed by
// FragmentOrder::kByWord.
cudaError_t launch_warpgroup_score(const SearchArgs& args, int64_t first_row, int64_t num_rows,
                                   const ScoreRuns& runs, cudaStream_t stream);

}  // namespace tokenflow::cuda
