// Nearest codes of rows: pack, rank, settle. The matrix of scores is never in memory.
//
//   pack_codes  once a call: the codebook normalised, weighted and transposed into tiles
//   rank        float32 scores of rows x codes in registers; one maximum for a row and a tile
//   settle      a warp a row: looks again at the tiles that may hold the best code and decides
//               between close codes by the distance in float64
#include <cmath>

#include "quantizer.h"
#include "search.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kPackThreads = 128;
constexpr int kRankThreads = 256;
constexpr int kSettleThreads = 128;

// Channels of both operands in shared memory at a time: two tiles of 40 x 128 floats are 40 KiB,
// so two blocks share a multiprocessor and TokenFlow's 40 channels need one step.
constexpr int kDepth = 40;

// Enough blocks to fill the largest machine several times over, few enough that a block's rows
// are loaded for more than one tile of codes.
constexpr int64_t kRankBlocks = 1024;

__device__ __forceinline__ float infinity() { return INFINITY; }

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < infinity(); }

// Grid: a block of kPackThreads for every kPackThreads codes of the padded codebook; a thread owns
// one code. Reads the codebook once and writes it once (4 (dim + 1) bytes a code), bound by memory.
__global__ void __launch_bounds__(kPackThreads)
    pack_codes_kernel(const __grid_constant__ CodebookLayout layout, const float* codebook,
                      const __grid_constant__ PackedCodes codes) {
  static_assert(kPackThreads == kTileCodes, "a block packs a tile");
  const int64_t code = static_cast<int64_t>(blockIdx.x) * kTileCodes + threadIdx.x;
  const int dim = layout.dim;
  float* column =
      codes.tiles + static_cast<int64_t>(blockIdx.x) * (dim + 1) * kTileCodes + threadIdx.x;
  if (code >= layout.codes) {
    column[0] = -infinity();
    for (int d = 0; d < dim; ++d) column[static_cast<int64_t>(d + 1) * kTileCodes] = 0;
    return;
  }
  const float* row = codebook + code * dim;
  double bias = 0, squared_length = 0;
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const double squared = squared_norm(row, begin, end);
    const double scale = layout.weight[g] * inverse_norm(squared, layout.l2_norm);
    bias += group_bias(squared, layout.weight[g], layout.l2_norm);
    squared_length += squared * scale * scale;
    for (int d = begin; d < end; ++d) {
      column[static_cast<int64_t>(d + 1) * kTileCodes] =
          static_cast<float>(static_cast<double>(row[d]) * scale);
    }
  }
  column[0] = static_cast<float>(bias);
  atomic_max_not_negative(&codes.bounds[0], static_cast<float>(sqrt(squared_length)) * 1.000001f);
  atomic_max_not_negative(&codes.bounds[1], static_cast<float>(fabs(bias)) * 1.000001f);
}

// Grid: a thread for every code and group, in blocks of kPackThreads. Reads the codebook once.
__global__ void __launch_bounds__(kPackThreads)
    scale_codes_kernel(const __grid_constant__ CodebookLayout layout, const float* codebook,
                       double* scales) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (i >= layout.codes * layout.groups) return;
  const float* row = codebook + i / layout.groups * layout.dim;
  const int g = static_cast<int>(i % layout.groups);
  scales[i] = inverse_norm(squared_norm(row, layout.begin[g], layout.begin[g + 1]), layout.l2_norm);
}

// Grid: a thread for every row, in blocks of kPackThreads. Reads and writes the rows once.
__global__ void __launch_bounds__(kPackThreads, 8)
    pack_rows_kernel(const __grid_constant__ CodebookLayout layout, const float* rows,
                     int64_t num_rows, const __grid_constant__ PackedRows packed) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (n < num_rows) pack_row(rows + n * layout.dim, layout, n, packed);
}

__device__ __forceinline__ bool is_dropped(const SearchArgs& args) {
  return args.dropped != nullptr && *args.dropped == args.scale;
}

template <int kRows>
struct RankShared {
  float rows[kDepth][kRows];
  float codes[kDepth][kTileCodes];
};

// Copies `depth` lines of kWidth floats from lines `stride` apart into shared memory.
template <int kWidth>
__device__ __forceinline__ void load_lines(const float* from, int stride, int depth,
                                           float (*to)[kWidth]) {
  constexpr int kVectors = kWidth / 4;
  for (int i = threadIdx.x; i < depth * kVectors; i += kRankThreads) {
    const int d = i / kVectors, v = i % kVectors * 4;
    *reinterpret_cast<float4*>(&to[d][v]) =
        *reinterpret_cast<const float4*>(from + static_cast<int64_t>(d) * stride + v);
  }
}

