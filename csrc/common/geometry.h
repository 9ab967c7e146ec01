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

// No side of a plane or scale is longer, so that 32 bits hold the products below.
constexpr int kLargestSide = 1 << 15;

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
  const unsigned at = static_cast<unsigned>(i), from = static_cast<unsigned>(input);
  const unsigned to = static_cast<unsigned>(output);
  return {static_cast<int>(at * from / to), static_cast<int>(((at + 1) * from + to - 1) / to)};
}

// Outputs whose area bin contains input position `i`: the transpose of area_bin.
TOKENFLOW_HOST_DEVICE AreaBin area_bins_of(int i, int input, int output) {
  // begin(o) <= i  <=>  o * input < (i + 1) * output;  end(o) > i  <=>  (o + 1) * input > i *
  // output: as many outputs over an input as bins over it.
  return area_bin(i, output, input);
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
  // The source position ((2i + 1) * input / output - 1) / 2 is a fraction with denominator
  // 2 * output. It is above -1: one more makes the numerator positive, and 2^31 at most.
  const unsigned denominator = 2 * static_cast<unsigned>(output);
  const unsigned shifted = static_cast<unsigned>(2 * i + 1) * static_cast<unsigned>(input) +
                           static_cast<unsigned>(output);
  const int base = static_cast<int>(shifted / denominator) - 1;
  const T t = static_cast<T>(shifted % denominator) / static_cast<T>(denominator);

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
    const int p = base - 1 + k;
    taps.position[k] = p < 0 ? 0 : (p >= input ? input - 1 : p);
  }
  return taps;
}

}  // namespace tokenflow
