// The search for the nearest codes: a coarse score of every row and code, then a closer look at the
// few codes that may be the nearest.
#pragma once

#include "pack.cuh"

namespace tokenflow::cuda {

// Blocks of the coarse scores: several waves of them on the largest machine, and few enough that a
// block's rows are loaded for more than one tile of codes.
constexpr int64_t kCoarseScoreBlocks = 2048;

// Rows whose tile maxima are held at once: bounds the scratch of a search.
constexpr int64_t kRowsAtOnce = 8192;

// Where row n of a scale lies among all tokens.
struct TokenMap {
  int64_t tokens;  // an image
  int64_t first;   // token of the scale
  int64_t count;   // tokens of the scale in an image

  __device__ __forceinline__ int64_t token(int64_t n) const {
    return n / count * tokens + first + n % count;
  }
};

struct SearchArgs {
  CodebookLayout layout;
  const float* codebook;  // [codes, dim]
  PackedCodes codes;
  const float* rows;  // [batch * tokens, dim], not normalised
  PackedRows packed;  // the scale's rows in the order of TokenMap
  TokenMap map;
  int64_t num_rows;
  int scale_id;                      // which scale of the pyramid
  const int64_t* dropped;            // null or one scale id; the tokens of that scale get -1
  const double* code_inverse_norms;  // [codes, groups]; used with row_error
  float* tile_max;                   // scratch, see take_tile_max
  int64_t* indices;                  // out [batch * tokens]
  int64_t* hits;                     // out [codes] (added to) or null
  double* row_error;                 // out [batch * tokens] squared error of each row, or null
  int64_t coarse_score_blocks = kCoarseScoreBlocks;
};

// [tiles of codes][rows at once].
inline float* take_tile_max(Workspace& workspace, const CodebookLayout& layout, int64_t num_rows) {
  return workspace.take<float>(padded_rows(num_rows < kRowsAtOnce ? num_rows : kRowsAtOnce) *
                               ceil_div(layout.codes, kTileCodes));
}

// tile_max for rows [first_row, first_row + num_rows) of the search.
cudaError_t launch_coarse_score(const SearchArgs& args, int64_t first_row, int64_t num_rows,
                                cudaStream_t stream);

// Indices, hits and row errors of these rows from their tile_max.
cudaError_t launch_refine(const SearchArgs& args, int64_t first_row, int64_t num_rows,
                          cudaStream_t stream);

cudaError_t launch_search(const SearchArgs& args, cudaStream_t stream);

__device__ __forceinline__ float infinity() { return INFINITY; }

__device__ __forceinline__ bool is_dropped(const SearchArgs& args) {
  return args.dropped != nullptr && *args.dropped == args.scale_id;
}

__device__ __forceinline__ int num_tiles(const SearchArgs& args) {
  return static_cast<int>((args.layout.codes + kTileCodes - 1) / kTileCodes);
}

// The lanes of a quad hold kCount values each. Combines them over the quad: lane t is left with
// values t, 4 + t, ... in the first kCount / 4 positions.
template <int kCount, typename Combine>
__device__ __forceinline__ void reduce_quad(float (&values)[kCount], const Combine& combine) {
  static_assert(kCount % 4 == 0, "as many for each lane");
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (lane_index() & bit) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2 / bit; ++i) {
      const float keep = upper ? values[2 * i + 1] : values[2 * i];
      const float send = upper ? values[2 * i] : values[2 * i + 1];
      values[i] = combine(keep, shuffle_xor(send, bit));
    }
  }
}

// Where reduce_quad leaves a lane's values when value j is that of vector 8 j + lane / 4: value i
// is vector 32 i + quad_vector().
__device__ __forceinline__ int quad_vector() { return lane_index() % 4 * 8 + lane_index() / 4; }

}  // namespace tokenflow::cuda
