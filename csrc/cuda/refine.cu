// The nearest code of each row from its records. A row scores the few codes again that may be the
// nearest, in float64, and decides between codes too close even for that by the distance.
#include <cmath>

#include "search.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kRefineThreads = 128;

// Blocks of a multiprocessor, as many as its registers allow without a spill. Few float64 lanes are
// busy with fewer: a row is some 50 instructions in float64 of 1,000.
constexpr int kRefineBlocks = kFewFloat64Lanes ? 4 : 5;

// A score in float64 is the work of a team of lanes, one team for each code of a group.
constexpr int kTeamLanes = kWarpSize / kGroupCodes;

__device__ __forceinline__ double negative_infinity() { return -static_cast<double>(INFINITY); }

// A row that is looked at by a warp.
struct Row {
  const float* values;
  int64_t packed;  // its number among the packed rows
  double margin;   // see score_margin

  __device__ __forceinline__ double inverse_norm(const SearchArgs& args, int group) const {
    return args.packed.inverse_norms[packed * args.layout.groups + group];
  }
};

// The codebook whose codes the block's rows are compared with. It is asked for where it is needed,
// which costs less than a register.
__device__ __forceinline__ int book_of_block() { return static_cast<int>(blockIdx.y); }

// Code `index` of the block's book among those of all, which are at most 2^30.
__device__ __forceinline__ int64_t code_of_block(const CodebookLayout& layout, int index) {
  return book_of_block() * static_cast<int>(layout.codes) + index;
}

// Sum of `value` over lanes [0, count), lane after lane as a loop would add them, in every lane.
__device__ __forceinline__ double sum_in_order(double sum, double value, int count) {
  if (count >= kWarpSize) {
#pragma unroll 8
    for (int i = 0; i < kWarpSize; ++i) sum += shuffle(value, i);
  } else {
    for (int i = 0; i < count; ++i) sum += shuffle(value, i);
  }
  return sum;
}

// `distance` of codebook.h, the same bits, by a warp: what it adds one after the other is added in
// that order, and everything else is done side by side.
__device__ __forceinline__ double distance_by_warp(const float* row, const float* code,
                                                   const CodebookLayout& layout) {
  const int lane = lane_index();
  double sum = 0;
#pragma unroll 1
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    double row_square = 0, code_square = 0;
#pragma unroll 1
    for (int d = begin; layout.l2_norm && d < end; d += kWarpSize) {
      const double z = d + lane < end ? static_cast<double>(row[d + lane]) : 0;
      const double c = d + lane < end ? static_cast<double>(code[d + lane]) : 0;
      row_square = sum_in_order(row_square, product(z, z), end - d);
      code_square = sum_in_order(code_square, product(c, c), end - d);
    }
    const double row_norm = group_norm(row_square, layout.l2_norm);
    const double code_norm = group_norm(code_square, layout.l2_norm);
    double group = 0;
#pragma unroll 1
    for (int d = begin; d < end; d += kWarpSize) {
      const double z = d + lane < end ? static_cast<double>(row[d + lane]) : 0;
      const double c = d + lane < end ? static_cast<double>(code[d + lane]) : 0;
      group = sum_in_order(group, channel_distance(z / row_norm, c / code_norm, layout.metric),
                           end - d);
    }
    sum += product(layout.weight[g], group);
  }
  return sum;
}

// The code nearest to a row of those that were looked at, by (distance, index) in float64: the same
// in every lane.
//
// What is looked at comes in any order. A code is left out only where its score is more than the
// margin below another's, so that its distance is larger; of the others the distances decide, which
// are worked out where there are two to compare.
struct NearestCandidate {
  int index = 0;
  bool measured = false;  // `distance` is known
  double score = negative_infinity();
  double distance = 0;
};

