// Transposes of the bicubic upsampling and of the area pooling. Each gathers, so that no float is
// added by two threads in an unknown order.
#include "resample_transpose.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kTransposeTile = 32;
constexpr int kTransposeThreads = 256;

// Outputs of a bicubic axis whose taps touch one input position lie in [begin, end).
struct Touching {
  int begin;
  int end;
};

__device__ __forceinline__ Touching touching(int position, const CubicTaps<float>* taps,
                                             int outputs) {
  // Tap positions do not decrease from one output to the next.
  int begin = 0;
  while (begin < outputs && taps[begin].position[3] < position) ++begin;
  int end = begin;
  while (end < outputs && taps[end].position[0] <= position) ++end;
  return {begin, end};
}

__device__ __forceinline__ float weight_at(const CubicTaps<float>& taps, int position) {
  float weight = 0;  // at a border several taps meet at one position
  for (int k = 0; k < 4; ++k) weight += taps.position[k] == position ? taps.weight[k] : 0.0f;
  return weight;
}

struct UpsampleTransposeArgs {
  Pyramid pyramid;
  int dim;
  int channels;        // a block owns this many
  int largest_side_x;  // over the scales
  int largest_side_y;
  const float* grad_plane;  // [batch, dim, height, width]
  float* grad_rows;         // out [batch, tokens, dim]
};

size_t upsample_transpose_table_bytes(const Pyramid& pyramid, int side_x, int side_y) {
  return sizeof(CubicTaps<float>) * static_cast<size_t>(pyramid.height + pyramid.width) +
         sizeof(Touching) * static_cast<size_t>(side_x + side_y);
}

// Grid: (images x blocks of `channels` channels, scales); a block owns those channels of a scale's
// rows. Shared memory: the gradient's plane and the plane gathered along y for every channel, and
// tables: 2 KiB a channel and 1.3 KiB of tables for 16 x 16 planes.
// Bytes: 4 dim height width a scale (from the L2 after the first), 4 dim a row
// written. Operations: 2 height width (taps a position) a scale and channel; bound by latency.
__global__ void __launch_bounds__(kPlaneThreads)
    upsample_transpose_kernel(const __grid_constant__ UpsampleTransposeArgs args) {
  const Pyramid& pyramid = args.pyramid;
  const int s = static_cast<int>(blockIdx.y);
  const Extent extent = pyramid.extent[s];
  const int height = pyramid.height, width = pyramid.width;
  const int full = height * width, middle = extent.height * width, count = area(extent);
  const ChannelBlock block = channel_block(blockIdx.x, args.dim, args.channels);

  auto* taps_x = shared_memory<CubicTaps<float>>();
  auto* taps_y = taps_x + width;
  auto* touching_x = reinterpret_cast<Touching*>(taps_y + height);
  auto* touching_y = touching_x + args.largest_side_x;
  auto* plane = reinterpret_cast<float*>(touching_y + args.largest_side_y);
  auto* columns = plane + args.channels * full;

  const float* grad_plane = args.grad_plane + (block.image * args.dim + block.first) * full;
  for (int i = threadIdx.x; i < block.count * full; i += kPlaneThreads) plane[i] = grad_plane[i];
  for (int x = threadIdx.x; x < width; x += kPlaneThreads) {
    taps_x[x] = cubic_taps<float>(x, extent.width, width);
  }
  for (int y = threadIdx.x; y < height; y += kPlaneThreads) {
    taps_y[y] = cubic_taps<float>(y, extent.height, height);
  }
  block_barrier();
  for (int x = threadIdx.x; x < extent.width; x += kPlaneThreads) {
    touching_x[x] = touching(x, taps_x, width);
  }
  for (int y = threadIdx.x; y < extent.height; y += kPlaneThreads) {
    touching_y[y] = touching(y, taps_y, height);
  }
  block_barrier();
  for (int i = threadIdx.x; i < block.count * middle; i += kPlaneThreads) {
    const int x = i % width, y = i / width % extent.height;
    const float* column = plane + i / middle * full + x;
    float total = 0;
    for (int from = touching_y[y].begin; from < touching_y[y].end; ++from) {
      total += weight_at(taps_y[from], y) * column[from * width];
    }
    columns[i] = total;
  }
  block_barrier();
  float* rows = args.grad_rows +
                (block.image * tokens_per_image(pyramid) + pyramid.first_token[s]) * args.dim +
                block.first;
  for (int i = threadIdx.x; i < block.count * count; i += kPlaneThreads) {
    const int p = i / block.count, c = i % block.count;  // neighbours write one row
    const int x = p % extent.width;
    const float* line = columns + c * middle + p / extent.width * width;
    float total = 0;
    for (int from = touching_x[x].begin; from < touching_x[x].end; ++from) {
      total += weight_at(taps_x[from], x) * line[from];
    }
    rows[static_cast<int64_t>(p) * args.dim + c] = total;
  }
}

struct PoolTransposeArgs {
  Pyramid pyramid;
  int dim;
  const float* grad_rows;  // [batch, tokens, dim]
  float* grad_plane;       // out [batch, dim, height, width]
};

