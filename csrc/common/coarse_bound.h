// Coarse scores, of operands in half precision: how the operands are scaled, and the proven
// bound on how far such a score may be from what float64 arithmetic sees.
//
// Row z and codes c_i, normalised if the layout says so and both times the square roots of the
// weights, are multiplied by powers of two and rounded to half precision,
//
//   zq = 2^b z + ez,    cq_i = 2^a c_i + ec_i,    2^e bias_i = h_i + l_i + r_i,
//
// with a and e the same for all codes and b the row's own. The coarse score is one dot product:
// rows hold the power of two f = 2^(a + b - e) against h and l, so that
//
//   S_i = <zq, cq_i> + f (h_i + l_i)   stands for   2^(a + b) (<z, c_i> + bias_i).
//
// The difference is bounded in parts, with lengths that packing measures:
//
//   1. Rounding the vectors: <zq, cq> - <2^b z, 2^a c> = <ez, 2^a c> + <zq, ec>, which is at most
//      |ez| |2^a c| + |zq| |ec|.
//   2. Summing: products of halves are exact in float32. A tensor core adds groups of 4 to 16
//      products and the sum so far after cutting each to the last bit of the largest, and cuts the
//      result. That is at most 6 cuts for 4 products, each of at most 2^-23 of the sum of all
//      magnitudes: 0.75 width 2^-22 of it in all. Float32 additions in any order stay below that.
//      The sum of magnitudes is at most M = |zq| |cq| + f (|h| + |l|), and the bound taken is
//      (width + 8) 2^-22 M. What that leaves is for
//      - the growth of partial sums, less than a fifth up to 2^20 columns;
//      - rounding the threshold itself, 2^-23 M;
//      - splitting the bias, f |r|: two halves keep all but 2^-22 of a number, or 2^-25, and the
//        largest 2^e |bias| is at least 2^12, so this is at most 2^-22 M;
//      - a factor f below half precision's smallest number, 2^-24, which is stored as 0: it loses
//        2^-25 2^13 at most, and only where |zq| and the largest |cq| are above 2^8: 2^-28 M (or
//        where all codes are zero, and their biases equal);
//      - normalising in float64, (dim + 8) 2^-53 M.
//   3. Float64: the distances that decide are rounded, too (`distance_error`).
//   4. A back end may put a tag in the lowest kTagBits bits of a score before scores are compared
//      (CUDA does). That moves it by less than 2^kTagBits units in the last place, 2^(kTagBits -
//      23) |S|, or 2^(kTagBits - 149) where it is tiny. |S| is at most M and what summing adds to
//      it, for which two more of the (width + 8) are counted.
//
// With E the sum of the four, the code that float64 picks has S_i >= max S - 2 E.
//
// Codes that lie close together are packed without a centre m, and the rows then too: <z, c> is
// <z - m, c - m> + <m, c - m>, and <z, m>, which is the same for all codes. So z - m, c - m and
// bias + <m, c - m> less the bias of m take the places of z, c and the bias above. Taking the
// centre away rounds by 2^-53 (|c| + |m|), for which distance_error has room.
#pragma once

#include <cmath>
#include <cstdint>

#include "codebook.h"

