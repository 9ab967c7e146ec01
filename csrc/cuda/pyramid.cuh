// What the residual pyramid's kernels share.
#pragma once

#include "../common/codebook.h"
#include "../common/geometry.h"
#include "../common/normalize.h"
#include "../common/quantizer_args.h"
#include "device.cuh"
#include "workspace.h"

namespace tokenflow::cuda {

constexpr int kPlaneThreads = 256;

// Shared memory a block of a plane kernel may ask for: what every architecture from 8.0 on has.
constexpr size_t kPlaneSharedLimit = 96 * 1024;

__host__ __device__ __forceinline__ int area(Extent extent) { return extent.height * extent.width; }

__host__ __device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }

// The first code of a map's codebook among those of all. 31 bits hold the numbers of maps, tokens
// and codes, and of maps times channels (see unsupported_reason).
__device__ __forceinline__ int first_code(const CodebookLayout& layout, int map) {
  return map % static_cast<int>(layout.books) * static_cast<int>(layout.codes);
}

// Whether an index names a code; any other is a token that adds nothing.
__device__ __forceinline__ bool names_code(int64_t index, const CodebookLayout& layout) {
  return index >= 0 && index < layout.codes;
}

__device__ __forceinline__ int group_of(int d, const CodebookLayout& layout) {
  int g = 0;
  while (d >= layout.begin[g + 1]) ++g;
  return g;
}

// Channel d of a normalised codebook row; `index` among those of all books.
__device__ __forceinline__ float unit_code(const float* codebook, const double* inverse_norms,
                                           const CodebookLayout& layout, int64_t index, int d,
                                           int group) {
  return static_cast<float>(static_cast<double>(codebook[index * layout.dim + d]) *
                            inverse_norms[index * layout.groups + group]);
}

// The taps of both axes from a scale to the plane: [width] for x, then [height] for y. The work of
// a block; a barrier must follow.
__device__ __forceinline__ void make_taps(Upsampling upsampling, Extent extent, int height,
                                          int width, Taps<float>* taps) {
#pragma unroll 1
  for (int i = threadIdx.x; i < width + height; i += kPlaneThreads) {
    const bool along_x = i < width;
    taps[i] =
        upsampling_taps<float>(along_x ? i : i - width, along_x ? extent.width : extent.height,
                               along_x ? width : height, upsampling);
  }
}

// How a plane kernel's grid covers [batch, dim]: block i owns channels [first, first + count) of
// map `map`.
struct ChannelBlock {
  int map;
  int first;
  int count;
};

__device__ __forceinline__ ChannelBlock channel_block(unsigned i, int dim, int channels) {
  const unsigned blocks = static_cast<unsigned>((dim + channels - 1) / channels);
  const int map = static_cast<int>(i / blocks);
  const int first = (static_cast<int>(i) - map * static_cast<int>(blocks)) * channels;
  return {map, first, dim - first < channels ? dim - first : channels};
}

// Channels a block should own, a power of two: as many as leave enough blocks for every
// multiprocessor and stay within 48 KiB, so that several blocks share one.
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

}  // namespace tokenflow::cuda
