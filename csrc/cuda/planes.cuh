// Planes of the residual pyramid in a block's shared memory: adding upsampled codes, and pooling.
#pragma once

#include "pyramid.cuh"

namespace tokenflow::cuda {

// Shared memory of a pass from scale `first` to `last`: sizes in elements over all of them.
struct PlaneSizes {
  int coarse;  // codes of a scale, a channel
  int middle;  // resampled along one axis, a channel
  int bins_x;
  int bins_y;

  __host__ __device__ PlaneSizes(const Pyramid& pyramid, int first, int last, bool pools)
      : coarse(0), middle(0), bins_x(0), bins_y(0) {
    for (int s = first; s <= last; ++s) {
      if (s >= 0) {
        coarse = larger(coarse, area(pyramid.extent[s]));
        middle = larger(middle, pyramid.extent[s].height * pyramid.width);
      }
      if (pools && s + 1 < pyramid.num_scales) {
        middle = larger(middle, pyramid.height * pyramid.extent[s + 1].width);
        bins_x = larger(bins_x, pyramid.extent[s + 1].width);
        bins_y = larger(bins_y, pyramid.extent[s + 1].height);
      }
    }
  }

  size_t channel_bytes(const Pyramid& pyramid) const {
    return sizeof(float) * (static_cast<size_t>(pyramid.height) * pyramid.width +
                            static_cast<size_t>(coarse) + static_cast<size_t>(middle));
  }

  size_t table_bytes(const Pyramid& pyramid) const {
    return sizeof(Taps<float>) * static_cast<size_t>(pyramid.height + pyramid.width) +
           sizeof(AreaBin) * static_cast<size_t>(bins_x + bins_y);
  }
};

// A block's view of its shared memory.
struct Planes {
  Taps<float>* taps_x;  // [width]
  Taps<float>* taps_y;  // [height]
  AreaBin* bins_x;
  AreaBin* bins_y;
  float* plane;   // [channels][height][width]
  float* coarse;  // [channels][scale height][scale width]
  float* middle;  // [channels], see PlaneSizes

  __device__ Planes(const Pyramid& pyramid, int channels, const PlaneSizes& sizes) {
    taps_x = shared_memory<Taps<float>>();
    taps_y = taps_x + pyramid.width;
    bins_x = reinterpret_cast<AreaBin*>(taps_y + pyramid.height);
    bins_y = bins_x + sizes.bins_x;
    plane = reinterpret_cast<float*>(bins_y + sizes.bins_y);
    coarse = plane + channels * pyramid.height * pyramid.width;
    middle = coarse + channels * sizes.coarse;
  }
};

// plane += sign * u for the upsampled codes u of scale s, code(p, c) that of channel c at place p,
// and sum [channels, height, width] += u unless it is null; `sum_is_empty`: it holds nothing yet.
template <typename Code>
__device__ __forceinline__ void add_codes(const Pyramid& pyramid, int channels, int s,
                                          const Planes& shared, float sign, float* sum,
                                          bool sum_is_empty, const Code& code) {
  const Extent extent = pyramid.extent[s];
  const int height = pyramid.height, width = pyramid.width, count = area(extent);
  for (int x = threadIdx.x; x < width; x += kPlaneThreads) {
    shared.taps_x[x] = upsampling_taps<float>(x, extent.width, width, pyramid.upsampling);
  }
  for (int y = threadIdx.x; y < height; y += kPlaneThreads) {
    shared.taps_y[y] = upsampling_taps<float>(y, extent.height, height, pyramid.upsampling);
  }
  for (int i = threadIdx.x; i < count * channels; i += kPlaneThreads) {
    const int p = i / channels, c = i % channels;  // neighbours read one row of what is looked up
    shared.coarse[c * count + p] = code(p, c);
  }
  block_barrier();
  // Along x: [channels][extent.height][width].
  const int middle = extent.height * width;
  for (int i = threadIdx.x; i < channels * middle; i += kPlaneThreads) {
    const Taps<float>& taps = shared.taps_x[i % width];
    const float* line = shared.coarse + i / width * extent.width;
    shared.middle[i] =
        taps.weight[0] * line[taps.position[0]] + taps.weight[1] * line[taps.position[1]] +
        taps.weight[2] * line[taps.position[2]] + taps.weight[3] * line[taps.position[3]];
  }
  block_barrier();
  // Along y: [channels][height][width].
  const int full = height * width;
  for (int i = threadIdx.x; i < channels * full; i += kPlaneThreads) {
    const int c = i / full, x = i % width;
    const Taps<float>& taps = shared.taps_y[i % full / width];
    const float* column = shared.middle + c * middle + x;
    const float u = taps.weight[0] * column[taps.position[0] * width] +
                    taps.weight[1] * column[taps.position[1] * width] +
                    taps.weight[2] * column[taps.position[2] * width] +
                    taps.weight[3] * column[taps.position[3] * width];
    shared.plane[i] += sign * u;
    if (sum) sum[i] = sum_is_empty ? u : sum[i] + u;
  }
  block_barrier();
}

// Channels of the block in all_rows [batch, tokens, dim] = the plane averaged over the bins of
// scale s. Each thread writes what it reads first in a loop over places and channels like
// add_codes'.
__device__ __forceinline__ void pool(const Pyramid& pyramid, const ChannelBlock& block, int s,
                                     const Planes& shared, int dim, float* all_rows) {
  const Extent extent = pyramid.extent[s];
  const int height = pyramid.height, width = pyramid.width, count = area(extent);
  for (int x = threadIdx.x; x < extent.width; x += kPlaneThreads) {
    shared.bins_x[x] = area_bin(x, width, extent.width);
  }
  for (int y = threadIdx.x; y < extent.height; y += kPlaneThreads) {
    shared.bins_y[y] = area_bin(y, height, extent.height);
  }
  block_barrier();
  const int middle = height * extent.width;
  for (int i = threadIdx.x; i < block.count * middle; i += kPlaneThreads) {
    const AreaBin bin = shared.bins_x[i % extent.width];
    const float* line = shared.plane + i / extent.width * width;
    float total = 0;
    for (int x = bin.begin; x < bin.end; ++x) total += line[x];
    shared.middle[i] = total;
  }
  block_barrier();
  float* rows = all_rows + (block.map * tokens_per_image(pyramid) + pyramid.first_token[s]) * dim;
  for (int i = threadIdx.x; i < block.count * count; i += kPlaneThreads) {
    const int p = i / block.count, c = i % block.count;  // neighbours write one row
    const int x = p % extent.width;
    const AreaBin bin_x = shared.bins_x[x], bin_y = shared.bins_y[p / extent.width];
    const float* column = shared.middle + c * middle + x;
    float total = 0;
    for (int y = bin_y.begin; y < bin_y.end; ++y) total += column[y * extent.width];
    const int positions = (bin_y.end - bin_y.begin) * (bin_x.end - bin_x.begin);
    float average = total / static_cast<float>(positions);
    if (!(average - average == 0)) {
      // The sum may be beyond float32 where the average is not.
      double sum = 0;
      for (int sy = bin_y.begin; sy < bin_y.end; ++sy) {
        const float* line = shared.plane + (c * height + sy) * width;
        for (int sx = bin_x.begin; sx < bin_x.end; ++sx) sum += static_cast<double>(line[sx]);
      }
      average = static_cast<float>(sum / positions);
    }
    rows[static_cast<int64_t>(p) * dim + block.first + c] = average;
  }
  // No barrier: what comes next begins with one, or writes nothing that is read here.
}

}  // namespace tokenflow::cuda
