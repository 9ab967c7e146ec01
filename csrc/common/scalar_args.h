// Arguments of scalar quantization: every channel by itself, without a table of codes (signs: LFQ,
// BSQ; levels: FSQ), along the residual pyramid. The same for csrc/cpu and csrc/cuda; pointers are
// to contiguous memory of the back end's device, T float (both) or double (CPU).
//
// A channel's digit is how many of its thresholds the number exceeds, and the digit picks a value.
// A NaN exceeds none. Scales may have thresholds and values of their own (finer ones at a later
// depth of a residual): `round[s]` says which.
#pragma once

#include <cstdint>

#include "geometry.h"

namespace tokenflow {

// Tables of thresholds and values are at most this long.
constexpr int64_t kMostDigits = 1 << 15;

// What stands in the place of a row's values for gradients and losses: the row itself; each group
// at unit length; or, channel by channel, outer * t(inner * z + shift) + offset, t being tanh or
// the cut to [-1, 1].
enum class StandIn { kSame, kUnit, kTanh, kClamp };

constexpr int kCurveParts = 4;  // inner, shift, outer, offset

struct ScalarLayout {
  int dim;
  int groups;      // of equal width
  int thresholds;  // of each channel; a channel that has fewer is filled with infinities
  int rounds;      // of the tables
  StandIn stand_in;
  int round[kMaxScales];
  double slope[kMaxScales];  // logit of a sign's 1 against its 0, by a unit of what stands in
};

template <typename T>
struct ScalarTables {
  const T* thresholds;  // [rounds, thresholds, dim], ascending
  const T* values;      // [rounds, thresholds + 1, dim]
  const T* curves;      // [rounds, kCurveParts, dim]; null where nothing is bent
};

// Token indices [batch, groups, tokens] of digits [batch, tokens, groups * dim]: the sum of digits
// times the places of their channels.
constexpr int kMostPlaces = 63;  // an index holds so many bits, and each channel one at least

struct PackDigitsArgs {
  int64_t batch;
  int64_t tokens;
  int groups;
  int dim;
  int64_t place[kMostPlaces];
  const int16_t* digits;
  int64_t* indices;
};

// The index of one group of a token; the digits are those of its first channel and after.
TOKENFLOW_HOST_DEVICE int64_t pack_digits(const PackDigitsArgs& args, const int16_t* digits) {
  int64_t index = 0;
  for (int d = 0; d < args.dim; ++d) index += args.place[d] * digits[d];
  return index;
}

// The losses of a scale are means over its tokens and over maps. Those of choices are of signs:
// each channel chooses 1 with the probability sigmoid(slope z).
template <typename T>
struct ScalarQuantizeArgs {
  Pyramid pyramid;
  ScalarLayout layout;
  ScalarTables<T> tables;
  PackDigitsArgs pack;  // out: indices; its digits are the back end's own
  const T* h;           // [batch, dim, height, width]
  const bool* flips;    // [batch, tokens, dim]: digits to invert, of two values; or null
  T* quantized;         // out [batch, dim, height, width]
  T* rows;              // out [batch, tokens, dim]: what each scale was quantized from; or null
  T* error;             // out [scales]: mean of (value - z)^2, also over channels; or null
  T* entropy;           // out [scales]: mean over tokens of the sum of channels' entropies; or null
  T* chance;            // out [scales, dim]: mean probability of 1; null where entropy is
};

// The gradient of all outputs, with values standing for what stands in their place. Gradients that
// are null are zero.
template <typename T>
struct ScalarQuantizeBackwardArgs {
  Pyramid pyramid;
  ScalarLayout layout;
  ScalarTables<T> tables;
  const T* rows;
  const bool* flips;
  const T* grad_quantized;  // [batch, dim, height, width]
  const T* grad_rows;       // [batch, tokens, dim]
  const T* grad_error;      // [scales]
  const T* grad_entropy;    // [scales]
  const T* grad_chance;     // [scales, dim]; null where grad_entropy is
  T* grad_h;                // out [batch, dim, height, width]
};

// The digit of a number; thresholds of one channel are `stride` apart.
template <typename T>
TOKENFLOW_HOST_DEVICE int digit_of(T value, const T* thresholds, int count, int stride) {
  int digit = 0;
  for (int i = 0; i < count; ++i) digit += value > thresholds[static_cast<int64_t>(i) * stride];
  return digit;
}

// The same of rows without a grid, as many rounds as there are tables: each takes what the rounds
// before left.
template <typename T>
struct ScalarRowsArgs {
  int64_t num_rows;
  ScalarLayout layout;
  ScalarTables<T> tables;
  PackDigitsArgs pack;  // out: indices [num_rows, rounds], or null
  const T* rows;        // [num_rows, dim]
  T* quantized;         // out [num_rows, dim]: the sum of the codes
  T* codes;             // out [num_rows, rounds, dim], or null
};

// The gradient of the sum of codes, with each of them standing for what stands in its place.
template <typename T>
struct ScalarRowsBackwardArgs {
  int64_t num_rows;
  ScalarLayout layout;
  ScalarTables<T> tables;
  const T* rows;
  const T* grad_quantized;
  T* grad_rows;  // out [num_rows, dim]
};

}  // namespace tokenflow
