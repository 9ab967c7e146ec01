// Rows and codes packed as operands of the tensor cores, and the code that packs them.
//
// Rows and codes are operands of the tensor cores, packed in half precision in the order in which a
// warp holds them (device.cuh, multiply_add_16x8x16): tiles of 128 vectors, steps of 16 columns,
// fragments of 16 vectors, and for each lane the 16 bytes it takes from the fragment,
//
//   [tile][step][fragment of 8][lane of 32]{four words of two columns}
//
// With g = lane / 4 and t = lane % 4, the words are columns 2t and 2t + 1, and 8 further, of
// vectors g and g + 8 of the fragment, in the order of `operand_word`. A warp reads a fragment by
// one load of 512 bytes in a row, from shared memory without conflicts, and a tile is copied as it
// lies. Products of warpgroups read codes from shared memory themselves, for which the words of a
// fragment lie in another order (FragmentOrder).
#pragma once

#include <type_traits>

#include "../common/coarse_bound.h"
#include "../common/codebook.h"
#include "device.cuh"
#include "workspace.h"

namespace tokenflow::cuda {

// Codes are scored in tiles of this many.
constexpr int kTileCodes = 128;

constexpr int kTileVectors = 128;
constexpr int kFragmentVectors = 16;
constexpr int kTileFragments = kTileVectors / kFragmentVectors;
constexpr int kStepColumns = 16;
static_assert(kTileCodes == kTileVectors, "a tile of codes is one of packed vectors");

// Operands of up to this many steps are held in registers; wider ones pass in chunks of kWideSteps.
constexpr int kMostSteps = 5;
constexpr int kWideSteps = 2;

// Rows are scored in blocks of at most this many, and their storage is padded to it.
constexpr int kBlockRows = 256;

// Steps of a packed vector: its channels and kSpareColumns more.
__host__ __device__ __forceinline__ int operand_steps(int dim) {
  const int steps = (dim + kSpareColumns + kStepColumns - 1) / kStepColumns;
  return steps <= kMostSteps ? steps : (steps + kWideSteps - 1) / kWideSteps * kWideSteps;
}

// Where the fragment of vector n begins in a step; lane l's part is l further.
__host__ __device__ __forceinline__ int64_t fragment_index(int64_t n, int step, int steps) {
  return ((n / kTileVectors * steps + step) * kTileFragments +
          n % kTileVectors / kFragmentVectors) *
         kWarpSize;
}

// The instruction takes the words of rows by columns and those of codes by vectors.
enum class Operand { kRows, kCodes };

// Which of a lane's words holds the half `column / 8` of a step's columns for vector n.
template <Operand kOperand>
__device__ __forceinline__ int operand_word(int64_t n, int half) {
  const int upper = static_cast<int>(n % kFragmentVectors / 8);
  return kOperand == Operand::kRows ? upper + 2 * half : 2 * upper + half;
}

// How the 128 words of a fragment of codes lie: [lane][word], or [word][lane]. The second are four
// matrices of 8 vectors by 8 columns, a row of 16 bytes for each vector, as
// multiply_add_64x128x16 takes them.
enum class FragmentOrder { kByLane, kByWord };

// Whether a kernel of that order has a use on the architecture that is compiled for.
template <FragmentOrder kOrder>
constexpr bool kHasUse = kOrder == FragmentOrder::kByLane || kHasWarpgroups;

// Codes whose lengths are within kBinOctaves powers of two; all zero before they are measured.
struct LengthBin {
  double length;  // the largest
  double bias;    // likewise, of |bias|
  int count;
};

constexpr int kBinOctaves = 3;
constexpr int kLengthBins = 128;

// Bins 3 to 104 hold what float32 holds; the lowest one codes of no length, too.
__device__ __forceinline__ int length_bin(double length) {
  if (!(length > 0)) return 0;
  int exponent = 0;
  (void)frexp(length, &exponent);
  const int bin = (exponent + 160) / kBinOctaves;
  return bin < 0 ? 0 : (bin < kLengthBins ? bin : kLengthBins - 1);
}

// A few codes that are much longer than all others get no coarse score: they would loosen the bound
// of the others. Every row looks at them in float64.
constexpr int kMostOutliers = kWarpSize;

// What coarse scores need to know of a whole codebook; all zero before it is packed.
struct CodebookSummary {
  CodebookRange range;
  double length;      // largest of the codes that get a coarse score, as they are
  double any_length;  // of all that are finite
  double centre_bias;
  CoarseCodeBounds bounds;
  int has_centre;  // whether the centre is taken away (coarse_bound.h)
  int num_outliers;
  int outliers[kMostOutliers];
};

// What becomes of a code, once its length is known: the number of its bin at first.
constexpr unsigned char kNoCoarseScore = 255, kCoarseScore = 254;

// The nearest of some codes to a row.
struct NearestOfSome {
  double distance;
  int64_t index;
};

// Codebooks, each padded to whole tiles.
struct PackedCodes {
  FragmentOrder order;
  uint4* fragments;  // codes without a coarse score, and missing ones of the last tile, never win
  double* inverse_norms;  // [books, codes, groups]: reciprocal lengths
  double* bias;           // [books, codes], see codebook.h; -infinity for a code that is not finite
  unsigned char* fate;    // [books, codes]
  double* centre;         // [books, dim]
  NearestOfSome* to_zero;    // [books, padded / 32] of each 32 codes: the nearest to a row of zeros
  CodebookSummary* summary;  // [books]
  LengthBin* bins;           // [books, kLengthBins]
  int* first_of_hash;        // [books, hash_slots]: codes - the lowest code, or 0
};

// Slots for the codes' hashes, a power of two. Two different codes may share one: copies of the
// second are then not seen as such, and only cost time.
__host__ __device__ __forceinline__ int64_t hash_slots(const CodebookLayout& layout) {
  int64_t slots = 2;
  while (slots < 2 * layout.codes) slots *= 2;
  return slots;
}

// Rows of each codebook, padded alike.
struct PackedRows {
  uint4* fragments;         // zeros after the last row
  double* inverse_norms;    // [books, padded, groups]
  CoarseRowBounds* bounds;  // [books, padded]
  const CodebookSummary* codes;
  const double* centre;  // [books, dim], see the codes'
};

// Where row n of a codebook lies among all tokens of a scale.
struct TokenMap {
  int64_t tokens;  // a map
  int64_t first;   // token of the scale
  int64_t count;   // tokens of the scale in a map
  int64_t books;   // maps of an image