// The nearer of `nearest` and a code with this score. Where both have the same values, so that
// their distances are equal, it is the one with the lower index.
__device__ __forceinline__ NearestCandidate nearer(const SearchArgs& args, const float* row,
                                                   NearestCandidate nearest, int other,
                                                   double other_score) {
  const CodebookLayout& layout = args.layout;
  const float* values = args.codebook + code_of_block(layout, nearest.index) * layout.dim;
  const float* others = args.codebook + code_of_block(layout, other) * layout.dim;
  bool equal = true;
#pragma unroll 1
  for (int d = lane_index(); d < layout.dim; d += kWarpSize) equal &= values[d] == others[d];
  if (ballot(!equal) == 0) {
    nearest.index = other < nearest.index ? other : nearest.index;
    return nearest;
  }
  if (!nearest.measured) nearest.distance = distance_by_warp(row, values, layout);
  nearest.measured = true;
  const double distance = distance_by_warp(row, others, layout);
  if (distance < nearest.distance || (distance == nearest.distance && other < nearest.index)) {
    nearest = {other, true, other_score, distance};
  }
  return nearest;
}

// The score in float64 of code `number` among those of all, by kLanes neighbouring lanes.
template <int kLanes>
__device__ __forceinline__ double exact_score(const SearchArgs& args, const Row& row,
                                              int64_t number) {
  const CodebookLayout& layout = args.layout;
  const float* values = args.codebook + number * layout.dim;
  const double* inverse_norms = args.codes.inverse_norms + number * layout.groups;
  const double bias = args.codes.bias[number];
  double sum = 0;
#pragma unroll 1
  for (int g = 0; g < layout.groups; ++g) {
    const double scale = layout.weight[g] * row.inverse_norm(args, g) * inverse_norms[g];
    double dot = 0;
#pragma unroll 4
    for (int d = layout.begin[g] + lane_index() % kLanes; d < layout.begin[g + 1]; d += kLanes) {
      dot += static_cast<double>(row.values[d]) * static_cast<double>(values[d]);
    }
    sum += dot * scale;
  }
  return sum_over_lanes<kLanes>(sum) + bias;
}

// Looks at the codes that each lane has in `codes`, a bit for code first + 32 i: a team takes one
// at a time, of the first lanes that have any.
__device__ __forceinline__ void look_at(const SearchArgs& args, const Row& row, int first,
                                        unsigned codes, NearestCandidate* nearest) {
  const CodebookLayout& layout = args.layout;
  const int team = lane_index() / kTeamLanes, team_lane = lane_index() % kTeamLanes;
#pragma unroll 1
  for (unsigned lanes = ballot(codes != 0); lanes != 0; lanes = ballot(codes != 0)) {
    unsigned rest = lanes;
#pragma unroll
    for (int i = 1; i < kGroupCodes; ++i) rest &= i <= team ? rest - 1 : rest;
    const int code = shuffle(codes != 0 ? first + lowest_bit(codes) * kWarpSize : 0,
                             rest != 0 ? lowest_bit(rest) : 0);
    if (count_bits(lanes & ((1u << lane_index()) - 1)) < kGroupCodes) codes &= codes - 1;
    const bool exists = rest != 0 && code < layout.codes;
    const int64_t looked_at = code_of_block(layout, exists ? code : 0);
    double score = exact_score<kTeamLanes>(args, row, looked_at);
    if (!exists || !(score > negative_infinity())) score = negative_infinity();  // or NaN
    const double best = max_over_warp(score, kTeamLanes);
    if (best == negative_infinity()) continue;
    const double threshold = (best > nearest->score ? best : nearest->score) - row.margin;
    unsigned near = ballot(team_lane == 0 && score >= threshold);
    if (nearest->score < threshold) {  // the candidate so far, or none, is out
      const int from = lowest_bit(near);
      *nearest = {shuffle(code, from), false, shuffle(score, from), 0};
      near &= near - 1;
    }
#pragma unroll 1
    for (; near != 0; near &= near - 1) {
      const int from = lowest_bit(near);
      *nearest = nearer(args, row.values, *nearest, shuffle(code, from), shuffle(score, from));
    }
  }
}

