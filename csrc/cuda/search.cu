// Nearest codes of rows: scale, pack, rank, settle. The matrix of scores is never in memory.
//
//   scale_codes  once a call: reciprocal lengths, and the range of the codebook
//   pack         once a call: codes (and rows) in half precision, as the tensor cores take them
//   rank         scores of rows x codes in registers; one maximum for a row and a tile of codes
//   settle       a warp a row: looks again at the tiles that may hold the best code, and decides
//                between codes too close for half precision by the distance in float64
#include <cmath>

#include "quantizer.h"
#include "search.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kPackThreads = 128;
constexpr int kRankThreads = 128;
constexpr int kSettleThreads = 256;
constexpr int kRankWarps = kRankThreads / kWarpSize;

// Tiles of codes on their way to a block: one is multiplied while the next two are loaded.
constexpr int kStages = 3;

__device__ __forceinline__ float infinity() { return INFINITY; }

__device__ __forceinline__ bool is_finite(double x) {
  return fabs(x) < static_cast<double>(infinity());
}

// Largest over the warp's lanes `step` apart.
template <typename T>
__device__ __forceinline__ T max_over_warp(T x, int step) {
  for (int mask = kWarpSize / 2; mask >= step; mask /= 2) {
    const T other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}

// Grid: kPackLanes lanes for every code, in blocks of kPackThreads. Writes the reciprocal lengths
// to `scales` [codes, groups] and raises `range` to the codes', either of which may be null. Reads
// the codebook once, bound by memory.
__global__ void __launch_bounds__(kPackThreads)
    scale_codes_kernel(const __grid_constant__ CodebookLayout layout, const float* codebook,
                       double* scales, RankRange* range) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) / kPackLanes;
  const bool exists = n < layout.codes;
  const float* code = codebook + (exists ? n : 0) * layout.dim;
  if (scales) {
    for (int g = 0; g < layout.groups; ++g) {
      const double squared = quad_squared_norm(code, layout.begin[g], layout.begin[g + 1]);
      if (exists && lane_index() % kPackLanes == 0) {
        scales[n * layout.groups + g] = inverse_norm(squared, layout.l2_norm);
      }
    }
  }
  if (range) {
    const VectorSize size = measure_vector(code, layout);
    const double length = max_over_warp(size.length, kPackLanes);
    const double bias = max_over_warp(fabs(size.bias), kPackLanes);
    if (lane_index() == 0) {
      atomic_max_not_negative(&range->length, length);
      atomic_max_not_negative(&range->bias, bias);
    }
  }
}

// Packs code n of the padded codebook, the work of kPackLanes lanes, and raises the bounds.
__device__ __forceinline__ void pack_code(const CodebookLayout& layout, const float* codebook,
                                          int64_t n, const PackedCodes& codes) {
  const bool exists = n < layout.codes;
  const float* code = codebook + (exists ? n : 0) * layout.dim;
  VectorSize size = measure_vector(code, layout);
  if (!exists) size = {0, 0, false};
  const RankCodeScale scale = rank_code_scale(codes.summary->range);

  SpareColumns spare;
  double rest = ldexp(size.bias, scale.bias), magnitude = 0;
#pragma unroll
  for (uint16_t& part : spare.bias) {
    part = to_half(static_cast<float>(rest));
    const double value = static_cast<double>(from_half(part));
    rest -= value;
    magnitude += fabs(value);
  }
  spare.block = to_half(size.finite ? 0.0f : -kRankBlock);
  const PackedSquares squares = pack_vector<Operand::kCodes>(
      code, size.finite, layout, scale.length, spare, n, true, codes.fragments);
  const RankCodeBounds bounds = {
      max_over_warp(round_up(ldexp(size.length, scale.length)), kPackLanes),
      max_over_warp(round_up(sqrt(squares.error)), kPackLanes),
      max_over_warp(round_up(magnitude), kPackLanes)};
  if (lane_index() == 0) {
    RankCodeBounds& all = codes.summary->bounds;
    atomic_max_not_negative(&all.length, bounds.length);
    atomic_max_not_negative(&all.error, bounds.error);
    atomic_max_not_negative(&all.bias, bounds.bias);
  }
}

