// Planes of the residual pyramid in a block's shared memory: adding upsampled codes, and pooling.
#pragma once

#include "pyramid.cuh"

namespace tokenflow::cuda {

// What a scale is resampled to and from, and where its tokens are.
struct PlaneShape {
  Upsampling upsampling;
  int height;
  int width;
  int tokens;  // a map, of all scales
};

struct Scale {
  Extent extent;
  int first_token;
};

__host__ __device__ __forceinline__ PlaneShape plane_shape(const Pyramid& pyramid) {
  return {pyramid.upsampling, pyramid.height, pyramid.width,
          static_cast<int>(tokens_per_image(pyramid))};
}

__host__ __device__ __forceinline__ Scale scale_of(const Pyramid& pyramid, int s) {
  return {pyramid.extent[s], static_cast<int>(pyramid.first_token[s])};
}

// How much of each thing a block has room for, in elements.
struct PlaneSizes {
  int plane;   // a channel; 0 where a pass needs none
  int coarse;  // codes of a scale, a channel
  int middle;  // resampled along one axis, a channel
  int taps;    // of both axes
  int bins;

  // Room for adding a scale's codes.
  void adds(const Pyramid& pyramid, int s) {
    const Extent extent = pyramid.extent[s];
    coarse = larger(coarse, area(extent));
    middle = larger(middle, extent.height * pyramid.width);
    taps = pyramid.height + pyramid.width;
  }

  // Room for pooling the plane to a scale.
  void pools(const Pyramid& pyramid, int s) {
    const Extent extent = pyramid.extent[s];
    middle = larger(middle, pyramid.height * extent.width);
    bins = larger(bins, extent.height + extent.width);
  }

  size_t channel_bytes() const {
    return sizeof(float) * static_cast<size_t>(int64_t{plane} + coarse + middle);
  }

  size_t table_bytes() const {
    return sizeof(Taps<float>) * static_cast<size_t>(taps) +
           sizeof(AreaBin) * static_cast<size_t>(bins);
  }
};

// Sizes of a pass that keeps the plane.
inline PlaneSizes sizes_with_plane(const Pyramid& pyramid) {
  PlaneSizes sizes = {};
  sizes.plane = pyramid.height * pyramid.width;
  return sizes;
}

// Of one that goes through all scales.
inline PlaneSizes sizes_of_all_scales(const Pyramid& pyramid) {
  PlaneSizes sizes = sizes_with_plane(pyramid);
  for (int s = 0; s < pyramid.num_scales; ++s) {
    sizes.adds(pyramid, s);
    sizes.pools(pyramid, s);
  }
  return sizes;
}

// How a kernel's blocks share out the planes of all maps.
struct PlaneBlocks {
  int dim;
  int channels;  // of a block
  unsigned count;
  PlaneSizes sizes;

  PlaneBlocks(int64_t batch, int dim, const PlaneSizes& sizes)
      : dim(dim),
        channels(choose_channels(batch, dim, sizes.channel_bytes())),
        count(static_cast<unsigned>(batch * ceil_div(dim, channels))),
        sizes(sizes) {}

  size_t shared_bytes() const {
    return sizes.table_bytes() + static_cast<size_t>(channels) * sizes.channel_bytes();
  }
};

// A block's view of its shared memory.
struct Planes {
  Taps<float>* taps;  // [width] for x, then [height] for y
  AreaBin* bins;      // likewise of a scale
  float* plane;       // [channels][height][width]
  float* coarse;      // [channels][scale height][scale width]
  float* middle;      // [channels], see PlaneSizes

  __device__ __forceinline__ explicit Planes(const PlaneBlocks& blocks) {
    const PlaneSizes& sizes = blocks.sizes;
    taps = shared_memory<Taps<float>>();
    bins = reinterpret_cast<AreaBin*>(taps + sizes.taps);
    plane = reinterpret_cast<float*>(bins + sizes.bins);
    coarse = plane + blocks.channels * sizes.plane;
    middle = coarse + blocks.channels * sizes.coarse;
  }
};

// Division of what counts elements of shared memory, by one multiplication. With
// m = floor(2^31 / d) + 1, m d exceeds 2^31 by at most d, so n m / 2^31 exceeds n / d by at most
// n / 2^31: less than the 1 / d that is left to the next integer, while n d < 2^31.
class Divisor {
 public:
  __device__ __forceinline__ explicit Divisor(int divisor)
      : multiplier_((1u << 31) / static_cast<unsigned>(divisor) + 1) {}

  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<unsigned>(n)) * multiplier_ >> 31);
  }

 private:
  static constexpr uint64_t kMostElements = kPlaneSharedLimit / sizeof(float);
  static_assert(kMostElements * kMostElements < uint64_t{1} << 31, "n d < 2^31");
  unsigned multiplier_;
};

// A thread's share of a block's rows: the places first, first + step, ... of one channel.
// Neighbouring threads have neighbouring channels of a place, as rows lie in memory.
struct RowShare {
  int channel;  // of the block; exists, whatever the share
  int first;
  int step;

  // `channels`: that blocks own, a power of two. The last of a map may have fewer.
  __device__ __forceinline__ RowShare(const ChannelBlock& block, int channels) {
    const int shift = lowest_bit(static_cast<unsigned>(channels));
    const int own = static_cast<int>(threadIdx.x) & (channels - 1);
    const bool exists = own < block.count;
    channel = exists ? own : 0;
    first = exists ? static_cast<int>(threadIdx.x) >> shift : kNowhere;
    step = kPlaneThreads >> shift;
  }

 private:
  static constexpr int kNowhere = 1 << 30;
};

