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

struct ScalarLayout {
  int dim;
  int thresholds;  // of each channel; a channel that has fewer is filled with infinities
  int round[kMaxScales];
};

template <typename T>
struct ScalarQuantizeArgs {
  Pyramid pyramid;
  ScalarLayout layout;
  const T* thresholds;  // [rounds, thresholds, dim], ascending
  const T* values;      // [rounds, thresholds + 1, dim]
  const T* h;           // [batch, dim, height, width]
  const bool* flips;    // [batch, tokens, dim]: digits to invert, of two values; or null
  T* quantized;         // out [batch, dim, height, width]
  int16_t* digits;      // out [batch, tokens, dim]
  T* rows;              // out [batch, tokens, dim]: what each scale was quantized from
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
  int dim;
  int thresholds;
  int rounds;
  const T* thresholds_table;  // [rounds, thresholds, dim]
  const T* values;            // [rounds, thresholds + 1, dim]
  const T* rows;              // [num_rows, dim]
  T* codes;                   // out [num_rows, rounds, dim]
  int16_t* digits;            // out [num_rows, rounds, dim]
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

// rows [batch, tokens, dim] = the transpose of every scale's upsampling, applied to a plane
// [batch, dim, height, width].
template <typename T>
struct UpsampleTransposeArgs {
  Pyramid pyramid;
  int dim;
  const T* plane;
  T* rows;
};

// plane [batch, dim, height, width] = the transpose of the pooling to every scale, summed over
// scales, applied to rows [batch, tokens, dim].
template <typename T>
struct PoolTransposeArgs {
  Pyramid pyramid;
  int dim;
  const T* rows;
  T* plane;
};

}  // namespace tokenflow