struct PackArgs {
  CodebookLayout layout;
  const float* codebook;
  PackedCodes codes;
  int64_t padded_codes;  // 0 where the codes are packed already
  const float* rows;
  PackedRows packed;
  int64_t num_rows;
};

// Grid: kPackLanes lanes for every code of the padded codebook, then for every row, in blocks of
// kPackThreads. Reads the vectors once (again from the first-level cache) and writes 2 bytes a
// column of the operands, bound by memory.
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const __grid_constant__ PackArgs args) {
  static_assert(kTileCodes % (kPackThreads / kPackLanes) == 0, "a block packs codes or rows");
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) / kPackLanes;
  if (n < args.padded_codes) {
    pack_code(args.layout, args.codebook, n, args.codes);
  } else {
    const int64_t row = n - args.padded_codes;
    const bool exists = row < args.num_rows;
    pack_row(args.rows + (exists ? row : 0) * args.layout.dim, args.layout, row, exists,
             args.packed);
  }
}

__device__ __forceinline__ bool is_dropped(const SearchArgs& args) {
  return args.dropped != nullptr && *args.dropped == args.scale;
}

__device__ __forceinline__ int num_tiles(const SearchArgs& args) {
  return static_cast<int>((args.layout.codes + kTileCodes - 1) / kTileCodes);
}

// The lanes of a quad hold kCount values each. Combines them over the quad: lane t is left with
// values t, 4 + t, ... in the first kCount / 4 places.
template <int kCount, typename Combine>
__device__ __forceinline__ void reduce_quad(float (&values)[kCount], const Combine& combine) {
  static_assert(kCount % 4 == 0, "as many for each lane");
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (lane_index() & bit) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2 / bit; ++i) {
      const float keep = upper ? values[2 * i + 1] : values[2 * i];
      const float send = upper ? values[2 * i] : values[2 * i + 1];
      values[i] = combine(keep, shuffle_xor(send, bit));
    }
  }
}

// Where reduce_quad leaves a lane's values when value j is that of vector 8 j + lane / 4: place i
// is vector 32 i + quad_vector().
__device__ __forceinline__ int quad_vector() { return lane_index() % 4 * 8 + lane_index() / 4; }

// A warp's part of one fragment of rows times one fragment of codes; sums [code / 8] of one step.
template <int kFragments>
__device__ __forceinline__ void multiply_step(float (&sums)[2][kFragments][4],
                                              const uint4 (&rows)[kFragments], const uint4& codes) {
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    const uint4& row = rows[f];
    multiply_add_16x8x16(sums[0][f], row.x, row.y, row.z, row.w, codes.x, codes.y);
    multiply_add_16x8x16(sums[1][f], row.x, row.y, row.z, row.w, codes.z, codes.w);
  }
}

// A thread's scores of 16 codes go into its running maxima, [8 j + lane / 4] as in quad_vector.
template <int kFragments>
__device__ __forceinline__ void take_maxima(const float (&sums)[2][kFragments][4],
                                            float (&best)[2 * kFragments]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {  // fmaxf passes over NaN
      best[2 * f] = fmaxf(fmaxf(best[2 * f], sums[i][f][0]), sums[i][f][1]);
      best[2 * f + 1] = fmaxf(fmaxf(best[2 * f + 1], sums[i][f][2]), sums[i][f][3]);
    }
  }
}

