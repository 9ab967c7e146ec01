// The residual pyramid's step, one kernel: gather, bicubic upsampling, accumulation, residual
// update and pooling to the next scale.
#include <climits>

#include "../common/normalize.h"
#include "quantizer.h"
#include "residual_pass.cuh"

namespace tokenflow::cuda {
namespace {

// Shared memory of a pass: sizes in elements over all of its scales.
struct ResidualPassShared {
  int coarse;  // codes of a scale, a channel
  int middle;  // resampled along one axis, a channel
  int bins_x;
  int bins_y;

  __host__ __device__ ResidualPassShared(const Pyramid& pyramid, int first, int last, bool pools)
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
    return sizeof(CubicTaps<float>) * static_cast<size_t>(pyramid.height + pyramid.width) +
           sizeof(AreaBin) * static_cast<size_t>(bins_x + bins_y);
  }
};

// A block's view of its shared memory.
struct Planes {
  CubicTaps<float>* taps_x;  // [width]
  CubicTaps<float>* taps_y;  // [height]
  AreaBin* bins_x;
  AreaBin* bins_y;
  float* plane;   // [channels][height][width]
  float* coarse;  // [channels][scale height][scale width]
  float* middle;  // [channels], see ResidualPassShared

  __device__ Planes(const ResidualPassArgs& args, const ResidualPassShared& sizes) {
    const Pyramid& pyramid = args.pyramid;
    taps_x = shared_memory<CubicTaps<float>>();
    taps_y = taps_x + pyramid.width;
    bins_x = reinterpret_cast<AreaBin*>(taps_y + pyramid.height);
    bins_y = bins_x + sizes.bins_x;
    plane = reinterpret_cast<float*>(bins_y + sizes.bins_y);
    coarse = plane + args.channels * pyramid.height * pyramid.width;
    middle = coarse + args.channels * sizes.coarse;
  }
};

// plane += sign * u, sum += u for the codes of scale s.
__device__ __forceinline__ void add_codes(const ResidualPassArgs& args, const ChannelBlock& block,
                                          int s, const Planes& shared) {
  const Pyramid& pyramid = args.pyramid;
  const CodebookLayout& layout = args.layout;
  const Extent extent = pyramid.extent[s];
  const int height = pyramid.height, width = pyramid.width, count = area(extent);
  const int64_t* indices =
      args.indices + block.image * tokens_per_image(pyramid) + pyramid.first_token[s];

  for (int x = threadIdx.x; x < width; x += kPlaneThreads) {
    shared.taps_x[x] = cubic_taps<float>(x, extent.width, width);
  }
  for (int y = threadIdx.x; y < height; y += kPlaneThreads) {
    shared.taps_y[y] = cubic_taps<float>(y, extent.height, height);
  }
  for (int i = threadIdx.x; i < count * block.count; i += kPlaneThreads) {
    const int p = i / block.count, c = i % block.count;  // neighbours read one row of the codebook
    const int64_t index = indices[p];
    const int d = block.first + c;
    shared.coarse[c * count + p] = names_code(index, layout)
                                       ? unit_code(args.codebook, args.code_inverse_norms, layout,
                                                   index, d, group_of(d, layout))
                                       : 0.0f;
  }
  block_barrier();
  // Along x: [channels][extent.height][width].
  const int middle = extent.height * width;
  for (int i = threadIdx.x; i < block.count * middle; i += kPlaneThreads) {
    const CubicTaps<float>& taps = shared.taps_x[i % width];
    const float* line = shared.coarse + i / width * extent.width;
    shared.middle[i] =
        taps.weight[0] * line[taps.position[0]] + taps.weight[1] * line[taps.position[1]] +
        taps.weight[2] * line[taps.position[2]] + taps.weight[3] * line[taps.position[3]];
  }
  block_barrier();
  // Along y: [channels][height][width].
  const int full = height * width;
  const int64_t offset = (block.image * layout.dim + block.first) * full;
  for (int i = threadIdx.x; i < block.count * full; i += kPlaneThreads) {
    const int c = i / full, x = i % width;
    const CubicTaps<float>& taps = shared.taps_y[i % full / width];
    const float* column = shared.middle + c * middle + x;
    const float u = taps.weight[0] * column[taps.position[0] * width] +
                    taps.weight[1] * column[taps.position[1] * width] +
                    taps.weight[2] * column[taps.position[2] * width] +
                    taps.weight[3] * column[taps.position[3] * width];
    shared.plane[i] += args.sign * u;
    if (args.sum) {
      const bool first = args.sum_is_empty && s == args.first;
      args.sum[offset + i] = first ? u : args.sum[offset + i] + u;
    }
  }
  block_barrier();
}

// rows = the plane averaged over the bins of scale s.
__device__ __forceinline__ void pool(const ResidualPassArgs& args, const ChannelBlock& block, int s,
                                     const Planes& shared) {
  const Pyramid& pyramid = args.pyramid;
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
  float* rows = args.rows + (block.image * tokens_per_image(pyramid) + pyramid.first_token[s]) *
                                args.layout.dim;
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
    rows[static_cast<int64_t>(p) * args.layout.dim + block.first + c] = average;
  }
  // No barrier: what comes next begins with one, or writes nothing that is read here.
}