  // The rows of a search are fewer than 2^31 (see unsupported_reason).
  __device__ __forceinline__ int64_t token(int64_t n, int64_t book) const {
    const unsigned row = static_cast<unsigned>(n), rows = static_cast<unsigned>(count);
    const unsigned image = row / rows;
    return (image * books + book) * tokens + first + (row - image * rows);
  }
};

__host__ __device__ __forceinline__ int64_t padded_codes(const CodebookLayout& layout) {
  return (layout.codes + kTileCodes - 1) / kTileCodes * kTileCodes;
}

__host__ __device__ __forceinline__ int64_t padded_rows(int64_t num_rows) {
  return (num_rows + kBlockRows - 1) / kBlockRows * kBlockRows;
}

inline int64_t packed_vectors(int64_t padded, int dim) {
  return padded / kFragmentVectors * operand_steps(dim) * kWarpSize;
}

inline PackedCodes take_packed_codes(Workspace& workspace, const CodebookLayout& layout) {
  const int64_t padded = layout.books * padded_codes(layout), codes = all_codes(layout);
  return {FragmentOrder::kByLane,
          workspace.take<uint4>(packed_vectors(padded, layout.dim)),
          workspace.take<double>(codes * layout.groups),
          workspace.take<double>(codes),
          workspace.take<unsigned char>(codes),
          workspace.take<double>(layout.books * layout.dim),
          workspace.take<NearestOfSome>(padded / kWarpSize),
          workspace.take<CodebookSummary>(layout.books),  // from here on zero at first
          workspace.take<LengthBin>(layout.books * kLengthBins),
          workspace.take<int>(layout.books * hash_slots(layout))};
}

// For `num_rows` rows of each codebook.

inline PackedRows take_packed_rows(Workspace& workspace, const CodebookLayout& layout,
                                   int64_t num_rows, const PackedCodes& codes) {
  const int64_t padded = layout.books * padded_rows(num_rows);
  return {workspace.take<uint4>(packed_vectors(padded, layout.dim)),
          workspace.take<double>(padded * layout.groups), workspace.take<CoarseRowBounds>(padded),
          codes.summary, codes.centre};
}

// inverse_norms [books, codes, groups]: reciprocal lengths of the codebooks' rows.
cudaError_t launch_inverse_norms(const CodebookLayout& layout, const float* codebook,
                                 double* inverse_norms, cudaStream_t stream);

// Measures and packs the codebooks, and packs `num_rows` rows of each beside them: row n of a book
// is rows[map.token(n, book)].
cudaError_t launch_pack(const CodebookLayout& layout, const float* codebook,
                        const PackedCodes& codes, const float* rows, const TokenMap& map,
                        int64_t num_rows, const PackedRows& packed, cudaStream_t stream);

// Packs `num_rows` rows likewise for codebooks that are packed already.
cudaError_t launch_pack_rows(const CodebookLayout& layout, const float* rows, const TokenMap& map,
                             int64_t num_rows, const PackedRows& packed, cudaStream_t stream);

// What stands beside the channels in a packed vector.
struct SpareColumns {
  uint16_t bias[2];
  uint16_t exclusion;

