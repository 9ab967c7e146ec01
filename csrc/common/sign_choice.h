// The soft choice between the two values of a sign: 1 with the probability sigmoid(x). One source
// for numbers and for vectors of numbers: Math has exp_of_negative(a) = e^a for a <= 0, log1p(u)
// for u in [0, 1], and kMost, up to which e^-kMost is a normal number.
#pragma once

#include "host_device.h"

namespace tokenflow {

template <typename X>
struct SignChoice {
  X chance;   // probability of 1
  X entropy;  // in nats
};

// |x|, at most kMost: beyond, the choice is certain. A NaN stays one.
template <typename Math, typename X>
TOKENFLOW_HOST_DEVICE X certain_at_most(X x) {
  const X zero = X{}, most = zero + Math::kMost;
  x = x < zero ? -x : x;
  return x > most ? most : x;
}

// With u = e^-|x| and q = u / (1 + u), the probability of the less probable value, the entropy is
// log(1 + u) + |x| q: nothing cancels, and no logarithm is of 0.
template <typename Math, typename X>
TOKENFLOW_HOST_DEVICE SignChoice<X> sign_choice(X logit) {
  const X zero = X{}, one = zero + Math::kOne;
  const X size = certain_at_most<Math>(logit);
  const X u = Math::exp_of_negative(-size);
  const X q = u / (one + u);
  return {logit > zero ? one - q : q, Math::log1p(u) + size * q};
}

// The derivative of by_chance * chance + by_entropy * entropy by the logit: p' = q (1 - q), and
// H' = -x p'.
template <typename Math, typename X>
TOKENFLOW_HOST_DEVICE X sign_choice_backward(X logit, X by_chance, X by_entropy) {
  const X zero = X{}, one = zero + Math::kOne;
  const X size = certain_at_most<Math>(logit);
  const X u = Math::exp_of_negative(-size);
  const X share = one / (one + u);
  return (by_chance - by_entropy * (logit < zero ? -size : size)) * (u * share * share);
}

}  // namespace tokenflow
