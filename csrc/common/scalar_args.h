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