// Grid: (tiles of 16 kRowsPerThread rows, runs of `tiles_per_block` tiles of codes); a block owns
// the maxima of its rows over its tiles of codes. A thread holds kRowsPerThread x 8 scores.
// Shared memory: kDepth channels of a tile of rows and a tile of codes, 40 KiB at the most.
// Bytes: 4 dim (rows * runs + codes * tiles of rows) read, mostly from the second-level cache, and
// 4 rows * tiles of codes written. Operations: 2 dim rows codes; bound by float32 multiply-adds
// (each step of a channel is 4 shared loads of 16 bytes for 64 of them).
template <int kRowsPerThread>
__global__ void __launch_bounds__(kRankThreads, 2)
    rank_kernel(const __grid_constant__ SearchArgs args, int64_t first_row, int64_t num_rows,
                int tiles_per_block) {
  constexpr int kRows = 16 * kRowsPerThread;
  static_assert(kTileRows % kRows == 0 && kRankThreads == 256, "16 x 16 threads, whole tiles");
  if (is_dropped(args)) return;
  const int dim = args.layout.dim;
  const int64_t num_tiles = (args.layout.codes + kTileCodes - 1) / kTileCodes;
  RankShared<kRows>& shared = *shared_memory<RankShared<kRows>>();
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;

  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * kRows;  // from first_row
  const int64_t packed_row = first_row + block_row;
  const float* rows =
      args.packed.tiles + packed_row / kTileRows * dim * kTileRows + packed_row % kTileRows;
  const int64_t first_tile = static_cast<int64_t>(blockIdx.y) * tiles_per_block;
  const int64_t end_tile =
      first_tile + tiles_per_block < num_tiles ? first_tile + tiles_per_block : num_tiles;

  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const float* codes = args.codes.tiles + tile * (dim + 1) * kTileCodes;
    // A thread's codes are four at 4 tx and four at 64 + 4 tx, so that a warp's loads of shared
    // memory touch every bank once.
    float scores[kRowsPerThread][8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float bias = codes[4 * tx + j % 4 + j / 4 * (kTileCodes / 2)];
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) scores[i][j] = bias;
    }
    codes += kTileCodes;
    for (int d0 = 0; d0 < dim; d0 += kDepth) {
      const int depth = dim - d0 < kDepth ? dim - d0 : kDepth;
      block_barrier();  // the previous step's operands are no longer read
      if (tile == first_tile || dim > kDepth) {
        load_lines<kRows>(rows + static_cast<int64_t>(d0) * kTileRows, kTileRows, depth,
                          shared.rows);
      }
      load_lines<kTileCodes>(codes + static_cast<int64_t>(d0) * kTileCodes, kTileCodes, depth,
                             shared.codes);
      block_barrier();
#pragma unroll 2
      for (int d = 0; d < depth; ++d) {
        float z[kRowsPerThread], c[8];
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) z[i] = shared.rows[d][ty * kRowsPerThread + i];
#pragma unroll
        for (int j = 0; j < 8; ++j) c[j] = shared.codes[d][4 * tx + j % 4 + j / 4 * 64];
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) scores[i][j] = fmaf(z[i], c[j], scores[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      float best = -infinity();
#pragma unroll
      for (int j = 0; j < 8; ++j) best = fmaxf(best, scores[i][j]);  // passes over NaN
      for (int step = 8; step > 0; step /= 2) best = fmaxf(best, shuffle_xor(best, step));
      const int64_t n = block_row + ty * kRowsPerThread + i;
      if (tx == 0 && n < num_rows) args.tile_max[n * num_tiles + tile] = best;
    }
  }
}

// The best code so far under (distance, index), in float64.
struct Choice {
  double distance = INFINITY;
  int64_t index = 0;

  // Candidates of one thread come in ascending order, so a tie keeps the lower index.
  __device__ __forceinline__ void consider(const float* row, int64_t code, const SearchArgs& args) {
    const double d = tokenflow::distance(row, args.codebook + code * args.layout.dim, args.layout);
    if (d < distance) *this = {d, code};
  }

  __device__ __forceinline__ void reduce_warp() {
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      const double d = shuffle_xor(distance, step);
      const int64_t i = shuffle_xor(index, step);
      if (d < distance || (d == distance && i < index)) *this = {d, i};
    }
  }
};

