// The inner loops of the CPU back end, compiled once for each instruction set and called through
// tables picked at run time. Image planes are channels-last here, [height * width, dim], so that
// every loop runs along contiguous channels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/codebook.h"
#include "../common/geometry.h"
#include "../common/scalar_args.h"

namespace tokenflow::cpu {

// Codes get their coarse scores in blocks of at most this many, whole panels each; a row keeps one
// maximum for each block.
constexpr int kMostBlockCodes = 256;

// Alignment of packed codes and rows.
constexpr size_t kAlignment = 64;

// Of sums in 16 bits: how many lengths a chunk of channels may have, but for the shortest.
constexpr int kChunkSizes = 3;

// What coarse scores need to know of the codebook. Its codes c, and the rows z, are normalised and
// each scaled by the square root of the weight and by `scale`; `packed` is what became of them.
// Biases are those of such codes.
//
// A centre m may be taken from all of them first, so that codes that lie close together are told
// apart: <z, c> is <z - m, c - m> + <m, c - m>, and <z, m>, which is the same for all codes. Norms
// are then those of c - m, and a bias is that of c plus <m, c - m>, less the bias of m.
struct CodeBounds {
  double scale;       // a power of two, which brings the largest number among the codes below 1
  double step;        // value of one unit of a packed number
  double norm;        // largest |c|
  double error;       // largest |c - packed|
  double bias;        // largest |bias|
  bool has_bias;      // whether scores count the biases; if not, the margin covers them
  double length = 0;  // largest |c|, whatever was taken from it
  const double* centre = nullptr;  // [dim] or null
  double centre_bias = 0;
  double parts[kChunkSizes] = {};  // largest squared lengths, in steps, of parts (narrow_sums.h)
};

// `distance_error` in units of the packed numbers, which the margins count. It leaves more than
// dim 2^-53 of the squares for taking the centre away.
TOKENFLOW_HOST_DEVICE double packed_distance_error(int dim, double squared_length,
                                                   const CodeBounds& bounds) {
  return distance_error(dim, squared_length + bounds.length * bounds.length,
                        bounds.scale * bounds.scale);
}

// What coarse scores need to know of a packed row.
struct RowScale {
  float margin;      // twice the proven bound on a coarse score's error, in units of the score
  float bias_scale;  // units of the score in one unit of the bias
};

// The coarse score of every row and code: a number within a proven bound of the score
// (common/codebook.h), in units of each row's own. A block of codes whose largest one is more than
// `margin` below the row's best cannot hold the nearest code.
struct CoarseScoreKernels {
  int panel_width;  // codes in a panel
  int tile_rows;    // rows in a full tile; every tile has room for as many
  int times_float;  // about how many times as fast as scores in float32

  size_t (*panel_bytes)(int dim);
  size_t (*row_bytes)(int dim);
  // The step that packs numbers up to `largest` in magnitude.
  double (*step)(double largest);