// The maxima of a tile for the warp's rows; each lane writes those of neighbouring rows.
template <int kFragments>
__device__ __forceinline__ void store_maxima(float (&best)[2 * kFragments], float* tile_max) {
  reduce_quad(best, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
  for (int i = 0; i < kFragments / 2; ++i) tile_max[32 * i + quad_vector()] = best[i];
}

// What a block of ranking kernels owns: its rows, and a run of tiles of codes.
struct RankBlock {
  int64_t row;  // from the first of the launch
  int64_t first_tile;
  int tiles;

  __device__ __forceinline__ RankBlock(const SearchArgs& args, int rows, int tiles_per_block)
      : row(static_cast<int64_t>(blockIdx.x) * rows),
        first_tile(static_cast<int64_t>(blockIdx.y) * tiles_per_block) {
    const int64_t left = num_tiles(args) - first_tile;
    tiles = left < tiles_per_block ? static_cast<int>(left) : tiles_per_block;
  }
};

// Copies kCount times 16 bytes to shared memory with the whole block.
template <int kCount>
__device__ __forceinline__ void copy_block(uint4* to, const uint4* from) {
  static_assert(kCount % kRankThreads == 0, "as many for each thread");
  to += threadIdx.x;
  from += threadIdx.x;
#pragma unroll
  for (int i = 0; i < kCount; i += kRankThreads) copy_async(to + i, from + i);
}

// The stage after `stage`, of kCount that take turns.
template <int kCount>
__device__ __forceinline__ int next_stage(int stage) {
  return stage + 1 == kCount ? 0 : stage + 1;
}

// Operands of kSteps steps, held in registers on the side of the rows.
// Grid: (blocks of 64 kFragments rows, runs of `tiles_per_block` tiles of codes); a block owns the
// maxima of its rows over its tiles. A warp holds kFragments fragments of 16 rows and multiplies
// them with each fragment of 16 codes in turn: 2 kFragments x kSteps products of 16 x 8 x 16 to
// kSteps loads of shared memory and 8 kFragments maxima.
// Shared memory: kStages tiles of 4 kSteps KiB, 36 KiB for TokenFlow's 40 channels.
// Bytes: 32 kSteps (rows * runs + codes * blocks of rows) read, from the second-level cache, and
// 4 rows * tiles written. Operations: 32 kSteps rows codes; bound by the tensor cores.
template <int kSteps, int kFragments>
__global__ void __launch_bounds__(kRankThreads, kSteps <= 3 ? 4 : (kSteps == 4 ? 3 : 2))
    rank_kernel(const __grid_constant__ SearchArgs args, int64_t first_row, int64_t num_rows,
                int tiles_per_block) {
  constexpr int kTile = kSteps * kTileFragments * kWarpSize;
  if (is_dropped(args)) return;
  const RankBlock block(args, kRankWarps * kFragments * kFragmentVectors, tiles_per_block);
  const int64_t warp_row = block.row + warp_index() * kFragments * kFragmentVectors;
  const bool has_rows = warp_row < num_rows;
  uint4 rows[kSteps][kFragments];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const int64_t n = first_row + warp_row + f * kFragmentVectors;
      rows[s][f] = args.packed.fragments[fragment_index(n, s, kSteps) + lane_index()];
    }
  }

  uint4* shared = shared_memory<uint4>();
  const uint4* next = args.codes.fragments + block.first_tile * kTile;
  int fetched = 0, into = 0;
  const auto fetch = [&] {
    if (fetched < block.tiles) copy_block<kTile>(shared + into * kTile, next);
    commit_copies();
    ++fetched;
    next += kTile;
    into = next_stage<kStages>(into);
  };
  for (int i = 0; i < kStages - 1; ++i) fetch();
  const int64_t stride = padded_rows(num_rows);
  float* tile_max = args.tile_max + block.first_tile * stride + warp_row;
  int from = 0;
  for (int i = 0; i < block.tiles; ++i) {
    wait_for_copies<kStages - 2>();
    block_barrier();  // tile i is there, and tile i - 1 is no longer read
    fetch();
    const uint4* codes = shared + from * kTile + lane_index();
    from = next_stage<kStages>(from);
    if (!has_rows) continue;
    float best[2 * kFragments];
#pragma unroll
    for (float& value : best) value = -infinity();
    // Not unrolled: loads would move ahead until registers are spilled, and other warps hide them.
#pragma unroll 1
    for (int c = 0; c < kTileFragments; ++c) {
      float sums[2][kFragments][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        multiply_step(sums, rows[s], codes[(s * kTileFragments + c) * kWarpSize]);
      }
      take_maxima(sums, best);
    }
    store_maxima<kFragments>(best, tile_max);
    tile_max += stride;
  }
}