// score_margin where the outliers' lengths count too, from the row's own: it has the row's length.
// An inner product is rounded in proportion to |z| |c| alone.
__device__ __forceinline__ double outlier_margin(const SearchArgs& args, double margin) {
  const CodebookLayout& layout = args.layout;
  const double square = margin / (3 * distance_error(layout.dim, 1));
  const double longest = args.codes.summary[book_of_block()].any_length;
  const double squares = layout.metric == Metric::kDot ? 2 * sqrt(square) * longest + square
                                                       : square + longest * longest;
  return 3 * distance_error(layout.dim, squares);
}

// The lane's words of a fragment of codes.
template <FragmentOrder kOrder>
__device__ __forceinline__ uint4 fragment_words(const uint4* fragment) {
  if constexpr (kOrder == FragmentOrder::kByLane) return fragment[lane_index()];
  const unsigned* words = reinterpret_cast<const unsigned*>(fragment) + lane_index();
  return {words[0], words[kWarpSize], words[2 * kWarpSize], words[3 * kWarpSize]};
}

// Coarse scores of a tile again with packed row n, in float32: a quad sums the columns of a code
// that its lanes hold. A bit for each of the codes tile * kTileCodes + quad_vector() + 32 i that
// may be the nearest.
template <FragmentOrder kOrder>
__device__ __forceinline__ unsigned rescore_tile(const SearchArgs& args, int64_t n, int tile,
                                                 float threshold) {
  constexpr int kFragments = kTileFragments / 2;  // at a time, to save registers
  n = opaque(n);                                  // likewise: this is seldom wanted
  const int steps = operand_steps(args.layout.dim);
  const uint4* codes =
      args.codes.fragments + fragment_index(book_of_block() * padded_codes(args.layout) +
                                                static_cast<int64_t>(tile) * kTileCodes,
                                            0, steps);
  unsigned near = 0;
#pragma unroll 1
  for (int part = 0; part < kTileFragments / kFragments; ++part) {
    const unsigned* packed = reinterpret_cast<const unsigned*>(
        args.packed.fragments + fragment_index(n, 0, steps) + n % 8 * 4 + lane_index() % 4);
    float scores[2 * kFragments] = {};
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      const float2 low = from_halves(packed[operand_word<Operand::kRows>(n, 0)]);
      const float2 high = from_halves(packed[operand_word<Operand::kRows>(n, 1)]);
      packed += 4 * kTileFragments * kWarpSize;
      const auto add = [&](unsigned c_low, unsigned c_high, float* score) {
        const float2 l = from_halves(c_low), h = from_halves(c_high);
        *score = fmaf(high.y, h.y, fmaf(high.x, h.x, fmaf(low.y, l.y, fmaf(low.x, l.x, *score))));
      };
#pragma unroll
      for (int c = 0; c < kFragments; ++c) {
        const uint4 words = fragment_words<kOrder>(
            codes + (s * kTileFragments + part * kFragments + c) * kWarpSize);
        add(words.x, words.y, &scores[2 * c]);
        add(words.z, words.w, &scores[2 * c + 1]);
      }
    }
    reduce_quad(scores, [](float a, float b) { return a + b; });
#pragma unroll
    for (int i = 0; i < kFragments / 2; ++i) {
      near |= (scores[i] >= threshold ? 1u : 0u) << (part * (kFragments / 2) + i);
    }
  }
  return near;
}

