// How numbers are bent to the range of levels, and the derivative: one source for numbers and for
// vectors of numbers (see sign_choice.h for Math).
#pragma once

#include "scalar_args.h"
#include "sign_choice.h"

namespace tokenflow {

template <typename X>
struct Bent {
  X value;
  X slope;
};

// tanh(y), or for kClamp y cut to [-1, 1].
template <typename Math, typename X>
TOKENFLOW_HOST_DEVICE Bent<X> bend(StandIn kind, X y) {
  const X zero = X{}, one = zero + Math::kOne, two = one + one;
  if (kind == StandIn::kClamp) {
    return {y > one ? one : (y < -one ? -one : y), (y <= one) & (y >= -one) ? one : zero};
  }
  // With w = e^-2|y|: (1 - w) / (1 + w), and 4 w / (1 + w)^2.
  const X w = Math::exp_of_negative(-certain_at_most<Math>(y + y));
  const X share = one / (one + w), size = (one - w) * share;
  return {y < zero ? -size : size, (two * share) * (two * share) * w};
}

}  // namespace tokenflow
