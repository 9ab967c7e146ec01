// Drawing a code by its closeness, with the Gumbel-max trick: the code at which
//
//   score_i + temperature * g_i
//
// is largest has the probability softmax(score / temperature)_i, where the g_i are independent and
// have the standard Gumbel distribution. The noise of a row and a code depends on the seed, the
// row's position and the code alone, so that a draw does not depend on how the work is shared out.
//
// Scores are computed in float64, from differences, so that nothing cancels.
#pragma once

#include <cmath>
#include <cstdint>

#include "codebook.h"
#include "philox.h"
#include "row_argument.h"

namespace tokenflow {

// A code drawn for every row by the layout's metric, of one codebook. T is float (CPU and CUDA) or
// double (CPU).
template <typename T>
struct SampleCodeArgs {
  CodebookLayout layout;
  const T* codebook;  // [codes, dim]
  int64_t num_rows;
  const T* rows;       // [num_rows, dim], not normalised
  double temperature;  // finite, not negative; 0 takes the largest score
  RowArgument<int64_t> seed;
  RowArgument<int64_t> offset;
  int64_t* indices;  // out [num_rows]; 0 for a row that is not finite
};

// One block of random words is enough for this many codes.
constexpr int kGumbelCodes = 4;

// The words of codes [4 group, 4 group + 4) for a row at `position` of a seed's stream. The last
// number keeps them apart from `random_bits`.
TOKENFLOW_HOST_DEVICE PhiloxBlock gumbel_words(uint64_t seed, uint64_t position, int64_t group) {
  return philox_4x32_10({{static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                          static_cast<uint32_t>(group), 1}},
                        static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// -log(-log u) of the uniform number u = (word + 1/2) 2^-32: from -3.2 to 22.9.
TOKENFLOW_HOST_DEVICE double gumbel(uint32_t word) {
  return -log(-log((static_cast<double>(word) + 0.5) * 0x1p-32));
}

// At least gumbel(word), and cheap: -log u >= 1 - u, whose leading zeros say how small it is.
TOKENFLOW_HOST_DEVICE double gumbel_bound(int leading_zeros_of_complement) {
  return 0.6931472 * (leading_zeros_of_complement + 1);
}

// The larger value wins, the lower index among equal ones.
struct GumbelChoice {
  double value;
  int64_t index;
};

TOKENFLOW_HOST_DEVICE bool beats(const GumbelChoice& a, const GumbelChoice& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// A code's score from its sum over channels: of squared differences, or of products.
TOKENFLOW_HOST_DEVICE double score_of(double sum, Metric metric) {
  return metric == Metric::kDot ? sum : metric == Metric::kL2 ? -sqrt(sum) : -sum;
}

// A channel's factor in a group of that length. Rows and codes are multiplied by it.
TOKENFLOW_HOST_DEVICE double channel_scale(double squared_norm, double weight, bool l2_norm) {
  return sqrt(weight) * inverse_norm(squared_norm, l2_norm);
}

}  // namespace tokenflow