// |q - z|^2 with both normalised and rounded to float32; the work of a warp.
__device__ __forceinline__ double row_squared_error(const SearchArgs& args, const Row& row,
                                                    int index) {
  const CodebookLayout& layout = args.layout;
  const int64_t number = code_of_block(layout, index);
  const float* code = args.codebook + number * layout.dim;
  const double* code_scales = args.codes.inverse_norms + number * layout.groups;
  double sum = 0;
#pragma unroll 1
  for (int g = 0; g < layout.groups; ++g) {
#pragma unroll 1
    for (int d = layout.begin[g] + lane_index(); d < layout.begin[g + 1]; d += kWarpSize) {
      const float q = static_cast<float>(static_cast<double>(code[d]) * code_scales[g]);
      const float z =
          static_cast<float>(static_cast<double>(row.values[d]) * row.inverse_norm(args, g));
      const double difference = static_cast<double>(q) - static_cast<double>(z);
      sum += difference * difference;
    }
  }
  return sum_over_lanes<kWarpSize>(sum);
}

// Whether the row holds nothing but zeros; the work of a warp.
__device__ __forceinline__ bool is_zero(const float* row, int dim) {
  bool zero = true;
#pragma unroll 1
  for (int d = lane_index(); d < dim; d += kWarpSize) zero &= row[d] == 0;
  return ballot(!zero) == 0;
}

// Of all codes of a book; the work of a warp.
__device__ __forceinline__ int nearest_to_zero(const SearchArgs& args) {
  const int count = num_tiles(args.layout) * (kTileCodes / kWarpSize);
  const NearestOfSome* to_zero = args.codes.to_zero + book_of_block() * count;
  double distance = static_cast<double>(INFINITY);
  int index = 0;
  const auto take_nearer = [&](double d, int i) {
    if (d < distance || (d == distance && i < index)) {
      distance = d;
      index = i;
    }
  };
#pragma unroll 1
  for (int i = lane_index(); i < count; i += kWarpSize) {
    take_nearer(to_zero[i].distance, static_cast<int>(to_zero[i].index));
  }
#pragma unroll 1
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    take_nearer(shuffle_xor(distance, step), shuffle_xor(index, step));
  }
  return index;
}

// Excluded codes have scores around -2^30, when others are below 2^29 in magnitude. Where all codes
// are excluded (not finite), so is the best score.
constexpr float kExcludedScore = -0x1p29f;