  __device__ __forceinline__ uint16_t at(int column) const {
    return column == 0 ? bias[0] : column == 1 ? bias[1] : column == 2 ? exclusion : uint16_t{0};
  }
};

// Operands are packed by four neighbouring lanes a vector.
constexpr int kPackLanes = 4;

// squared_norm of columns [begin, end), by kPackLanes lanes.
__device__ __forceinline__ double quad_squared_norm(const float* vector, int begin, int end) {
  double sum = 0;
  for (int d = begin + lane_index() % kPackLanes; d < end; d += kPackLanes) {
    sum += static_cast<double>(vector[d]) * static_cast<double>(vector[d]);
  }
  return sum_over_lanes<kPackLanes>(sum);
}

// A vector in float64 as it is scored, normalised by groups and times the square roots of the
// weights. A vector that is not finite is measured as one of no length.
struct VectorSize {
  double length;
  double bias;  // of a code
  bool finite;
};

// By kPackLanes lanes, each of which writes the same `inverse_norms` [groups].
__device__ __forceinline__ VectorSize measure_vector(const float* vector,
                                                     const CodebookLayout& layout,
                                                     double* inverse_norms) {
  double square = 0, bias = 0;
  for (int g = 0; g < layout.groups; ++g) {
    const double squared = quad_squared_norm(vector, layout.begin[g], layout.begin[g + 1]);
    const double scale = inverse_norm(squared, layout.l2_norm);
    const double unit = squared * scale * scale;  // squared length of the normalised group
    inverse_norms[g] = scale;
    square += layout.weight[g] * unit;
    // group_bias
    const double half = 0.5 * layout.weight[g];
    bias += layout.metric == Metric::kDot ? 0.0 : half * ((layout.l2_norm ? 1.0 : 0.0) - unit);
  }
  const double infinity = static_cast<double>(INFINITY);
  if (!(square < infinity && fabs(bias) < infinity)) return {0, 0, false};
  return {sqrt(square), bias, true};
}

// Of a vector normalised by groups and times the square roots of the weights, without the centre.
struct CentredVector {
  double square;       // its length squared
  double with_centre;  // its product with the centre
};

// By kLanes neighbouring lanes, the same in each of them.
template <int kLanes>
__device__ __forceinline__ CentredVector measure_centred(const float* vector,
                                                         const CodebookLayout& layout,
                                                         const double* inverse_norms,
                                                         const double* centre) {
  double square = 0, with_centre = 0;
  for (int g = 0; g < layout.groups; ++g) {
    const double factor = sqrt(layout.weight[g]) * inverse_norms[g];
    for (int d = layout.begin[g] + lane_index() % kLanes; d < layout.begin[g + 1]; d += kLanes) {
      const double value = static_cast<double>(vector[d]) * factor - centre[d];
      square += value * value;
      with_centre += value * centre[d];
    }
  }
  return {sum_over_lanes<kLanes>(square), sum_over_lanes<kLanes>(with_centre)};
}

// Lengths in scaled units, as packed and of the difference from the exact vector; upper bounds.
struct PackedLengths {
  float packed;
  float error;
};

// Writes vector n, normalised by groups, times the square roots of the weights, less `centre`
// unless that is null, and times 2^exponent; a vector that does not count as zeros. `inverse_norms`
// are those of measure_vector, written by this lane. The lengths are in every lane.
template <Operand kOperand, FragmentOrder kOrder>
__device__ __forceinline__ PackedLengths pack_vector(
    const float* vector, bool counts, const CodebookLayout& layout, const double* inverse_norms,
    const double* centre, int exponent, const SpareColumns& spare, int64_t n, uint4* fragments) {
  const int t = lane_index() % kPackLanes, steps = operand_steps(layout.dim);
  // What lies where is told in 16 bytes by lane, in words by word.
  using Unit = std::conditional_t<kOrder == FragmentOrder::kByLane, uint4, unsigned>;
  constexpr int kWordStep = kOrder == FragmentOrder::kByLane ? 1 : kWarpSize;
  unsigned* words = reinterpret_cast<unsigned*>(
      reinterpret_cast<Unit*>(fragments + fragment_index(n, 0, steps)) + n % 8 * 4 + t);
  // This lane's columns in ascending order, four a step, and the halves of them in pairs.
  const auto column = [&](int i) { return i / 4 * kStepColumns + i % 4 / 2 * 8 + 2 * t + i % 2; };
  unsigned pair = 0;
  const auto put = [&](int i, uint16_t half) {
    pair = i % 2 == 0 ? half : pair | static_cast<unsigned>(half) << 16;
    if (i % 2 == 1) {
      words[i / 4 * (4 * kTileFragments * kWarpSize) +
            operand_word<kOperand>(n, i % 4 / 2) * kWordStep] = pair;
    }
  };
  const double power = ldexp(1.0, exponent);
  float packed = 0, error = 0;
  int i = 0;
  for (int g = 0; g < layout.groups; ++g) {
    const int end = layout.begin[g + 1];
    const double factor = sqrt(layout.weight[g]) * power * inverse_norms[g];
    for (; column(i) < end; ++i) {
      // The product is rounded to float32 before it is rounded to half: see coarse_packed_lengths.
      double exact = static_cast<double>(vector[column(i)]) * factor;
      if (centre) exact -= centre[column(i)] * power;
      const float value = counts ? static_cast<float>(exact) : 0.0f;
      const uint16_t half = to_half(value);
      const float rounded = from_half(half);
      packed += rounded * rounded;
      error += (rounded - value) * (rounded - value);
      put(i, half);
    }
  }
  for (; i < 4 * steps; ++i) put(i, spare.at(column(i) - layout.dim));
  for (int mask = kPackLanes / 2; mask > 0; mask /= 2) {
    packed += shuffle_xor(packed, mask);
    error += shuffle_xor(error, mask);
  }
  return {coarse_packed_length(layout.dim, packed), coarse_packed_error(layout.dim, packed, error)};
}

// Packs one row of a codebook as row n of all, or zeros where no row `exists`; the work of
// kPackLanes lanes. The codes' range must be known.
__device__ __forceinline__ void pack_row(const float* row, bool exists,
                                         const CodebookLayout& layout, int64_t book, int64_t n,
                                         const PackedRows& packed) {
  double* inverse_norms = packed.inverse_norms + n * layout.groups;
  const VectorSize size = measure_vector(row, layout, inverse_norms);
  const CodebookSummary& codes = packed.codes[book];
  const CodebookRange range = codes.range;
  const double* centre = codes.has_centre ? packed.centre + book * layout.dim : nullptr;
  double length = size.length;
  if (centre) length = sqrt(measure_centred<kPackLanes>(row, layout, inverse_norms, centre).square);
  const RowExponents exponents = row_exponents(length, range);
  const float factor = bias_factor(exponents, range);
  const uint16_t half = to_half(factor);
  const PackedLengths lengths = pack_vector<Operand::kRows, FragmentOrder::kByLane>(
      row, exists && size.finite, layout, inverse_norms, centre, exponents.length,
      {{half, half}, to_half(kExclusion)}, n, packed.fragments);
  if (exists && lane_index() % kPackLanes == 0) {
    packed.bounds[n] = {
        size.finite ? lengths.packed : NAN, lengths.error, factor,
        coarse_distance_error(layout.dim, size.length, codes.length, exponents, range),
        score_margin(layout.dim, size.length, codes.length)};
  }
}

}  // namespace tokenflow::cuda