// Grid: a thread a row, which it owns. Bytes: 8 dim a row. Bound by latency.
__global__ void __launch_bounds__(kPlaneThreads)
    normalize_rows_kernel(const __grid_constant__ CodebookLayout layout, float* rows,
                          int64_t num_rows) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kPlaneThreads + threadIdx.x;
  if (n < num_rows) normalize_row(rows + n * layout.dim, layout, rows + n * layout.dim);
}

// Grid: a block for every image and `channels` channels; the block owns their planes from the
// first scale to the last, so nothing but sums and pooled rows leaves it between scales.
// Shared memory: the plane, a scale's codes, and one axis of the resampling for every channel, plus
// tables of taps and bins: for 16 x 16 planes 3 KiB a channel and 1.3 KiB of tables.
// Bytes a scale: 4 dim (rows + height width) read, the same written; 2 reads and 1 write more of
// the plane where the pass is cut at every scale by a search. Operations: 16 a scale and element of
// the plane. Bound by latency for the small planes of TokenFlow, by memory for large ones.
__global__ void __launch_bounds__(kPlaneThreads, 3)
    residual_pass_kernel(const __grid_constant__ ResidualPassArgs args,
                         const __grid_constant__ ResidualPassShared sizes) {
  const Pyramid& pyramid = args.pyramid;
  const ChannelBlock block = channel_block(blockIdx.x, args.layout.dim, args.channels);
  const Planes shared(args, sizes);
  const int elements = block.count * pyramid.height * pyramid.width;
  const int64_t offset =
      (block.image * args.layout.dim + block.first) * pyramid.height * pyramid.width;
  for (int i = threadIdx.x; i < elements; i += kPlaneThreads) {
    shared.plane[i] = args.plane_in ? args.plane_in[offset + i] : 0.0f;
  }  // whatever reads it comes after a barrier
  for (int s = args.first; s <= args.last; ++s) {
    if (s >= 0) add_codes(args, block, s, shared);
    if (args.rows && s + 1 < pyramid.num_scales) pool(args, block, s + 1, shared);
  }
  if (args.plane_out) {
    for (int i = threadIdx.x; i < elements; i += kPlaneThreads) {
      args.plane_out[offset + i] = shared.plane[i];
    }
  }
}

}  // namespace

cudaError_t launch_residual_pass(ResidualPassArgs args, cudaStream_t stream) {
  const ResidualPassShared sizes(args.pyramid, args.first, args.last, args.rows != nullptr);
  const size_t channel_bytes = sizes.channel_bytes(args.pyramid);
  args.channels = choose_channels(args.pyramid.batch, args.layout.dim, channel_bytes);
  const int64_t blocks = args.pyramid.batch * ceil_div(args.layout.dim, args.channels);
  return launch(
      residual_pass_kernel, dim3(static_cast<unsigned>(blocks)), kPlaneThreads,
      sizes.table_bytes(args.pyramid) + static_cast<size_t>(args.channels) * channel_bytes, stream,
      args, sizes);
}

cudaError_t launch_normalize_rows(const CodebookLayout& layout, float* rows, int64_t num_rows,
                                  cudaStream_t stream) {
  return launch(normalize_rows_kernel,
                dim3(static_cast<unsigned>(ceil_div(num_rows, kPlaneThreads))), kPlaneThreads, 0,
                stream, layout, rows, num_rows);
}

const char* unsupported_reason(const CodebookLayout& layout) {
  if (layout.codes < 1 || layout.codes > (int64_t{1} << 30)) {
    return "the CUDA kernels support codebooks of 1 to 2^30 rows";
  }
  if (layout.dim > (1 << 20)) return "the CUDA kernels support at most 2^20 channels";
  return nullptr;
}

const char* unsupported_reason(const Pyramid& pyramid, const CodebookLayout& layout) {
  if (const char* reason = unsupported_reason(layout)) return reason;
  if (pyramid.batch * tokens_per_image(pyramid) > INT_MAX || pyramid.batch * layout.dim > INT_MAX ||
      pyramid.batch * pyramid.height > INT_MAX) {
    return "the CUDA kernels support at most 2^31 - 1 tokens, images times channels, and images "
           "times "
           "lines in a call";
  }
  // int64 before the sizes are multiplied as int: no side is above 2^15 (checked by the caller).
  const int64_t largest = static_cast<int64_t>(kPlaneSharedLimit / sizeof(float));
  const auto exceeds = [&](int64_t height, int64_t width) { return height * width > largest; };
  bool too_large = exceeds(pyramid.height, pyramid.width);
  for (int s = 0; s < pyramid.num_scales && !too_large; ++s) {
    const Extent e = pyramid.extent[s];
    too_large = exceeds(e.height, e.width) || exceeds(e.height, pyramid.width) ||
                exceeds(pyramid.height, e.width);
  }
  if (!too_large) {
    const ResidualPassShared sizes(pyramid, -1, pyramid.num_scales - 1, true);
    too_large = sizes.table_bytes(pyramid) + sizes.channel_bytes(pyramid) > kPlaneSharedLimit;
  }
  return too_large
             ? "the CUDA kernels keep a channel's plane, a scale's codes and the half-resampled "
               "plane in 96 KiB of shared memory: height x width and the scales are too large"
             : nullptr;
}

}  // namespace tokenflow::cuda