namespace tokenflow {

// Columns beside the channels: the bias in two parts, and one against which only codes that must
// not win (missing or not finite) hold a number.
constexpr int kSpareColumns = 3;

// What lengths and biases are scaled to: below 2^10 and 2^13. Entries 2^-24 times as large are
// still normal numbers of half precision (from 2^-14), and a score is at most 2^20 + 2^(15 + 13).
constexpr int kLengthExponent = 10;
constexpr int kBiasExponent = 13;
constexpr int kLargestFactorExponent = 15;
constexpr int kSmallestFactorExponent = -24;

// A code that must not win: -2^15 against the 2^15 of every row, below every other score.
constexpr float kExclusion = 32768.0f;

// The largest length and |bias| of the codes that get a coarse score, as they are packed.
struct CodebookRange {
  double length;
  double bias;
};

// Largest over the codes, in scaled units.
struct CoarseCodeBounds {
  float length;  // |2^a c|
  float error;   // |ec|
  float bias;    // |h| + |l|
};

// Bits of a coarse score that a tag may take.
constexpr int kTagBits = 7;

// Of one row, in scaled units.
struct CoarseRowBounds {
  float length;          // |zq|; NaN for a row that is not finite
  float error;           // |ez|
  float bias_factor;     // f
  float distance_error;  // part 3
  double score_margin;   // not scaled, see score_margin
};

// Lengths that packing measures in float32, from sums of squares of `dim` terms. A value is rounded
// to float32 first, which is 2^-24 of it or 2^-150, then to half precision; the difference of the
// two is exact in float32 (they are within a factor of two, or one is zero or a small multiple of
// the other's last place), and so is a half's square. A sum of `dim` such terms is off by less than
// dim 2^-23 of it. The length of the error gains the 2^-24 of the exact vector, which is no longer
// than the packed one and the error together.
TOKENFLOW_HOST_DEVICE float coarse_packed_length(int dim, float square) {
  return sqrtf(square) * (1.000001f + static_cast<float>(dim) * 0x1p-23f);
}

TOKENFLOW_HOST_DEVICE float coarse_packed_error(int dim, float packed_square, float error_square) {
  const float growth = 1.000001f + static_cast<float>(dim) * 0x1p-23f;
  return (sqrtf(error_square) + 0x1p-23f * sqrtf(packed_square)) * growth +
         static_cast<float>(dim) * 0x1p-60f;
}

// Exponents a and e.
struct CodeExponents {
  int length;
  int bias;
};

// e with 2^e x in [2^(target - 1), 2^target), kept to what float64 can multiply by.
TOKENFLOW_HOST_DEVICE int exponent_towards(int target, double x) {
  int exponent = 0;
  (void)frexp(x, &exponent);
  exponent = target - exponent;
  return exponent > 1000 ? 1000 : (exponent < -1000 ? -1000 : exponent);
}

TOKENFLOW_HOST_DEVICE CodeExponents code_exponents(const CodebookRange& range) {
  return {exponent_towards(kLengthExponent, range.length),
          exponent_towards(kBiasExponent, range.bias)};
}

// Exponents b and a + b - e for a row of this length. Where the bias would need a factor above
// half precision, it is the row that is scaled less.
struct RowExponents {
  int length;
  int factor;
};

TOKENFLOW_HOST_DEVICE RowExponents row_exponents(double length, const CodebookRange& range) {
  const CodeExponents codes = code_exponents(range);
  const int most = kLargestFactorExponent + codes.bias - codes.length;
  int exponent = exponent_towards(kLengthExponent, length);
  if (range.bias > 0 && (exponent > most || length == 0)) exponent = most;
  return {exponent, exponent + codes.length - codes.bias};
}

// f as it is stored: exact, or 0 below half precision.
TOKENFLOW_HOST_DEVICE float bias_factor(const RowExponents& exponents, const CodebookRange& range) {
  if (range.bias == 0 || exponents.factor < kSmallestFactorExponent) return 0;
  return static_cast<float>(ldexp(1.0, exponents.factor));
}

// A bound that was measured in float64, rounded up.
TOKENFLOW_HOST_DEVICE float round_up(double x) { return static_cast<float>(x) * 1.000001f; }

// Part 3 for a row of this length and codes of up to this length, both as they are.
TOKENFLOW_HOST_DEVICE float coarse_distance_error(int dim, double length, double code_length,
                                                  const RowExponents& exponents,
                                                  const CodebookRange& range) {
  const double squares = length * length + code_length * code_length;
  return round_up(
      ldexp(distance_error(dim, squares), exponents.length + code_exponents(range).length));
}

// Rows and codes are compared a second time by the score in float64,
//
//   s_i = sum_g weight_g |z_g|^-1 |c_ig|^-1 <z_g, c_ig> + bias_i    (the lengths where l2_norm),
//
// whose products are exact (24 bits by 24). The sums take (dim + 8) steps of 2^-53 of
// |z| |c| <= squares / 2, and so do weights, lengths and their reciprocals together: (dim + 8)
// 2^-53 `squares` in all, a quarter of distance_error. With E' = 1.25 distance_error, which bounds
// what lies between this score and the rounded distance, the code that float64 distances pick has
// s_i >= max s - 2 E'. This is 2 E' and a little more for a row of this length and codes of up to
// this length.
TOKENFLOW_HOST_DEVICE double score_margin(int dim, double length, double code_length) {
  return 3 * distance_error(dim, length * length + code_length * code_length);
}

// E for a row, with operands of `width` columns.
TOKENFLOW_HOST_DEVICE float coarse_error_bound(int width, const CoarseRowBounds& row,
                                               const CoarseCodeBounds& codes) {
  const float rounding = row.error * codes.length + row.length * codes.error;
  const float magnitudes = row.length * (codes.length + codes.error) + row.bias_factor * codes.bias;
  const float summing = static_cast<float>(width + 8) / 4194304.0f * magnitudes;  // 2^-22
  // 2^(kTagBits - 23) in units of 2^-22, and two more.
  const float tagging = ((1 << kTagBits) / 2 + 2) / 4194304.0f * magnitudes + 0x1p-140f;
  return (rounding + summing + tagging + row.distance_error) * 1.0001f;
}

}  // namespace tokenflow