// Grid: (a warp a row, kRefineThreads / 32 rows a block; codebooks); no shared memory, no barrier.
// Bytes: 8 a record, and four codes nearly always, from the L2; bound by its latency. Two codes of
// different groups closer together than the coarse scores can tell cost four codes more; where both
// groups are in one record, it is scored again, 4 KiB a step of the operands and a tile.
// Codes closer together than scores in float64 can tell cost a distance each.
template <FragmentOrder kOrder>
__global__ void __launch_bounds__(kRefineThreads, kRefineBlocks)
    refine_kernel(const __grid_constant__ SearchArgs args, int64_t first_row, int64_t num_rows,
                  const ScoreRuns runs) {
  if constexpr (!kHasUse<kOrder>) return;
  const CodebookLayout& layout = args.layout;
  const int lane = lane_index();
  const int n = static_cast<int>(blockIdx.x) * (kRefineThreads / kWarpSize) + warp_index();
  if (n >= num_rows) return;  // at most kRowsAtOnce
  const auto token = [&] { return args.map.token(first_row + n, book_of_block()); };
  const int64_t packed = book_of_block() * padded_rows(args.num_rows) + first_row + n;
  if (is_dropped(args)) {
    if (lane == 0) {
      args.indices[token()] = -1;
      if (args.row_error) args.row_error[token()] = 0;
    }
    return;
  }
  const CoarseRowBounds bounds = args.packed.bounds[packed];
  Row row = {args.rows + token() * layout.dim, packed, bounds.score_margin};
  NearestCandidate nearest;
  const int num_records = static_cast<int>(runs.num_records);
  const ScoreRecord* records =
      records_of(args, runs, num_rows, book_of_block()) + n * runs.num_records;
  float best = -infinity();
#pragma unroll 2
  for (int r = lane; r < num_records; r += kWarpSize) best = fmaxf(best, records[r].best);
  best = max_over_warp(best, 1);
  const bool decidable = fabsf(bounds.length) < infinity() && best > kExcludedScore;
  const auto may_be_zero = [&] {
    return bounds.length == 0 || args.codes.summary[book_of_block()].has_centre;
  };
  if (decidable && may_be_zero() && is_zero(row.values, layout.dim)) {
    nearest.index = nearest_to_zero(args);
  } else if (decidable) {
    // Excluded codes stay out however loose the bound: where the centre leaves nothing of codes or
    // row but float64's rounding, they are scaled up until the bound is beyond all scores.
    const float threshold =
        fmaxf(best - 2 * coarse_error_bound(operand_steps(layout.dim) * kStepColumns, bounds,
                                            args.codes.summary[book_of_block()].bounds),
              kExcludedScore);
    // At last the outliers, which are seldom near: each lane has one.
    bool have_outliers = args.codes.summary[book_of_block()].num_outliers > 0;
#pragma unroll 1
    for (int r0 = 0; r0 < num_records || have_outliers; r0 += kWarpSize) {
      const bool exists = r0 + lane < num_records;
      const ScoreRecord record = records[exists ? r0 + lane : 0];
      unsigned whole = ballot(record.runner_up >= threshold);
      unsigned near = ballot(exists && record.best >= threshold);
      int outlier = -1;
      if (r0 >= num_records) {
        have_outliers = false;
        whole = 0;
        row.margin = outlier_margin(args, row.margin);
        const CodebookSummary& codes = args.codes.summary[book_of_block()];
        double score = negative_infinity();
        if (lane < codes.num_outliers) {
          outlier = codes.outliers[lane];
          score = exact_score<1>(args, row, code_of_block(layout, outlier));
        }
        const double most = max_over_warp(score, 1);
        if (!(score >= (most > nearest.score ? most : nearest.score) - row.margin)) outlier = -1;
        near = ballot(outlier >= 0) != 0 ? 1u : 0u;
      }
#pragma unroll 1
      for (; near != 0; near &= near - 1) {
        const int from = lowest_bit(near);
        const int tag = shuffle(tag_of(record.best), from);
        const bool rescore = (whole >> from & 1u) != 0;
        int tile = (r0 + from) * runs.record_tiles;
        const int left = num_tiles(layout) - tile;
        const int last_tile = tile + (left < runs.record_tiles ? left : runs.record_tiles);
        // Lanes 0 to 3 hold the group's codes, or all lanes those of each tile, or an outlier.
        int first = tile * kTileCodes + group_code(tag, lane % kGroupCodes);
        unsigned codes = lane < kGroupCodes ? 1u : 0u;
        if (r0 >= num_records) {
          first = outlier;
          codes = outlier >= 0 ? 1u : 0u;
        }
        do {
          if (rescore) {
            first = tile * kTileCodes + quad_vector();
            codes = rescore_tile<kOrder>(args, packed, tile, threshold);
          }
          look_at(args, row, first, codes, &nearest);
        } while (rescore && ++tile < last_tile);
      }
    }
  }
  if (lane == 0) {
    args.indices[token()] = nearest.index;
    if (args.hits) atomic_add(args.hits + code_of_block(layout, nearest.index), int64_t{1});
  }
  if (args.row_error) {
    const double error = row_squared_error(args, row, nearest.index);
    if (lane == 0) args.row_error[token()] = error;
  }
}

}  // namespace

cudaError_t launch_refine(const SearchArgs& args, int64_t first_row, int64_t num_rows,
                          const ScoreRuns& runs, cudaStream_t stream) {
  const int64_t blocks = ceil_div(num_rows, kRefineThreads / kWarpSize);
  return launch(args.codes.order == FragmentOrder::kByLane ? refine_kernel<FragmentOrder::kByLane>
                                                           : refine_kernel<FragmentOrder::kByWord>,
                dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(args.layout.books)),
                kRefineThreads, 0, stream, args, first_row, num_rows, runs);
}

}  // namespace tokenflow::cuda
