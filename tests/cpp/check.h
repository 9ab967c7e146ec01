// What the C++ tests share: a check that ends the program, codebook layouts, and the nearest code.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <vector>

#include "common/codebook.h"

#define CHECK(condition, ...)                                                        \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                             \
      std::fprintf(stderr, "\n");                                                    \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

namespace test {

// body(), or 1 and the message of what it throws: an exception that nobody catches is a crash, and
// ctest does not look at what a crashed program has said.
template <typename Body>
int run(const Body& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

// Groups of `dims` channels; weights of 1 where none are given.
inline tokenflow::CodebookLayout make_layout(int64_t codes, const std::vector<int>& dims,
                                             bool l2_norm,
                                             const std::vector<double>& weights = {}) {
  tokenflow::CodebookLayout layout = {};
  layout.books = 1;
  layout.codes = codes;
  layout.groups = static_cast<int>(dims.size());
  layout.l2_norm = l2_norm;
  for (size_t g = 0; g < dims.size(); ++g) {
    layout.begin[g] = layout.dim;
    layout.dim += dims[g];
    layout.weight[g] = weights.empty() ? 1.0 : weights[g];
  }
  layout.begin[dims.size()] = layout.dim;
  return layout;
}

// The code of the smallest `distance`, the lowest of equal ones; 0 where none is less than
// infinity.
inline int64_t nearest_by_distance(const float* row, const std::vector<float>& codes,
                                   const tokenflow::CodebookLayout& layout) {
  double least = std::numeric_limits<double>::infinity();
  int64_t index = 0;
  for (int64_t i = 0; i < layout.codes; ++i) {
    const double d = tokenflow::distance(row, codes.data() + i * layout.dim, layout);
    if (!(d < least)) continue;
    least = d;
    index = i;
  }
  return index;
}

}  // namespace test
