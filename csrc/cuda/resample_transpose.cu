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

__device__ __forceinline__ Touching touching(int position, const Taps<float>* taps, int outputs) {
  // Tap positions do not decrease from one output to the next.
  int begin = 0;
  while (begin < outputs && taps[begin].position[3] < position) ++begin;
  int end = begin;
  while (end < outputs && taps[end].position[0] <= position) ++end;
  return {begin, end};
}

__device__ __forceinline__ float weight_at(const Taps<float>& taps, int position) {
  float weight = 0;  // at a border several taps meet at one position
  for (int k = 0; k < 4; ++k) weight += taps.position[k] == position ? taps.weight[k] : 0.0f;
  return weight;
}

struct UpsampleTransposeBlocks {
  int channels;        // a block owns this many
  int largest_side_x;  // over the scales
  int largest_side_y;
};

size_t upsample_transpose_table_bytes(const Pyramid& pyramid, int side_x, int side_y) {
  return sizeof(Taps<float>) * static_cast<size_t>(pyramid.height + pyramid.width) +
         sizeof(Touching) * static_cast<size_t>(side_x + side_y);
}

// Grid: (maps x blocks of `channels` channels, scales); a block owns those channels of a scale's
// rows. Shared memory: the gradient's plane and the plane gathered along y for every channel, and
// tables: 2 KiB a channel and 1.3 KiB of tables for 16 x 16 planes.
// Bytes: 4 dim height width a scale (from the L2 after the first), 4 dim a row
// written. Operations: 2 height width (taps a position) a scale and channel; bound by latency.
__global__ void __launch_bounds__(kPlaneThreads)
    upsample_transpose_kernel(const __grid_constant__ UpsampleTransposeArgs args,
                              const UpsampleTransposeBlocks blocks) {
  const Pyramid& pyramid = args.pyramid;
  const int s = static_cast<int>(blockIdx.y);
  const Extent extent = pyramid.extent[s];
  const int height = pyramid.height, width = pyramid.width;
  const int full = height * width, middle = extent.height * width, count = area(extent);
  const ChannelBlock block = channel_block(blockIdx.x, args.dim, blocks.channels);

  auto* taps_x = shared_memory<Taps<float>>();
  auto* taps_y = taps_x + width;
  auto* touching_x = reinterpret_cast<Touching*>(taps_y + height);
  auto* touching_y = touching_x + blocks.largest_side_x;
  auto* plane = reinterpret_cast<float*>(touching_y + blocks.largest_side_y);
  auto* columns = plane + blocks.channels * full;

  const float* from = args.plane + static_cast<int64_t>(block.map * args.dim + block.first) * full;
  for (int i = threadIdx.x; i < block.count * full; i += kPlaneThreads) plane[i] = from[i];
  make_taps(pyramid.upsampling, extent, height, width, taps_x);
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
    for (int at = touching_y[y].begin; at < touching_y[y].end; ++at) {
      total += weight_at(taps_y[at], y) * column[at * width];
    }
    columns[i] = total;
  }
  block_barrier();
  float* rows = args.rows +
                (block.map * tokens_per_image(pyramid) + pyramid.first_token[s]) * args.dim +
                block.first;
  for (int i = threadIdx.x; i < block.count * count; i += kPlaneThreads) {
    const int p = i / block.count, c = i % block.count;  // neighbours write one row
    const int x = p % extent.width;
    const float* line = columns + c * middle + p / extent.width * width;
    float total = 0;
    for (int at = touching_x[x].begin; at < touching_x[x].end; ++at) {
      total += weight_at(taps_x[at], x) * line[at];
    }
    rows[static_cast<int64_t>(p) * args.dim + c] = total;
  }
}

struct PoolTransposeShared {
  AreaBin bins_y[kMaxScales];
  AreaBin bins_x[kMaxScales][kTransposeTile];
  float tile[kTransposeTile][kTransposeTile + 1];  // [channel][x]
};

