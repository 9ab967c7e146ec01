// `distance` is computed as it is written: a processor that can multiply and add at once does not
// round otherwise, so that codes which tie do so everywhere. Built with such instructions and
// without.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"

namespace {

using namespace tokenflow;

// Kept in memory, so that nothing can be fused.
double product_of(double a, double b) {
  volatile double result = a * b;
  return result;
}

double sum_of(double a, double b) {
  volatile double result = a + b;
  return result;
}

double norm_of(const float* vector, int begin, int end, bool l2_norm) {
  double square = 0;
  for (int d = begin; d < end; ++d) {
    square = sum_of(square, product_of(static_cast<double>(vector[d]), vector[d]));
  }
  return l2_norm ? std::max(std::sqrt(square), 1e-12) : 1.0;
}

double definition(const float* row, const float* code, const CodebookLayout& layout) {
  double total = 0;
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const double row_norm = norm_of(row, begin, end, layout.l2_norm);
    const double code_norm = norm_of(code, begin, end, layout.l2_norm);
    double group = 0;
    for (int d = begin; d < end; ++d) {
      const double z = row[d] / row_norm, c = code[d] / code_norm;
      const double difference = sum_of(z, -c);
      group = sum_of(group, layout.metric == Metric::kDot ? -product_of(z, c)
                                                          : product_of(difference, difference));
    }
    total = sum_of(total, product_of(layout.weight[g], group));
  }
  return total;
}

int run_all() {
#if defined(__x86_64__) && defined(__FMA__)
  if (!__builtin_cpu_supports("fma")) {
    std::printf("this machine has no fused multiply-add\n");
    return EXIT_SUCCESS;
  }
#endif
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  int64_t ties = 0;
  for (int n = 0; n < 20000; ++n) {
    CodebookLayout layout = test::make_layout(2, {5, 3}, n % 2 == 0, {1.0, 0.3});
    layout.metric = n % 3 == 0 ? Metric::kDot : Metric::kSquaredL2;
    std::vector<float> row(8), code(8), mirrored(8);
    for (int d = 0; d < 8; ++d) {
      // Whole multiples, so that the code and its mirror image are as far from the row.
      row[d] = std::round(normal(generator) * 64) / 64;
      const float step = std::round(normal(generator) * 1024) / 1024;
      code[d] = row[d] + step;
      mirrored[d] = row[d] - step;
    }
    for (const std::vector<float>* other : {&code, &mirrored}) {
      const double got = distance(row.data(), other->data(), layout);
      const double wanted = definition(row.data(), other->data(), layout);
      CHECK(std::memcmp(&got, &wanted, sizeof(got)) == 0, "%.17g, not %.17g", got, wanted);
    }
    ties +=
        distance(row.data(), code.data(), layout) == distance(row.data(), mirrored.data(), layout);
  }
  CHECK(ties > 3000, "%ld ties", static_cast<long>(ties));
  std::printf("ok\n");
  return EXIT_SUCCESS;
}

}  // namespace

int main() { return test::run(run_all); }
