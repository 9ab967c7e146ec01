// What the residual pyramid's kernels share.
#pragma once

#include "../common/codebook.h"
#include "../common/geometry.h"
#include "../common/normalize.h"
#include "../common/quantizer_args.h"
#include "search.cuh"

namespace tokenflow::cuda {

constexpr int kPlaneThreads = 256;

// Shared memory a block of a plane kernel may ask for: what every architecture from 8.0 on has.
constexpr size_t kPlaneSharedLimit = 96 * 1024;

__host__ __device__ __forceinline__ int area(Extent extent) { return extent.height * extent.width; }

__host__ __device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }

// Whether an index names a code; any other is a token that adds nothing.
__device__ __forceinline__ bool names_code(int64_t index, const CodebookLayout& layout) {
  return index >= 0 && index < layout.codes;
}

__device__ __forceinline__ int group_of(int d, const CodebookLayout& layout) {
  int g = 0;
  while (d >= layout.begin[g + 1]) ++g;
  return g;
}

// Channel d of a normalised codebook row.
__device__ __forceinline__ float unit_code(const float* codebook, const double* scales,
                                           const CodebookLayout& layout, int64_t index, int d,
                                           int group) {
  return static_cast<float>(static_cast<double>(codebook[index * layout.dim + d]) *
                            scales[index * layout.groups + group]);
}

// How a plane kernel's grid covers [batch, dim]: block i owns channels [first, first + count) of
// image `image`.
struct ChannelBlock {
  int64_t image;
  int first;
  int count;
};

__device__ __forceinline__ ChannelBlock channel_block(int64_t i, int dim, int channels) {
  const int blocks = (dim + channels - 1) / channels;
  const int first = static_cast<int>(i % blocks) * channels;
  return {i / blocks, first, dim - first < channels ? dim - first : channels};
}

// Channels a block should own: as many as leave enough blocks for every multiprocessor and stay
// within 48 KiB, so that several blocks share one.
inline int choose_channels(int64_t batch, int dim, size_t bytes_per_channel) {
  constexpr int64_t kEnoughBlocks = 256;
  constexpr size_t kEnoughShared = 48 * 1024;
  int channels = 8;
  while (channels > 1 && (batch * ceil_div(dim, channels) < kEnoughBlocks ||
                          bytes_per_channel * static_cast<size_t>(channels) > kEnoughShared)) {
    channels /= 2;
  }
  return channels;
}

// What becomes of the pooled rows once an image has all of its channels.
enum class Finish {
  kNothing,    // left as they are
  kNormalize,  // normalised in place
  kPack,       // left as they are, and packed for the search of scale `last + 1`
};

// One walk along the residual pyramid for known indices: adds the codes of scales
// [first, last] one after the other, and pools the plane to scale s + 1 after scale s.
// first = -1 begins with pooling to scale 0.
struct WalkArgs {
  Pyramid pyramid;
  CodebookLayout layout;
  int first;
  int last;
  int channels;               // a block owns this many
  const float* codebook;      // [codes, dim]
  const double* code_scales;  // [codes, groups]
  const int64_t* indices;     // [batch, tokens]
  const float* plane_in;      // [batch, dim, height, width] or null: zeros
  float* plane_out;           // the same or null; may be plane_in
  float sign;                 // the plane gains sign * u at every scale
  float* sum;                 // [batch, dim, height, width] gains u at every scale, or null
  bool sum_is_empty;          // `sum` holds nothing yet
  float* rows;                // out [batch, tokens, dim]: pooled rows; null: no pooling
  Finish finish;
  int* images_done;   // [batch] zeros, left as zeros; used unless finish is kNothing
  PackedRows packed;  // used if finish is kPack
};

// The walk that recomputes the rows of every scale from h and known indices, unfinished.
template <typename Args>
WalkArgs recompute_rows(const Args& args, const double* code_scales, float* rows) {
  WalkArgs walk = {};
  walk.pyramid = args.pyramid;
  walk.layout = args.layout;
  walk.first = -1;
  walk.last = args.pyramid.num_scales - 2;
  walk.codebook = args.codebook;
  walk.code_scales = code_scales;
  walk.indices = args.indices;
  walk.plane_in = args.h;
  walk.sign = -1;
  walk.rows = rows;
  walk.finish = Finish::kNothing;
  return walk;
}

// `args.channels` is chosen here.
cudaError_t launch_walk(WalkArgs args, cudaStream_t stream);

// A row of `grad`, the gradient of a normalised row of the codebook, becomes the gradient of the
// row itself; the work of a warp. Lane l reads and writes channels l, l + 32, ... of `grad` alone.
__device__ __forceinline__ void code_gradient_by_warp(const CodebookLayout& layout,
                                                      const float* code, float* grad) {
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const int skip = (lane_index() - begin) & (kWarpSize - 1);  // to this lane's first channel
    double squared = 0, dot = 0;
#pragma unroll 1  // a group is seldom wider than the warp
    for (int d = begin + skip; d < end; d += kWarpSize) {
      const double channel = static_cast<double>(code[d]);
      squared += channel * channel;
      dot += channel * static_cast<double>(grad[d]);
    }
    squared = sum_over_lanes<kWarpSize>(squared);
    dot = sum_over_lanes<kWarpSize>(dot);
    const GroupTranspose transpose = group_transpose(squared, dot, layout.l2_norm);
#pragma unroll 1
    for (int d = begin + skip; d < end; d += kWarpSize) {
      grad[d] = static_cast<float>(
          apply(transpose, static_cast<double>(code[d]), static_cast<double>(grad[d])));
    }
  }
}

// launch_segment_sum, and what a code has received goes back through the normalisation of its row
// of `codebook`. args.counts may be null.
cudaError_t launch_codebook_gradient(const SegmentSumArgs<float>& args,
                                     const CodebookLayout& layout, const float* codebook,
                                     void* workspace, cudaStream_t stream);

}  // namespace tokenflow::cuda