constexpr int kWideFragments = 2;
constexpr int kWideRows = kRankWarps * kWideFragments * kFragmentVectors;
constexpr int kWideStages = 4;
constexpr int kWideChunk = kWideSteps * kTileFragments * kWarpSize;  // of rows, and of codes
static_assert(kWideRows == kTileVectors, "a block's rows are a tile of packed vectors");

// Operands of any number of steps, kWideSteps at a time on both sides.
// Grid: (blocks of kWideRows rows, runs of `tiles_per_block` tiles of codes). A warp holds the
// scores of 32 rows and a tile of codes. Shared memory: kWideStages chunks of both operands, 64
// KiB. Bytes: a block reads its rows again for each of its tiles. Bound by the tensor cores, or by
// the second-level cache (32 bytes a clock and multiprocessor at the rate of compute
// capability 8.0).
__global__ void __launch_bounds__(kRankThreads, 2)
    rank_wide_kernel(const __grid_constant__ SearchArgs args, int64_t first_row, int64_t num_rows,
                     int tiles_per_block) {
  if (is_dropped(args)) return;
  const RankBlock block(args, kWideRows, tiles_per_block);
  const int warp_row = warp_index() * kWideFragments * kFragmentVectors;
  const int chunks = operand_steps(args.layout.dim) / kWideSteps;
  uint4* shared = shared_memory<uint4>();
  const uint4* rows =
      args.packed.fragments + (first_row + block.row) / kTileVectors * chunks * kWideChunk;
  const uint4* codes = args.codes.fragments + block.first_tile * chunks * kWideChunk;

  const int64_t steps = static_cast<int64_t>(block.tiles) * chunks;
  int64_t fetched = 0;
  int fetched_chunk = 0, into = 0;
  const auto fetch = [&] {
    if (fetched < steps) {
      uint4* stage = shared + into * 2 * kWideChunk;
      copy_block<kWideChunk>(stage, rows + fetched_chunk * kWideChunk);
      copy_block<kWideChunk>(stage + kWideChunk, codes + fetched * kWideChunk);
    }
    commit_copies();
    ++fetched;
    fetched_chunk = fetched_chunk + 1 == chunks ? 0 : fetched_chunk + 1;
    into = next_stage<kWideStages>(into);
  };
  for (int i = 0; i < kWideStages - 1; ++i) fetch();
  const int64_t stride = padded_rows(num_rows);
  float* tile_max = args.tile_max + block.first_tile * stride + block.row + warp_row;
  int from = 0;
  for (int i = 0; i < block.tiles; ++i) {
    float sums[kTileFragments][2][kWideFragments][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_for_copies<kWideStages - 2>();
      block_barrier();  // this chunk is there, and the one before is no longer read
      fetch();
      const uint4* stage = shared + from * 2 * kWideChunk + lane_index();
      from = next_stage<kWideStages>(from);
#pragma unroll
      for (int s = 0; s < kWideSteps; ++s) {
        const uint4* step = stage + s * kTileFragments * kWarpSize;
        uint4 row[kWideFragments];
#pragma unroll
        for (int f = 0; f < kWideFragments; ++f) {
          row[f] = step[(warp_row / kFragmentVectors + f) * kWarpSize];
        }
#pragma unroll
        for (int c = 0; c < kTileFragments; ++c) {
          multiply_step(sums[c], row, step[kWideChunk + c * kWarpSize]);
        }
      }
    }
    float best[2 * kWideFragments];
#pragma unroll
    for (float& value : best) value = -infinity();
#pragma unroll
    for (int c = 0; c < kTileFragments; ++c) take_maxima(sums[c], best);
    store_maxima<kWideFragments>(best, tile_max);
    tile_max += stride;
  }
}