// Where a block's planes begin in [batch, dim, height, width].
__device__ __forceinline__ int64_t plane_offset(const ChannelBlock& block, int dim,
                                                const PlaneShape& shape) {
  return static_cast<int64_t>(block.map * dim + block.first) * (shape.height * shape.width);
}

// Where a thread's channel of a scale's rows begins in [batch, tokens, dim].
__device__ __forceinline__ int64_t row_offset(const ChannelBlock& block, const RowShare& share,
                                              int dim, const PlaneShape& shape,
                                              const Scale& scale) {
  return static_cast<int64_t>(block.map * shape.tokens + scale.first_token) * dim + block.first +
         share.channel;
}

// shared.plane = the block's part of `planes`. A barrier must follow.
__device__ __forceinline__ void load_planes(const float* planes, const ChannelBlock& block,
                                            const PlaneShape& shape, const Planes& shared) {
  for (int i = threadIdx.x; i < block.count * shape.height * shape.width; i += kPlaneThreads) {
    shared.plane[i] = planes[i];
  }
}

// The other way. A barrier must come first.
__device__ __forceinline__ void store_planes(float* planes, const ChannelBlock& block,
                                             const PlaneShape& shape, const Planes& shared) {
  for (int i = threadIdx.x; i < block.count * shape.height * shape.width; i += kPlaneThreads) {
    planes[i] = shared.plane[i];
  }
}

// Calls add(i, u) for every element i of [channels][height][width] with the upsampled codes u of a
// scale; code(p) is that of this thread's channel at place p. Ends with a barrier.
template <typename Code, typename Add>
__device__ __forceinline__ void upsample_codes(const PlaneShape& shape, Extent extent,
                                               const ChannelBlock& block, const RowShare& share,
                                               const Planes& shared, const Code& code,
                                               const Add& add) {
  const int height = shape.height, width = shape.width, count = area(extent);
  make_taps(shape.upsampling, extent, height, width, shared.taps);
  for (int p = share.first; p < count; p += share.step) {
    shared.coarse[share.channel * count + p] = code(p);
  }
  block_barrier();
  // Along x: [channels][extent.height][width].
  const int middle = extent.height * width;
  const Divisor by_width(width), by_height(height);
  for (int i = threadIdx.x; i < block.count * middle; i += kPlaneThreads) {
    const int y = by_width.quotient(i);
    const Taps<float>& taps = shared.taps[i - y * width];
    const float* line = shared.coarse + y * extent.width;
    shared.middle[i] =
        taps.weight[0] * line[taps.position[0]] + taps.weight[1] * line[taps.position[1]] +
        taps.weight[2] * line[taps.position[2]] + taps.weight[3] * line[taps.position[3]];
  }
  block_barrier();
  // Along y: [channels][height][width].
#pragma unroll 4  // so that several of what `add` loads are on their way
  for (int i = threadIdx.x; i < block.count * height * width; i += kPlaneThreads) {
    const int line = by_width.quotient(i), c = by_height.quotient(line);
    const Taps<float>& taps = shared.taps[width + line - c * height];
    const float* column = shared.middle + c * middle + (i - line * width);
    add(i, taps.weight[0] * column[taps.position[0] * width] +
               taps.weight[1] * column[taps.position[1] * width] +
               taps.weight[2] * column[taps.position[2] * width] +
               taps.weight[3] * column[taps.position[3] * width]);
  }
  block_barrier();
}

// rows [tokens, dim], from this thread's channel of the scale's first token on = the plane averaged
// over the scale's bins. Each thread writes what it reads as `code` first. Begins with a barrier
// before it reads the plane.
__device__ __forceinline__ void pool(const PlaneShape& shape, Extent extent,
                                     const ChannelBlock& block, const RowShare& share,
                                     const Planes& shared, int dim, float* rows) {
  const int height = shape.height, width = shape.width, count = area(extent);
#pragma unroll 1
  for (int i = threadIdx.x; i < extent.width + extent.height; i += kPlaneThreads) {
    const bool along_x = i < extent.width;
    shared.bins[i] = along_x ? area_bin(i, width, extent.width)
                             : area_bin(i - extent.width, height, extent.height);
  }
  block_barrier();
  const int middle = height * extent.width;
  const Divisor by_width(extent.width);
  for (int i = threadIdx.x; i < block.count * middle; i += kPlaneThreads) {
    const int y = by_width.quotient(i);
    const AreaBin bin = shared.bins[i - y * extent.width];
    const float* line = shared.plane + y * width;
    float total = 0;
    for (int x = bin.begin; x < bin.end; ++x) total += line[x];
    shared.middle[i] = total;
  }
  block_barrier();
  for (int p = share.first; p < count; p += share.step) {
    const int y = by_width.quotient(p), x = p - y * extent.width;
    const AreaBin bin_x = shared.bins[x], bin_y = shared.bins[extent.width + y];
    const float* column = shared.middle + share.channel * middle + x;
    float total = 0;
    for (int sy = bin_y.begin; sy < bin_y.end; ++sy) total += column[sy * extent.width];
    const int positions = (bin_y.end - bin_y.begin) * (bin_x.end - bin_x.begin);
    float average = total / static_cast<float>(positions);
    if (!(average - average == 0)) {
      // The sum may be beyond float32 where the average is not.
      double sum = 0;
#pragma unroll 1
      for (int sy = bin_y.begin; sy < bin_y.end; ++sy) {
        const float* line = shared.plane + (share.channel * height + sy) * width;
#pragma unroll 1
        for (int sx = bin_x.begin; sx < bin_x.end; ++sx) sum += static_cast<double>(line[sx]);
      }
      average = static_cast<float>(sum / positions);
    }
    rows[static_cast<int64_t>(p) * dim] = average;
  }
  // No barrier: what comes next begins with one, or writes nothing that is read here.
}

}  // namespace tokenflow::cuda
