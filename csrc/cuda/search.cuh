// The search for the nearest codes: a coarse score of every row and code, then a closer look at the
// few codes that may be the nearest.
#pragma once

#include "pack.cuh"

namespace tokenflow::cuda {

// Rows of a codebook whose records are held at once: bounds the scratch of a search.
constexpr int64_t kRowsAtOnce = 16384;

// What a row keeps of a record, the coarse scores of up to kRecordTiles neighbouring tiles of
// codes: the best score, and the best of those outside of its group. A group is four codes of a
// fragment, 2t, 2t + 1, 2t + 8 and 2t + 9, whose scores one lane holds; the lowest kTagBits bits of
// a score are replaced by the number of its group in the record.
struct ScoreRecord {
  float best;
  float runner_up;
};

constexpr int kRecordTiles = 4;
constexpr int kGroupCodes = 4;
static_assert(kRecordTiles * kTileCodes / kGroupCodes == 1 << kTagBits, "a tag for every group");

// Up to this many rows may have records of fewer tiles, so that there are blocks enough.
constexpr int64_t kFewRows = 1024;

// Group of a record: tile of the record, fragment of the tile, t.
__device__ __forceinline__ int group_tag(int tile, int fragment, int t) {
  return (tile * kTileFragments + fragment) * 4 + t;
}

// Code i of a group, from the first of the record.
__device__ __forceinline__ int group_code(int tag, int i) {
  return tag / 4 * kFragmentVectors + i / 2 * 8 + 2 * (tag % 4) + i % 2;
}

__device__ __forceinline__ float with_tag(float score, int tag) {
  return int_as_float((float_as_int(score) & ~((1 << kTagBits) - 1)) | tag);
}

__device__ __forceinline__ int tag_of(float score) {
  return float_as_int(score) & ((1 << kTagBits) - 1);
}

struct SearchArgs {
  CodebookLayout layout;
  const float* codebook;  // [books, codes, dim]
  PackedCodes codes;
  const float* rows;  // [maps * tokens, dim], not normalised
  PackedRows packed;  // the scale's rows in the order of TokenMap
  TokenMap map;
  int64_t num_rows;        // a book
  int scale_id;            // which scale of the pyramid
  const int64_t* dropped;  // null or one scale id; the tokens of that scale get -1
  ScoreRecord* records;    // scratch, see take_records
  int64_t* indices;        // out [maps * tokens]
  int64_t* hits;           // out [books, codes] (added to) or null
  double* row_error;       // out [maps * tokens] squared error of each row, or null
  int multiprocessors;     // of the device
};

// How the codes are shared out in one launch of the coarse scores.
struct ScoreRuns {
  int tiles_per_block;
  int record_tiles;     // of a record: 1, 2 or 4; divides tiles_per_block
  int64_t num_records;  // of a row

  ScoreRuns(const SearchArgs& args, int64_t num_rows);
};

// [books][rows at once][records].
inline ScoreRecord* take_records(Workspace& workspace, const CodebookLayout& layout,
                                 int64_t num_rows) {
  const int64_t tiles = ceil_div(layout.codes, kTileCodes);
  const auto records = [](int64_t rows, int64_t most, int64_t records) {
    return padded_rows(rows < most ? rows : most) * records;
  };
  const int64_t few = records(num_rows, kFewRows, tiles);
  const int64_t many = records(num_rows, kRowsAtOnce, ceil_div(tiles, kRecordTiles));
  return workspace.take<ScoreRecord>(layout.books * (few > many ? few : many));
}

// Which order the codes are to be packed in: that of warpgroups where TOKENFLOW_CUDA_SEARCH=wgmma
// is set and the codebook is narrow enough. An error where this device or build has no kernel for
// them.
cudaError_t choose_order(const CodebookLayout& layout, FragmentOrder* order);

// Records of rows [first_row, first_row + num_rows) of each codebook's.
cudaError_t launch_coarse_score(const SearchArgs& args, int64_t first_row, int64_t num_rows,
                                const ScoreRuns& runs, cudaStream_t stream);

// Indices, hits and row errors of these rows from their records.
cudaError_t launch_refine(const SearchArgs& args, int64_t first_row, int64_t num_rows,
                          const ScoreRuns& runs, cudaStream_t stream);

cudaError_t launch_search(const SearchArgs& args, cudaStream_t stream);

__device__ __forceinline__ float infinity() { return INFINITY; }

__device__ __forceinline__ bool is_dropped(const SearchArgs& args) {
  return args.dropped != nullptr && *args.dropped == args.scale_id;
}

__host__ __device__ __forceinline__ int num_tiles(const CodebookLayout& layout) {
  return static_cast<int>(padded_codes(layout) / kTileCodes);
}

// The records of a codebook's first row in a launch of `num_rows` rows of each.
__device__ __forceinline__ ScoreRecord* records_of(const SearchArgs& args, const ScoreRuns& runs,
                                                   int64_t num_rows, int64_t book) {
  return args.records + book * padded_rows(num_rows) * runs.num_records;
}

__device__ __forceinline__ ScoreRecord shuffle_xor(const ScoreRecord& record, int mask) {
  return {shuffle_xor(record.best, mask), shuffle_xor(record.runner_up, mask)};
}

// The lanes of a quad hold kCount values each. Combines them over the quad: lane t is left with
// values t, 4 + t, ... in the first kCount / 4 positions.
template <typename T, int kCount, typename Combine>
__device__ __forceinline__ void reduce_quad(T (&values)[kCount], const Combine& combine) {
  static_assert(kCount % 4 == 0, "as many for each lane");
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (lane_index() & bit) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2 / bit; ++i) {
      const T keep = upper ? values[2 * i + 1] : values[2 * i];
      const T send = upper ? values[2 * i] : values[2 * i + 1];
      values[i] = combine(keep, shuffle_xor(send, bit));
    }
  }
}

// Where reduce_quad leaves a lane's values when value j is that of vector 8 j + lane / 4: value i
// is vector 32 i + quad_vector().
__device__ __forceinline__ int quad_vector() { return lane_index() % 4 * 8 + lane_index() / 4; }

}  // namespace tokenflow::cuda