// Scores of one tile again; the lane's codes that may be the best are settled in float64.
__device__ __forceinline__ void settle_tile(const SearchArgs& args, const float* row, int64_t n,
                                            int64_t tile, float threshold, Choice* choice) {
  const int dim = args.layout.dim;
  const float* packed = args.packed.tiles + n / kTileRows * dim * kTileRows + n % kTileRows;
  const float4* codes =
      reinterpret_cast<const float4*>(args.codes.tiles + tile * (dim + 1) * kTileCodes) +
      lane_index();
  float4 scores = *codes;
  for (int d = 0; d < dim; ++d) {
    codes += kTileCodes / 4;
    const float z = packed[static_cast<int64_t>(d) * kTileRows];
    const float4 c = *codes;
    scores.x = fmaf(z, c.x, scores.x);
    scores.y = fmaf(z, c.y, scores.y);
    scores.z = fmaf(z, c.z, scores.z);
    scores.w = fmaf(z, c.w, scores.w);
  }
  const int64_t code = tile * kTileCodes + 4 * lane_index();
  unsigned near = (scores.x >= threshold ? 1u : 0u) | (scores.y >= threshold ? 2u : 0u) |
                  (scores.z >= threshold ? 4u : 0u) | (scores.w >= threshold ? 8u : 0u);
  for (; near != 0; near &= near - 1) choice->consider(row, code + lowest_bit(near), args);
}

__device__ __forceinline__ double row_squared_error(const SearchArgs& args, int64_t n,
                                                    int64_t index) {
  const CodebookLayout& layout = args.layout;
  const float* packed = args.packed.tiles + n / kTileRows * layout.dim * kTileRows + n % kTileRows;
  double sum = 0;
  for (int g = 0; g < layout.groups; ++g) {
    const double scale = args.code_scales[index * layout.groups + g];
    for (int d = layout.begin[g] + lane_index(); d < layout.begin[g + 1]; d += kWarpSize) {
      const float q =
          static_cast<float>(static_cast<double>(args.codebook[index * layout.dim + d]) * scale);
      const double difference =
          static_cast<double>(q) - static_cast<double>(packed[static_cast<int64_t>(d) * kTileRows]);
      sum += difference * difference;
    }
  }
  for (int step = kWarpSize / 2; step > 0; step /= 2) sum += shuffle_xor(sum, step);
  return sum;
}

// Grid: a warp a row, kSettleThreads / 32 rows a block; no shared memory, no barrier.
// Bytes: 4 a tile of codes for the maxima, and 4 (dim + 1) kTileCodes for each tile looked at again
// (nearly always one), from the second-level cache, which bounds it. A row whose scores leave
// float32, or a codebook of equal rows, costs the distance to every code in float64.
__global__ void __launch_bounds__(kSettleThreads, 6)
    settle_kernel(const __grid_constant__ SearchArgs args, int64_t first_row, int64_t num_rows) {
  const CodebookLayout& layout = args.layout;
  const int lane = lane_index();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kSettleThreads / kWarpSize) + warp_index();
  if (n >= num_rows) return;
  const int64_t token = args.map.token(first_row + n);
  if (is_dropped(args)) {
    if (lane == 0) {
      args.indices[token] = -1;
      if (args.row_error) args.row_error[token] = 0;
    }
    return;
  }
  const float* row = args.rows + token * layout.dim;
  bool finite = true;
  for (int d = lane; d < layout.dim; d += kWarpSize) finite = finite && is_finite(row[d]);
  finite = ballot(!finite) == 0;

  const int64_t num_tiles = (layout.codes + kTileCodes - 1) / kTileCodes;
  const float* tile_max = args.tile_max + n * num_tiles;
  float best = -infinity();
  for (int64_t t = lane; t < num_tiles; t += kWarpSize) best = fmaxf(best, tile_max[t]);
  for (int step = kWarpSize / 2; step > 0; step /= 2) best = fmaxf(best, shuffle_xor(best, step));
  const float threshold =
      best - 2 * score_error_bound(layout.dim, args.packed.lengths[first_row + n],
                                   args.codes.bounds[0], args.codes.bounds[1]);

  Choice choice;
  if (finite && is_finite(threshold)) {
    for (int64_t t0 = 0; t0 < num_tiles; t0 += kWarpSize) {
      const bool near = t0 + lane < num_tiles && tile_max[t0 + lane] >= threshold;
      for (unsigned mask = ballot(near); mask != 0; mask &= mask - 1) {
        settle_tile(args, row, first_row + n, t0 + lowest_bit(mask), threshold, &choice);
      }
    }
  } else if (finite) {  // scores beyond float32: decide everything in float64
    for (int64_t code = lane; code < layout.codes; code += kWarpSize) {
      choice.consider(row, code, args);
    }
  }
  choice.reduce_warp();
  if (lane == 0) {
    args.indices[token] = choice.index;
    if (args.hits) atomic_add(args.hits + choice.index, int64_t{1});
  }
  if (args.row_error) {
    const double error = row_squared_error(args, first_row + n, choice.index);
    if (lane == 0) args.row_error[token] = error;
  }
}

