// The inner loops of the CPU back end, compiled once for each instruction set and called through
// a table picked at run time. Image planes are channels-last here, [height * width, dim], so that
// every loop runs along contiguous channels.
#pragma once

#include <cstdint>

#include "../common/codebook.h"
#include "../common/geometry.h"

namespace tokenflow::cpu {

// Codes are ranked in blocks of this many; a row keeps one maximum for each block.
constexpr int kBlockCodes = 512;

// The codebook as the ranking loop reads it: panels of `panel_width` codes, each panel
// [dim + 1][panel_width] with the bias as its first line. Missing codes have bias -inf.
struct PackedCodes {
  const float* panels;
  int64_t num_panels;
  float norm;  // largest length of a packed row
  float bias;  // largest |bias|
};

struct RankKernels {
  int panel_width;  // codes in a panel
  int tile_rows;    // rows in a full tile

  // Packs codes [first_panel * panel_width, ...) of one panel; returns its largest length and bias.
  void (*pack_panel)(const float* codebook, const CodebookLayout& layout, int64_t panel,
                     float* packed, float* norm, float* bias);
  // Normalises `rows` (at most tile_rows) rows into a tile [dim][rows] and their lengths.
  void (*pack_tile)(const float* rows, int count, const CodebookLayout& layout, float* tile,
                    float* norms);
  // block_max[r * stride] = the largest score of tile row r over `num_panels` panels.
  void (*rank_tile)(const float* tile, int count, int dim, const float* panels, int64_t num_panels,
                    float* block_max, int64_t stride);
  // The exact choice for tile row r from its block maxima.
  int64_t (*settle_row)(const float* row, const float* tile, int count, int r, float norm,
                        const float* block_max, int64_t num_blocks, const PackedCodes& codes,
                        const float* codebook, const CodebookLayout& layout);
};

template <typename T>
struct PlaneKernels {
  // [dim, positions] <-> [positions, dim].
  void (*to_channels_last)(const T* planes, int dim, int64_t positions, T* out);
  void (*to_channels_first)(const T* plane, int dim, int64_t positions, T* out);
  // Area pooling of [height * width, dim] to [extent, dim], and its transpose (added to grad).
  void (*pool)(const T* plane, int dim, Extent from, Extent to, T* rows);
  void (*pool_transpose_add)(const T* grad_rows, int dim, Extent from, Extent to, T* grad_plane);
  // Bicubic upsampling u of rows [from, dim]: sum += u and residual -= u (either may be null).
  // `scratch` holds from.height * to.width * dim.
  void (*upsample)(const T* rows, int dim, Extent from, Extent to, T* scratch, T* sum, T* residual);
  // rows = transpose of upsample applied to grad_plane [to, dim]; same scratch.
  void (*upsample_transpose)(const T* grad_plane, int dim, Extent from, Extent to, T* scratch,
                             T* grad_rows);
};

struct KernelTable {
  RankKernels rank;
  PlaneKernels<float> plane_float;
  PlaneKernels<double> plane_double;
};

const KernelTable& portable_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();

}  // namespace tokenflow::cpu