  // Packs a panel of `count` (at most panel_width) codes [count, dim] and raises `bounds` to cover
  // them. The codes that a panel lacks are copies of the last one: they change no maximum.
  void (*pack_panel)(const float* codes, int count, const CodebookLayout& layout, void* packed,
                     CodeBounds* bounds);
  // Packs `count` (at most tile_rows) rows into a tile. The margin of a row that is not finite, or
  // so long beside the codes that float64 tells none of them apart, need not be finite either.
  void (*pack_tile)(const float* rows, int count, const CodebookLayout& layout,
                    const CodeBounds& bounds, void* tile, RowScale* scales);
  // `begin` comes before score_tile on a thread and `end` after; both may be null.
  void (*begin)(int dim);
  // block_max[r * stride] = the largest coarse score of tile row r in `num_panels` panels.
  // Integers and bfloat16 leave the biases out unless `has_bias`.
  void (*score_tile)(const void* tile, int count, int dim, const RowScale* scales, bool has_bias,
                     const void* panels, int64_t num_panels, float* block_max, int64_t stride);
  void (*end)();
  // The codes of a block (counted from its first) whose coarse score for tile row r is at least
  // `threshold`, in ascending order; returns how many.
  int (*scan_block)(const void* tile, int count, int r, int dim, const RowScale* scales,
                    bool has_bias, const void* panels, int64_t num_panels, float threshold,
                    int* codes);
};

// What stands in for rows (common/scalar_args.h): tables of one round.
template <typename T>
struct StandInTable {
  StandIn kind;
  int group;        // channels of a group
  int width;        // of the curves: whole rows side by side
  const T* curves;  // [kCurveParts, width]
};

// Loops along the channels of rows and planes.
template <typename T>
struct ChannelKernels {
  // [dim, positions] <-> [positions, dim].
  void (*to_channels_last)(const T* planes, int dim, int64_t positions, T* out);
  void (*to_channels_first)(const T* plane, int dim, int64_t positions, T* out);
  // Area pooling of [height * width, dim] to [extent, dim], and its transpose (added to grad).
  void (*pool)(const T* plane, int dim, Extent from, Extent to, T* rows);
  void (*pool_transpose_add)(const T* grad_rows, int dim, Extent from, Extent to, T* grad_plane);
  // Upsampling u of rows [from, dim]: sum += u and residual -= u (either may be null). `scratch`
  // holds from.height * to.width * dim.
  void (*upsample)(const T* rows, int dim, Extent from, Extent to, Upsampling upsampling,
                   T* scratch, T* sum, T* residual);
  // rows = transpose of upsample applied to grad_plane [to, dim]; same scratch.
  void (*upsample_transpose)(const T* grad_plane, int dim, Extent from, Extent to,
                             Upsampling upsampling, T* scratch, T* grad_rows);
  // Scalar quantization (common/scalar_args.h) of rows, `size` numbers in all, with tables of
  // `width` channels: whole rows side by side.
  //
  // Digits and values, of `count` thresholds [count, width], values [count + 1, width] and digits
  // to invert, or null.
  void (*quantize_scalars)(const T* rows, int64_t size, const T* thresholds, const T* values,
                           int count, int width, const bool* flips, int16_t* digits, T* codes);
  // Indices of `count` tokens from digits: those of tokens lie `stride` apart, of groups
  // args.tokens.
  void (*pack_tokens)(const PackDigitsArgs& args, const int16_t* digits, int64_t count,
                      int64_t* indices, int64_t stride);
  // z = what stands in for rows (not kSame), and grad = its transpose at them, applied to grad.
  void (*stand_in)(const StandInTable<T>& table, const T* rows, int64_t size, T* z);
  void (*stand_in_backward)(const StandInTable<T>& table, const T* rows, int64_t size, T* grad);
  // The sum of (a - b)^2.
  T (*squared_error)(const T* a, const T* b, int64_t size);
  // chances [width] += probabilities of 1; returns the sum of entropies.
  T (*sign_choices)(const T* z, int64_t size, int width, T slope, T* chances);
  // grad += the gradient of by_chance [width] times chances and by_entropy times their sum.
  void (*sign_choices_backward)(const T* z, int64_t size, int width, T slope, T by_entropy,
                                const T* by_chance, T* grad);
  bool (*all_finite)(const T* values, int64_t count);
};

struct KernelTable {
  CoarseScoreKernels coarse_score;
  ChannelKernels<float> channels_float;
  ChannelKernels<double> channels_double;
  // The blocks that may hold a row's nearest code, those whose maximum is within `margin` of the
  // largest, in ascending order; returns how many, and the least maximum that counts. It is not
  // finite, and no block is returned, where the maxima or the margin are not.
  int (*near_blocks)(const float* block_max, int count, float margin, int* blocks,
                     float* threshold);
  // Scores (common/codebook.h) in float64 of some codes for a row that is normalised already.
  void (*scores)(const double* unit_row, const float* codebook, const CodebookLayout& layout,
                 const int64_t* codes, int64_t count, double* scores);
  // The largest magnitude, for numbers that are finite.
  float (*largest_magnitude)(const float* values, int64_t count);
};

const KernelTable& portable_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();

// Scores in 8-bit integers: coarser, with a wider margin, and faster.
const CoarseScoreKernels& int8_coarse_score_avx2();
const CoarseScoreKernels& int8_coarse_score_avx512vnni();
const CoarseScoreKernels& int8_coarse_score_dotprod();  // of NEON
// In bfloat16 by AMX; null where the compiler knows no AMX.
const CoarseScoreKernels* bf16_coarse_score_amx();

}  // namespace tokenflow::cpu
