// The joint codebook: groups of columns that share one index, and the formulas of its distance.
//
//   d_i = sum_g weight_g * |z_g - c_{i,g}|^2        (eq. 1-3 of arXiv 2412.03069)
//
// where, with l2_norm, z_g and c_{i,g} are scaled to unit length first. Minimising d_i is
// maximising the score
//
//   s_i = <z, weight * c_i> + bias_i,    bias_i = -1/2 * sum_g weight_g * |c_{i,g}|^2 (+ constant),
//
// one dot product of width dim. By the inner product it is <z, weight * c_i> itself that is
// maximised: the bias is 0, and "distance" below stands for its negative. Back ends compute a
// coarse score of every code in a faster format and decide between codes whose scores are closer
// than a proven bound by the distance in float64: the index is the one float64 arithmetic picks for
// the same float32 inputs, the lowest on a tie. To stay within the faster format at every magnitude
// that float32 holds, they multiply rows and codes by powers of two first, which changes no order.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace tokenflow {

constexpr int kMaxGroups = 64;

// What a code's score is, z and c normalised if the layout says so.
enum class Metric {
  kL2,         // -sqrt(sum_g weight_g |z_g - c_g|^2)
  kSquaredL2,  // -sum_g weight_g |z_g - c_g|^2
  kDot,        // sum_g weight_g <z_g, c_g>
};

// torch.nn.functional.normalize's default.
constexpr double kNormEpsilon = 1e-12;

// Group g is columns [begin[g], begin[g + 1]) of a row-major codebook [codes, dim]. There may be
// several codebooks of one shape, each with an index of its own, [books, codes, dim]: of rows
// [books, rows, dim] each book's are looked up in its codebook, and map i of a pyramid, of
// [images, books] maps, in codebook i % books.
struct CodebookLayout {
  int64_t books;
  int64_t codes;
  int dim;
  int groups;
  bool l2_norm;
  Metric metric;
  int begin[kMaxGroups + 1];
  double weight[kMaxGroups];
};

TOKENFLOW_HOST_DEVICE int64_t all_codes(const CodebookLayout& layout) {
  return layout.books * layout.codes;
}

// What a group is divided by: its length as F.normalize takes it, 1 where rows are used as they
// are.
TOKENFLOW_HOST_DEVICE double group_norm(double squared_norm, bool l2_norm) {
  if (!l2_norm) return 1.0;
  const double norm = sqrt(squared_norm);
  return norm > kNormEpsilon ? norm : kNormEpsilon;
}

TOKENFLOW_HOST_DEVICE double inverse_norm(double squared_norm, bool l2_norm) {
  return 1.0 / group_norm(squared_norm, l2_norm);
}

// a * b, rounded: nvcc would fuse it with the sum that it goes into, and two codes that tie in
// float64 might no longer.
TOKENFLOW_HOST_DEVICE double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// Squared length of columns [begin, end) of a row.
template <typename T>
TOKENFLOW_HOST_DEVICE double squared_norm(const T* row, int begin, int end) {
  double sum = 0;
  for (int d = begin; d < end; ++d) {
    const double v = static_cast<double>(row[d]);
    sum += product(v, v);
  }
  return sum;
}

// Score bias of one group of a code. With l2_norm the constant is chosen so that a unit row's bias
// vanishes; only a row shorter than epsilon keeps one.
TOKENFLOW_HOST_DEVICE double group_bias(double squared_norm, const CodebookLayout& layout, int g) {
  if (layout.metric == Metric::kDot) return 0;
  if (!layout.l2_norm) return -0.5 * layout.weight[g] * squared_norm;
  const double scale = inverse_norm(squared_norm, true);
  return 0.5 * layout.weight[g] * (1.0 - squared_norm * scale * scale);
}

// Bias of a vector whose length, with the weights, squared is this, and which is not normalised
// further: that of a centre which is taken from all codes.
TOKENFLOW_HOST_DEVICE double centre_bias(double square, const CodebookLayout& layout) {
  return layout.metric == Metric::kDot || layout.l2_norm ? 0.0 : -0.5 * square;
}

// What a channel adds to a group's distance.
TOKENFLOW_HOST_DEVICE double channel_distance(double row, double code, Metric metric) {
  if (metric == Metric::kDot) return -product(row, code);
  const double difference = row - code;
  return product(difference, difference);
}

// d_i in float64, rows normalised in float64 from what is stored. By division, as F.normalize
// does: a row and its multiple by a power of two then tie exactly.
template <typename T>
TOKENFLOW_HOST_DEVICE double distance(const T* row, const T* code, const CodebookLayout& layout) {
  double sum = 0;
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const double row_norm = group_norm(squared_norm(row, begin, end), layout.l2_norm);
    const double code_norm = group_norm(squared_norm(code, begin, end), layout.l2_norm);
    double group = 0;
    for (int d = begin; d < end; ++d) {
      group += channel_distance(static_cast<double>(row[d]) / row_norm,
                                static_cast<double>(code[d]) / code_norm, layout.metric);
    }
    sum += product(layout.weight[g], group);
  }
  return sum;
}

// How far a float32 score may be from the exact one: the standard bound of a recursive sum of
// dim + 1 terms, (dim + 1) u sum |z_d| |w c_d|, by Cauchy-Schwarz with the lengths of the two
// vectors, plus the rounding of the packed operands (2 u each). `bias` bounds |bias_i|.
TOKENFLOW_HOST_DEVICE double score_error_bound(int dim, double row_norm, double code_norm,
                                               double bias) {
  return (dim + 8) * 0x1p-24 * (row_norm * code_norm + bias) * 1.0001;
}

// How far half a `distance` (all of one by the inner product), rounded in float64 as it is, may be
// from the exact number, where
// `squares` is |z|^2 + |c|^2 with the weights. A distance is at most twice that, and rounding takes
// dim + 6 steps of 2^-53 and as much again for normalising: (2 dim + 12) 2^-53 of it. The score
// lacks the constant and its bias is rounded within dim 2^-53 |c|^2. Together at most
// (dim + 8) 2^-51 `squares`. An inner product is rounded by half as many steps of a number that is
// at most half of `squares`. The 2^-940 stands for products with weights so small that they
// underflow. `unit` is what a distance of 1 counts as in `squares` and in the result.
TOKENFLOW_HOST_DEVICE double distance_error(int dim, double squares, double unit = 1) {
  return (dim + 8) * 0x1p-51 * (squares + 0x1p-940 * unit);
}

}  // namespace tokenflow
