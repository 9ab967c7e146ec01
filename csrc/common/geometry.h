// Geometry of the residual pyramid: area bins (down) and bicubic or bilinear taps (up), both
// separable.
//
// Sampling positions are exact integer ratios; only the interpolation weights are rounded, so
// every back end samples at the same positions. The definitions are those of
// torch.nn.functional.interpolate(mode="area"), and "bicubic" or "bilinear" with
// align_corners=False.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace tokenflow {

constexpr int kMaxScales = 64;

struct Extent {
  int height;
  int width;
};

enum class Upsampling { kBicubic, kBilinear };

// One call's pyramid: features [batch, dim, height, width] and the grid of every scale, coarse to
// fine. Tokens of an image are stored scale after scale, row-major: scale s owns
// [first_token[s], first_token[s + 1]).
struct Pyramid {
  Upsampling upsampling;
  int64_t batch;
  int height;
  int width;
  int num_scales;
  Extent extent[kMaxScales];
  int64_t first_token[kMaxScales + 1];
};

TOKENFLOW_HOST_DEVICE int64_t tokens_per_image(const Pyramid& pyramid) {
  return pyramid.first_token[pyramid.num_scales];
}

// Half-open range of input positions averaged into output position `i`.
struct AreaBin {
  int begin;
  int end;
};

TOKENFLOW_HOST_DEVICE AreaBin area_bin(int i, int input, int output) {
  return {static_cast<int>(static_cast<int64_t>(i) * input / output),
          static_cast<int>((static_cast<int64_t>(i + 1) * input + output - 1) / output)};
}

// Outputs whose area bin contains input position `i`: the transpose of area_bin.
TOKENFLOW_HOST_DEVICE AreaBin area_bins_of(int i, int input, int output) {
  // begin(o) <= i  <=>  o * input < (i + 1) * output;  end(o) > i  <=>  (o + 1) * input > i *
  // output.
  return {static_cast<int>(static_cast<int64_t>(i) * output / input),
          static_cast<int>((static_cast<int64_t>(i + 1) * output + input - 1) / input)};
}

// Four input positions (clamped to the border) and weights for one output position; the outer two
// weigh nothing where upsampling is bilinear.
template <typename T>
struct Taps {
  int position[4];
  T weight[4];
};

template <typename T>
TOKENFLOW_HOST_DEVICE Taps<T> upsampling_taps(int i, int input, int output, Upsampling upsampling) {
  // Source position ((2i + 1) * input / output - 1) / 2 as the fraction numerator / (2 * output).
  const int64_t numerator = static_cast<int64_t>(2 * i + 1) * input - output;
  const int64_t denominator = 2 * static_cast<int64_t>(output);
  const int64_t base =
      (numerator + denominator) / denominator - 1;  // floor: numerator > -denominator
  const T t = static_cast<T>(numerator - base * denominator) / static_cast<T>(denominator);

  const T a = static_cast<T>(-0.75);
  const T s = 1 - t;
  Taps<T> taps;
  if (upsampling == Upsampling::kBilinear) {
    taps.weight[0] = taps.weight[3] = 0;
    taps.weight[1] = s;
    taps.weight[2] = t;
  } else {
    taps.weight[0] = ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a;
    taps.weight[1] = ((a + 2) * t - (a + 3)) * t * t + 1;
    taps.weight[2] = ((a + 2) * s - (a + 3)) * s * s + 1;
    taps.weight[3] = ((a * (s + 1) - 5 * a) * (s + 1) + 8 * a) * (s + 1) - 4 * a;
  }
  for (int k = 0; k < 4; ++k) {
    const int64_t p = base - 1 + k;
    taps.position[k] = static_cast<int>(p < 0 ? 0 : (p >= input ? input - 1 : p));
  }
  return taps;
}

}  // namespace tokenflow