struct PoolTransposeShared {
  AreaBin bins_y[kMaxScales];
  AreaBin bins_x[kMaxScales][kTransposeTile];
  float tile[kTransposeTile][kTransposeTile + 1];  // [channel][x]
};

// Grid: (images x lines of the plane, tiles of 32 columns, tiles of 32 channels); a block owns one
// line's tile, reads rows along channels and writes the plane along columns.
// Shared memory: the tile and the bins, 21 KiB. Bytes: 4 dim (rows, each once for every position in
// its bin, from the caches) and 4 dim height width written; bound by the caches.
__global__ void __launch_bounds__(kTransposeThreads)
    pool_transpose_kernel(const __grid_constant__ PoolTransposeArgs args) {
  const Pyramid& pyramid = args.pyramid;
  PoolTransposeShared& shared = *shared_memory<PoolTransposeShared>();
  const int64_t image = blockIdx.x / static_cast<unsigned>(pyramid.height);
  const int y = static_cast<int>(blockIdx.x % static_cast<unsigned>(pyramid.height));
  const int first_x = static_cast<int>(blockIdx.y) * kTransposeTile;
  const int first_d = static_cast<int>(blockIdx.z) * kTransposeTile;
  for (int i = threadIdx.x; i < pyramid.num_scales * kTransposeTile; i += kTransposeThreads) {
    const int s = i / kTransposeTile, x = i % kTransposeTile;
    const Extent extent = pyramid.extent[s];
    if (first_x + x < pyramid.width) {
      shared.bins_x[s][x] = area_bins_of(first_x + x, pyramid.width, extent.width);
    }
    if (x == 0) shared.bins_y[s] = area_bins_of(y, pyramid.height, extent.height);
  }
  block_barrier();
  constexpr int kElements = kTransposeTile * kTransposeTile;
  for (int i = threadIdx.x; i < kElements; i += kTransposeThreads) {
    const int x = i / kTransposeTile, c = i % kTransposeTile;
    if (first_x + x >= pyramid.width || first_d + c >= args.dim) continue;
    float total = 0;
    for (int s = 0; s < pyramid.num_scales; ++s) {
      const int scale_width = pyramid.extent[s].width;
      const AreaBin bin_x = shared.bins_x[s][x], bin_y = shared.bins_y[s];
      const float* rows = args.grad_rows +
                          (image * tokens_per_image(pyramid) + pyramid.first_token[s]) * args.dim +
                          first_d + c;
      for (int sy = bin_y.begin; sy < bin_y.end; ++sy) {
        for (int sx = bin_x.begin; sx < bin_x.end; ++sx) {
          total += rows[(static_cast<int64_t>(sy) * scale_width + sx) * args.dim];
        }
      }
    }
    shared.tile[c][x] = total;
  }
  block_barrier();
  for (int i = threadIdx.x; i < kElements; i += kTransposeThreads) {
    const int c = i / kTransposeTile, x = i % kTransposeTile;
    if (first_x + x >= pyramid.width || first_d + c >= args.dim) continue;
    args.grad_plane[((image * args.dim + first_d + c) * pyramid.height + y) * pyramid.width +
                    first_x + x] = shared.tile[c][x];
  }
}

}  // namespace

cudaError_t launch_upsample_transpose(const Pyramid& pyramid, int dim, const float* grad_plane,
                                      float* grad_rows, cudaStream_t stream) {
  UpsampleTransposeArgs transpose = {};
  transpose.pyramid = pyramid;
  transpose.dim = dim;
  for (int s = 0; s < pyramid.num_scales; ++s) {
    transpose.largest_side_x = larger(transpose.largest_side_x, pyramid.extent[s].width);
    transpose.largest_side_y = larger(transpose.largest_side_y, pyramid.extent[s].height);
  }
  const size_t channel_bytes = sizeof(float) * static_cast<size_t>(pyramid.width) *
                               static_cast<size_t>(pyramid.height + transpose.largest_side_y);
  transpose.channels = choose_channels(pyramid.batch, transpose.dim, channel_bytes);
  transpose.grad_plane = grad_plane;
  transpose.grad_rows = grad_rows;
  const dim3 grid(
      static_cast<unsigned>(pyramid.batch * ceil_div(transpose.dim, transpose.channels)),
      static_cast<unsigned>(pyramid.num_scales));
  return launch(
      upsample_transpose_kernel, grid, kPlaneThreads,
      upsample_transpose_table_bytes(pyramid, transpose.largest_side_x, transpose.largest_side_y) +
          static_cast<size_t>(transpose.channels) * channel_bytes,
      stream, transpose);
}

cudaError_t launch_pool_transpose(const Pyramid& pyramid, int dim, const float* grad_rows,
                                  float* grad_plane, cudaStream_t stream) {
  const PoolTransposeArgs args = {pyramid, dim, grad_rows, grad_plane};
  const dim3 grid(static_cast<unsigned>(pyramid.batch * pyramid.height),
                  static_cast<unsigned>(ceil_div(pyramid.width, kTransposeTile)),
                  static_cast<unsigned>(ceil_div(dim, kTransposeTile)));
  return launch(pool_transpose_kernel, grid, kTransposeThreads, sizeof(PoolTransposeShared), stream,
                args);
}

}  // namespace tokenflow::cuda
