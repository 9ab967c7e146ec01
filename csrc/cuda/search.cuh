// What the search shares with the kernels that prepare its operands.
#pragma once

#include "../common/codebook.h"
#include "device.cuh"
#include "workspace.h"

namespace tokenflow::cuda {

// Codes are ranked in tiles of this many; a row keeps one maximum for each tile.
constexpr int kTileCodes = 128;

// Rows are packed in tiles of this many, [dim][kTileRows] each.
constexpr int kTileRows = 128;

// Rows whose tile maxima are held at once: bounds the scratch of a search.
constexpr int64_t kRowsAtOnce = 8192;

struct PackedCodes {
  // [tiles][dim + 1][kTileCodes]: a line of biases, then normalised and weighted rows, transposed.
  // Missing codes of the last tile have bias -inf.
  float* tiles;
  float* bounds;  // largest length of a packed row, largest |bias|
};

struct PackedRows {
  float* tiles;    // [tiles][dim][kTileRows], normalised; what follows the last row is never used
  float* lengths;  // upper bounds of the packed rows' lengths
};

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
  int scale;
  const int64_t* dropped;     // null or one scale number; a dropped scale gets -1
  const double* code_scales;  // [codes, groups]; used with row_error
  float* tile_max;            // scratch, see search_scratch_floats
  int64_t* indices;           // out [batch * tokens]
  int64_t* hits;              // out [codes] (added to) or null
  double* row_error;          // out [batch * tokens] squared error of each row, or null
};

inline PackedCodes take_packed_codes(Workspace& workspace, const CodebookLayout& layout) {
  PackedCodes codes;
  codes.tiles =
      workspace.take<float>(ceil_div(layout.codes, kTileCodes) * (layout.dim + 1) * kTileCodes);
  codes.bounds = workspace.take<float>(2);
  return codes;
}

inline PackedRows take_packed_rows(Workspace& workspace, int dim, int64_t num_rows) {
  const int64_t padded = ceil_div(num_rows, kTileRows) * kTileRows;
  return {workspace.take<float>(padded * dim), workspace.take<float>(padded)};
}

inline float* take_tile_max(Workspace& workspace, const CodebookLayout& layout, int64_t num_rows) {
  return workspace.take<float>((num_rows < kRowsAtOnce ? num_rows : kRowsAtOnce) *
                               ceil_div(layout.codes, kTileCodes));
}

// Packs the codebook. `scales` may be null.
cudaError_t launch_pack_codes(const CodebookLayout& layout, const float* codebook,
                              const PackedCodes& codes, cudaStream_t stream);

// scales [codes, groups]: reciprocal lengths of the codebook's rows.
cudaError_t launch_scale_codes(const CodebookLayout& layout, const float* codebook, double* scales,
                               cudaStream_t stream);

cudaError_t launch_search(const SearchArgs& args, cudaStream_t stream);

// Normalises one row into place n of the packed rows; the work of one thread.
__device__ __forceinline__ void pack_row(const float* row, const CodebookLayout& layout, int64_t n,
                                         const PackedRows& packed) {
  float* column = packed.tiles + n / kTileRows * layout.dim * kTileRows + n % kTileRows;
  double length = 0;
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const double squared = squared_norm(row, begin, end);
    const double scale = inverse_norm(squared, layout.l2_norm);
    length += squared * scale * scale;
    for (int d = begin; d < end; ++d) {
      column[static_cast<int64_t>(d) * kTileRows] =
          static_cast<float>(static_cast<double>(row[d]) * scale);
    }
  }
  packed.lengths[n] = static_cast<float>(sqrt(length)) * 1.000001f;
}

}  // namespace tokenflow::cuda