template <int kRowsPerThread>
cudaError_t launch_rank(const SearchArgs& args, int64_t first_row, int64_t num_rows,
                        cudaStream_t stream) {
  constexpr int kRows = 16 * kRowsPerThread;
  const int64_t row_tiles = ceil_div(num_rows, kRows);
  const int64_t num_tiles = ceil_div(args.layout.codes, kTileCodes);
  // At most kRankBlocks runs, and the second grid dimension ends at 65,535.
  const int64_t tiles_per_block = ceil_div(num_tiles, ceil_div(kRankBlocks, row_tiles));
  const dim3 grid(static_cast<unsigned>(row_tiles),
                  static_cast<unsigned>(ceil_div(num_tiles, tiles_per_block)));
  return launch(rank_kernel<kRowsPerThread>, grid, kRankThreads, sizeof(RankShared<kRows>), stream,
                args, first_row, num_rows, static_cast<int>(tiles_per_block));
}

unsigned blocks(int64_t items, int per_block) {
  return static_cast<unsigned>(ceil_div(items, per_block));
}

struct NearestCodeScratch {
  PackedCodes codes;
  PackedRows rows;
  float* tile_max;

  NearestCodeScratch(Workspace& workspace, const NearestCodeArgs<float>& args)
      : codes(take_packed_codes(workspace, args.layout)),
        rows(take_packed_rows(workspace, args.layout.dim,
                              args.num_rows < kRowsAtOnce ? args.num_rows : kRowsAtOnce)),
        tile_max(take_tile_max(workspace, args.layout, args.num_rows)) {}
};

}  // namespace

cudaError_t launch_pack_codes(const CodebookLayout& layout, const float* codebook,
                              const PackedCodes& codes, cudaStream_t stream) {
  TF_CUDA_TRY(cudaMemsetAsync(codes.bounds, 0, 2 * sizeof(float), stream));
  return launch(pack_codes_kernel, dim3(blocks(layout.codes, kTileCodes)), kPackThreads, 0, stream,
                layout, codebook, codes);
}

cudaError_t launch_scale_codes(const CodebookLayout& layout, const float* codebook, double* scales,
                               cudaStream_t stream) {
  return launch(scale_codes_kernel, dim3(blocks(layout.codes * layout.groups, kPackThreads)),
                kPackThreads, 0, stream, layout, codebook, scales);
}

cudaError_t launch_search(const SearchArgs& args, cudaStream_t stream) {
  for (int64_t first = 0; first < args.num_rows; first += kRowsAtOnce) {
    const int64_t left = args.num_rows - first;
    const int64_t count = left < kRowsAtOnce ? left : kRowsAtOnce;
    // A coarse scale has few rows: small tiles waste fewer lanes on rows that are not there.
    if (count <= kTileRows / 2) {
      TF_CUDA_TRY(launch_rank<2>(args, first, count, stream));
    } else {
      TF_CUDA_TRY(launch_rank<8>(args, first, count, stream));
    }
    TF_CUDA_TRY(launch(settle_kernel, dim3(blocks(count, kSettleThreads / kWarpSize)),
                       kSettleThreads, 0, stream, args, first, count));
  }
  return cudaSuccess;
}

size_t nearest_code_workspace_bytes(const NearestCodeArgs<float>& args) {
  Workspace workspace(nullptr);
  NearestCodeScratch(workspace, args);
  return workspace.bytes();
}

cudaError_t launch_nearest_code(const NearestCodeArgs<float>& args, void* workspace_memory,
                                cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  const CodebookLayout& layout = args.layout;
  if (args.num_rows < 0 || unsupported_reason(layout)) return cudaErrorInvalidValue;
  Workspace workspace(workspace_memory);
  const NearestCodeScratch scratch(workspace, args);
  TF_CUDA_TRY(launch_pack_codes(layout, args.codebook, scratch.codes, stream));
  for (int64_t first = 0; first < args.num_rows; first += kRowsAtOnce) {
    const int64_t left = args.num_rows - first;
    const int64_t count = left < kRowsAtOnce ? left : kRowsAtOnce;
    const float* rows = args.rows + first * layout.dim;
    TF_CUDA_TRY(launch(pack_rows_kernel, dim3(blocks(count, kPackThreads)), kPackThreads, 0, stream,
                       layout, rows, count, scratch.rows));
    SearchArgs search = {};
    search.layout = layout;
    search.codebook = args.codebook;
    search.codes = scratch.codes;
    search.rows = rows;
    search.packed = scratch.rows;
    search.map = {count, 0, count};
    search.num_rows = count;
    search.tile_max = scratch.tile_max;
    search.indices = args.indices + first;
    TF_CUDA_TRY(launch_search(search, stream));
  }
  return cudaSuccess;
}

}  // namespace tokenflow::cuda
