// The nearest code of each row from its coarse scores: looks again at the tiles that may hold it,
// and decides between codes too close for half precision by the distance in float64.
#include <cmath>

#include "search.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kRefineThreads = 256;

__device__ __forceinline__ bool is_finite(double x) {
  return fabs(x) < static_cast<double>(infinity());
}

// The best code so far under (distance, index), in float64.
struct NearestCandidate {
  double distance = INFINITY;
  int index = 0;
  int deferred = -1;  // a candidate that was not compared yet
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
  __device__ __forceinline__ void add(const float* row, int code, const SearchArgs& args) {
    if (deferred >= 0) compare(row, deferred, args);
    deferred = code;
  }

  // The warp's nearest code, in every lane.
  __device__ __forceinline__ int reduce(const float* row, const SearchArgs& args) {
    const bool alone = count_bits(ballot(deferred >= 0)) == 1 && ballot(compared) == 0;
    if (deferred >= 0) {
      if (alone) {
        distance = 0;
        index = deferred;
      } else {
        compare(row, deferred, args);
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
// codes that may be the best are added to `nearest`.
__device__ __forceinline__ void rescore_tile(const SearchArgs& args, const float* row, int64_t n,
                                             int tile, float threshold, NearestCandidate* nearest) {
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
    if (code < args.layout.codes) nearest->add(row, code, args);
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
    const double code_scale = args.code_inverse_norms[index * layout.groups + g];
    for (int d = begin; d < end; d += kWarpSize) {
      const float q = static_cast<float>(static_cast<double>(code[d]) * code_scale);
      const float z = static_cast<float>(static_cast<double>(row[d]) * row_scale);
      const double difference = static_cast<double>(q) - static_cast<double>(z);
      sum += difference * difference;
    }
  }
  return sum_over_lanes<kWarpSize>(sum);
}

// Grid: a warp a row, kRefineThreads / 32 rows a block, whose maxima lie side by side; no shared
// memory, no barrier. Bytes: 4 a tile of codes for the maxima, and 4 KiB a step of the operands for
// each tile looked at again (nearly always one), from the L2, which bounds it.
// Codes closer together than half precision can tell cost a distance in float64 each.
__global__ void __launch_bounds__(kRefineThreads, 3)
    refine_kernel(const __grid_constant__ SearchArgs args, int64_t first_row, int64_t num_rows) {
  const CodebookLayout& layout = args.layout;
  const int lane = lane_index();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kRefineThreads / kWarpSize) + warp_index();
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
  const CoarseRowBounds bounds = args.packed.bounds[first_row + n];
  int index = 0;
  if (is_finite(static_cast<double>(bounds.length))) {
    const int tiles = num_tiles(args);
    const int64_t stride = padded_rows(num_rows);
    const float* tile_max = args.tile_max + n;
    float best = -infinity();
    for (int t = lane; t < tiles; t += kWarpSize) best = fmaxf(best, tile_max[t * stride]);
    best = max_over_warp(best, 1);
    const float threshold = best - 2 * coarse_error_bound(operand_steps(layout.dim) * kStepColumns,
                                                          bounds, args.codes.summary->bounds);
    NearestCandidate nearest;
    for (int t0 = 0; t0 < tiles; t0 += kWarpSize) {
      const bool near = t0 + lane < tiles && tile_max[(t0 + lane) * stride] >= threshold;
      for (unsigned mask = ballot(near); mask != 0; mask &= mask - 1) {
        rescore_tile(args, row, first_row + n, t0 + lowest_bit(mask), threshold, &nearest);
      }
    }
    index = nearest.reduce(row, args);
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

}  // namespace

cudaError_t launch_refine(const SearchArgs& args, int64_t first_row, int64_t num_rows,
                          cudaStream_t stream) {
  const int64_t blocks = ceil_div(num_rows, kRefineThreads / kWarpSize);
  return launch(refine_kernel, dim3(static_cast<unsigned>(blocks)), kRefineThreads, 0, stream, args,
                first_row, num_rows);
}

}  // namespace tokenflow::cuda
