// Sums of products as tensor cores make them.
#pragma once

namespace emulation {

// sum += a b, 16 products in the order of their columns, `group` of them (4, 8 or 16) at a time:
// the sum so far and a group's products are brought to the exponent of the largest, what does not
// fit in its 24 bits is cut off, and so is their sum to float32.
float accumulate(float sum, const float* a, const float* b, int group);

}  // namespace emulation