// The best code so far under (distance, index), in float64.
struct Choice {
  double distance = INFINITY;
  int index = 0;
  int pending = -1;  // a candidate that was not compared yet
  bool compared = false;

  // Candidates of one thread come in ascending order, so a tie keeps the lower index.
  __device__ __forceinline__ void compare(const float* row, int code, const SearchArgs& args) {
    const double d = tokenflow::distance(
        row, args.codebook + static_cast<int64_t>(code) * args.layout.dim, args.layout);
    if (d < distance) {
      distance = d;
      index = code;
    }
    compared = true;
  }

  // A lane's first candidate waits: nearly always it is the warp's only one.
  __device__ __forceinline__ void consider(const float* row, int code, const SearchArgs& args) {
    if (pending >= 0) compare(row, pending, args);
    pending = code;
  }

  // The warp's choice, in every lane.
  __device__ __forceinline__ int settle(const float* row, const SearchArgs& args) {
    const bool alone = count_bits(ballot(pending >= 0)) == 1 && ballot(compared) == 0;
    if (pending >= 0) {
      if (alone) {
        distance = 0;
        index = pending;
      } else {
        compare(row, pending, args);
      }
    }
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      const double d = shuffle_xor(distance, step);
      const int i = shuffle_xor(index, step);
      if (d < distance || (d == distance && i < index)) {
        distance = d;
        index = i;
      }
    }
    return index;
  }
};

// Scores of one tile again, in float32: a quad sums the columns of a code that its lanes hold. The
// codes that may be the best are considered.
__device__ __forceinline__ void settle_tile(const SearchArgs& args, const float* row, int64_t n,
                                            int tile, float threshold, Choice* choice) {
  const int steps = operand_steps(args.layout.dim);
  const unsigned* packed = reinterpret_cast<const unsigned*>(
      args.packed.fragments + fragment_index(n, 0, steps) + n % 8 * 4 + lane_index() % 4);
  const uint4* codes = args.codes.fragments +
                       fragment_index(static_cast<int64_t>(tile) * kTileCodes, 0, steps) +
                       lane_index();
  float scores[2 * kTileFragments] = {};
  for (int s = 0; s < steps; ++s) {
    const float2 low = from_halves(packed[operand_word<Operand::kRows>(n, 0)]);
    const float2 high = from_halves(packed[operand_word<Operand::kRows>(n, 1)]);
    packed += 4 * kTileFragments * kWarpSize;
    const auto add = [&](unsigned c_low, unsigned c_high, float* score) {
      const float2 l = from_halves(c_low), h = from_halves(c_high);
      *score = fmaf(high.y, h.y, fmaf(high.x, h.x, fmaf(low.y, l.y, fmaf(low.x, l.x, *score))));
    };
#pragma unroll
    for (int c = 0; c < kTileFragments; ++c) {
      const uint4 words = codes[c * kWarpSize];
      add(words.x, words.y, &scores[2 * c]);
      add(words.z, words.w, &scores[2 * c + 1]);
    }
    codes += kTileFragments * kWarpSize;
  }
  reduce_quad(scores, [](float a, float b) { return a + b; });
  const int first = tile * kTileCodes + quad_vector();
  unsigned near = 0;
#pragma unroll
  for (int i = 0; i < kTileCodes / kWarpSize; ++i) near |= (scores[i] >= threshold ? 1u : 0u) << i;
  for (; near != 0; near &= near - 1) {
    const int code = first + lowest_bit(near) * kWarpSize;
    if (code < args.layout.codes) choice->consider(row, code, args);
  }
}