// Grid: (maps x lines of the plane, tiles of 32 columns, tiles of 32 channels); a block owns one
// line's tile, reads rows along channels and writes the plane along columns.
// Shared memory: the tile and the bins, 21 KiB. Bytes: 4 dim (rows, each once for every position in
// its bin, from the caches) and 4 dim height width written; bound by the caches.
template <BinShare kShare>
__global__ void __launch_bounds__(kTransposeThreads, 4)
    pool_transpose_kernel(const __grid_constant__ PoolTransposeArgs args) {
  const Pyramid& pyramid = args.pyramid;
  PoolTransposeShared& shared = *shared_memory<PoolTransposeShared>();
  const int64_t map = blockIdx.x / static_cast<unsigned>(pyramid.height);
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
      const int scale_height = pyramid.extent[s].height, scale_width = pyramid.extent[s].width;
      const AreaBin bin_x = shared.bins_x[s][x], bin_y = shared.bins_y[s];
      const float* rows = args.rows +
                          (map * tokens_per_image(pyramid) + pyramid.first_token[s]) * args.dim +
                          first_d + c;
      for (int sy = bin_y.begin; sy < bin_y.end; ++sy) {
        for (int sx = bin_x.begin; sx < bin_x.end; ++sx) {
          float row = rows[(static_cast<int64_t>(sy) * scale_width + sx) * args.dim];
          if (kShare == BinShare::kMean) {
            const AreaBin of_y = area_bin(sy, pyramid.height, scale_height);
            const AreaBin of_x = area_bin(sx, pyramid.width, scale_width);
            row /= static_cast<float>((of_y.end - of_y.begin) * (of_x.end - of_x.begin));
          }
          total += row;
        }
      }
    }
    shared.tile[c][x] = total;
  }
  block_barrier();
  for (int i = threadIdx.x; i < kElements; i += kTransposeThreads) {
    const int c = i / kTransposeTile, x = i % kTransposeTile;
    if (first_x + x >= pyramid.width || first_d + c >= args.dim) continue;
    args.plane[((map * args.dim + first_d + c) * pyramid.height + y) * pyramid.width + first_x +
               x] = shared.tile[c][x];
  }
}

}  // namespace

cudaError_t launch_upsample_transpose(const UpsampleTransposeArgs& args, cudaStream_t stream) {
  const Pyramid& pyramid = args.pyramid;
  UpsampleTransposeBlocks blocks = {};
  for (int s = 0; s < pyramid.num_scales; ++s) {
    blocks.largest_side_x = larger(blocks.largest_side_x, pyramid.extent[s].width);
    blocks.largest_side_y = larger(blocks.largest_side_y, pyramid.extent[s].height);
  }
  const size_t channel_bytes = sizeof(float) * static_cast<size_t>(pyramid.width) *
                               static_cast<size_t>(pyramid.height + blocks.largest_side_y);
  blocks.channels = choose_channels(pyramid.batch, args.dim, channel_bytes);
  const dim3 grid(static_cast<unsigned>(pyramid.batch * ceil_div(args.dim, blocks.channels)),
                  static_cast<unsigned>(pyramid.num_scales));
  return launch(
      upsample_transpose_kernel, grid, kPlaneThreads,
      upsample_transpose_table_bytes(pyramid, blocks.largest_side_x, blocks.largest_side_y) +
          static_cast<size_t>(blocks.channels) * channel_bytes,
      stream, args, blocks);
}

cudaError_t launch_pool_transpose(const PoolTransposeArgs& args, BinShare share,
                                  cudaStream_t stream) {
  const Pyramid& pyramid = args.pyramid;
  const dim3 grid(static_cast<unsigned>(pyramid.batch * pyramid.height),
                  static_cast<unsigned>(ceil_div(pyramid.width, kTransposeTile)),
                  static_cast<unsigned>(ceil_div(args.dim, kTransposeTile)));
  return launch(share == BinShare::kMean ? pool_transpose_kernel<BinShare::kMean>
                                         : pool_transpose_kernel<BinShare::kWhole>,
                grid, kTransposeThreads, sizeof(PoolTransposeShared), stream, args);
}

}  // namespace tokenflow::cuda
