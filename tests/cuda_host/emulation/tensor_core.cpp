#include "tensor_core.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulation {
namespace {

// Toward zero, to the 24 bits of a float.
float cut_to_float(double value) {
  const double magnitude = std::fabs(value);
  if (magnitude >= 0x1p-126 && magnitude < 0x1p127) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    bits &= ~((uint64_t{1} << 29) - 1);
    std::memcpy(&value, &bits, sizeof(bits));
    return static_cast<float>(value);
  }
  const float nearest = static_cast<float>(value);
  const bool away = std::fabs(static_cast<double>(nearest)) > magnitude;
  return away ? std::nextafter(nearest, 0.0f) : nearest;
}

// 2^(23 - e) for a magnitude of 2^e to 2^(e + 1), which is not denormal.
double scale_to_24_bits(double magnitude) {
  uint64_t bits;
  std::memcpy(&bits, &magnitude, sizeof(bits));
  bits = (uint64_t{2 * 1023 + 23} - (bits >> 52)) << 52;
  std::memcpy(&magnitude, &bits, sizeof(bits));
  return magnitude;
}

template <int kGroup>
float accumulate_groups(float sum, const double* products) {
  for (int first = 0; first < 16; first += kGroup) {
    double largest = std::fabs(static_cast<double>(sum)), exact = sum;
    for (int k = 0; k < kGroup; ++k) {
      const double product = products[first + k], magnitude = std::fabs(product);
      largest = magnitude > largest ? magnitude : largest;
      exact += product;
    }
    if (largest > 0 && std::isfinite(exact)) {
      const double up = scale_to_24_bits(largest);
      // Toward zero, as the conversion goes; 17 numbers of 24 bits fit.
      int32_t whole = static_cast<int32_t>(static_cast<double>(sum) * up);
      for (int k = 0; k < kGroup; ++k) whole += static_cast<int32_t>(products[first + k] * up);
      exact = static_cast<double>(whole) / up;
    }
    sum = cut_to_float(exact);
  }
  return sum;
}

}  // namespace

float accumulate(float sum, const float* a, const float* b, int group) {
  double products[16];
  for (int k = 0; k < 16; ++k) products[k] = static_cast<double>(a[k]) * static_cast<double>(b[k]);
  return group == 16 ? accumulate_groups<16>(sum, products)
                     : (group == 8 ? accumulate_groups<8>(sum, products)
                                   : accumulate_groups<4>(sum, products));
}

}  // namespace emulation