// |q - z|^2 with both normalised and rounded to float32; the work of a warp.
__device__ __forceinline__ double row_squared_error(const SearchArgs& args, const float* row,
                                                    int64_t index) {
  const CodebookLayout& layout = args.layout;
  const float* code = args.codebook + index * layout.dim;
  double sum = 0;
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g] + lane_index(), end = layout.begin[g + 1];
    double squared = 0;
    for (int d = begin; layout.l2_norm && d < end; d += kWarpSize) {
      squared += static_cast<double>(row[d]) * static_cast<double>(row[d]);
    }
    const double row_scale = inverse_norm(sum_over_lanes<kWarpSize>(squared), layout.l2_norm);
    const double code_scale = args.code_scales[index * layout.groups + g];
    for (int d = begin; d < end; d += kWarpSize) {
      const float q = static_cast<float>(static_cast<double>(code[d]) * code_scale);
      const float z = static_cast<float>(static_cast<double>(row[d]) * row_scale);
      const double difference = static_cast<double>(q) - static_cast<double>(z);
      sum += difference * difference;
    }
  }
  return sum_over_lanes<kWarpSize>(sum);
}

// Grid: a warp a row, kSettleThreads / 32 rows a block, whose maxima lie side by side; no shared
// memory, no barrier. Bytes: 4 a tile of codes for the maxima, and 4 KiB a step of the operands for
// each tile looked at again (nearly always one), from the second-level cache, which bounds it.
// Codes closer together than half precision can tell cost a distance in float64 each.
__global__ void __launch_bounds__(kSettleThreads, 3)
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
  const RankRowBounds bounds = args.packed.bounds[first_row + n];
  int index = 0;
  if (is_finite(static_cast<double>(bounds.length))) {
    const int tiles = num_tiles(args);
    const int64_t stride = padded_rows(num_rows);
    const float* tile_max = args.tile_max + n;
    float best = -infinity();
    for (int t = lane; t < tiles; t += kWarpSize) best = fmaxf(best, tile_max[t * stride]);
    best = max_over_warp(best, 1);
    const float threshold = best - 2 * rank_error_bound(operand_steps(layout.dim) * kStepColumns,
                                                        bounds, args.codes.summary->bounds);
    Choice choice;
    for (int t0 = 0; t0 < tiles; t0 += kWarpSize) {
      const bool near = t0 + lane < tiles && tile_max[(t0 + lane) * stride] >= threshold;
      for (unsigned mask = ballot(near); mask != 0; mask &= mask - 1) {
        settle_tile(args, row, first_row + n, t0 + lowest_bit(mask), threshold, &choice);
      }
    }
    index = choice.settle(row, args);
  }
  if (lane == 0) {
    args.indices[token] = index;
    if (args.hits) atomic_add(args.hits + index, int64_t{1});
  }
  if (args.row_error) {
    const double error = row_squared_error(args, row, index);
    if (lane == 0) args.row_error[token] = error;
  }
}

unsigned blocks(int64_t items, int per_block) {
  return static_cast<unsigned>(ceil_div(items, per_block));
}

using RankKernel = void (*)(SearchArgs, int64_t, int64_t, int);

template <int kFragments>
RankKernel rank_kernel_for(int steps) {
  switch (steps) {
    case 1:
      return rank_kernel<1, kFragments>;
    case 2:
      return rank_kernel<2, kFragments>;
    case 3:
      return rank_kernel<3, kFragments>;
    case 4:
      return rank_kernel<4, kFragments>;
    default:
      static_assert(kMostSteps == 5, "a kernel for every number of steps");
      return rank_kernel<5, kFragments>;
  }
}

cudaError_t launch_rank(const SearchArgs& args, int64_t first_row, int64_t num_rows,
                        cudaStream_t stream) {
  const int steps = operand_steps(args.layout.dim);
  RankKernel kernel = rank_wide_kernel;
  int rows = kWideRows, shared_vectors = 2 * kWideChunk * kWideStages;
  if (steps <= kMostSteps) {
    // A coarse scale has few rows: fewer of a block's would be there.
    const bool few = num_rows <= kBlockRows / 2;
    kernel = few ? rank_kernel_for<2>(steps) : rank_kernel_for<4>(steps);
    rows = few ? kBlockRows / 2 : kBlockRows;
    shared_vectors = steps * kTileFragments * kWarpSize * kStages;
  }
  const int64_t row_blocks = ceil_div(num_rows, rows);
  const int64_t tiles = ceil_div(args.layout.codes, kTileCodes);
  // At most rank_blocks runs, and the second grid dimension ends at 65,535.
  const int64_t tiles_per_block = ceil_div(tiles, ceil_div(args.rank_blocks, row_blocks));
  const dim3 grid(static_cast<unsigned>(row_blocks),
                  static_cast<unsigned>(ceil_div(tiles, tiles_per_block)));
  return launch(kernel, grid, kRankThreads, static_cast<size_t>(shared_vectors) * sizeof(uint4),
                stream, args, first_row, num_rows, static_cast<int>(tiles_per_block));
}

cudaError_t launch_pack_rows(const CodebookLayout& layout, const float* rows, int64_t num_rows,
                             const PackedRows& packed, cudaStream_t stream) {
  const PackArgs args = {layout, nullptr, {}, 0, rows, packed, num_rows};
  return launch(pack_kernel, dim3(blocks(kPackLanes * num_rows, kPackThreads)), kPackThreads, 0,
                stream, args);
}

struct NearestCodeScratch {
  PackedCodes codes;
  PackedRows rows;
  float* tile_max;

  NearestCodeScratch(Workspace& workspace, const NearestCodeArgs<float>& args)
      : codes(take_packed_codes(workspace, args.layout)),
        rows(take_packed_rows(workspace, args.layout.dim,
                              args.num_rows < kRowsAtOnce ? args.num_rows : kRowsAtOnce, codes)),
        tile_max(take_tile_max(workspace, args.layout, args.num_rows)) {}
};

}  // namespace

cudaError_t launch_scale_codes(const CodebookLayout& layout, const float* codebook, double* scales,
                               cudaStream_t stream) {
  return launch(scale_codes_kernel, dim3(blocks(kPackLanes * layout.codes, kPackThreads)),
                kPackThreads, 0, stream, layout, codebook, scales,
                static_cast<RankRange*>(nullptr));
}

cudaError_t launch_pack(const CodebookLayout& layout, const float* codebook,
                        const PackedCodes& codes, double* scales, const float* rows,
                        int64_t num_rows, const PackedRows& packed, cudaStream_t stream) {
  TF_CUDA_TRY(cudaMemsetAsync(codes.summary, 0, sizeof(CodebookSummary), stream));
  TF_CUDA_TRY(launch(scale_codes_kernel, dim3(blocks(kPackLanes * layout.codes, kPackThreads)),
                     kPackThreads, 0, stream, layout, codebook, scales, &codes.summary->range));
  const int64_t padded = ceil_div(layout.codes, kTileCodes) * kTileCodes;
  const PackArgs args = {layout, codebook, codes, padded, rows, packed, num_rows};
  return launch(pack_kernel, dim3(blocks(kPackLanes * (padded + num_rows), kPackThreads)),
                kPackThreads, 0, stream, args);
}

cudaError_t launch_search(const SearchArgs& args, cudaStream_t stream) {
  for (int64_t first = 0; first < args.num_rows; first += kRowsAtOnce) {
    const int64_t left = args.num_rows - first;
    const int64_t count = left < kRowsAtOnce ? left : kRowsAtOnce;
    TF_CUDA_TRY(launch_rank(args, first, count, stream));
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
  for (int64_t first = 0; first < args.num_rows; first += kRowsAtOnce) {
    const int64_t left = args.num_rows - first;
    const int64_t count = left < kRowsAtOnce ? left : kRowsAtOnce;
    const float* rows = args.rows + first * layout.dim;
    if (first == 0) {
      TF_CUDA_TRY(launch_pack(layout, args.codebook, scratch.codes, nullptr, rows, count,
                              scratch.rows, stream));
    } else {
      TF_CUDA_TRY(launch_pack_rows(layout, rows, count, scratch.rows, stream));
    }
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
