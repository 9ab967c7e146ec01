// Codebooks in which many codes come near to every row: the nearest code is still found, and few
// codes are compared for it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/search.h"
#include "thread_executor.h"

namespace {

using namespace tokenflow;

constexpr int64_t kCodes = 3000, kRows = 200;
const std::vector<int> kDims = {9, 4};
constexpr int kDim = 13;

int failures = 0;
std::mt19937 generator(5);

std::vector<float> gaussian(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count * kDim);
  for (float& value : values) value = normal(generator);
  return values;
}

// Returns how many codes were compared for a row on average.
double check(const std::string& name, CodebookLayout layout, const std::vector<float>& codes,
             const std::vector<float>& rows, int workers) {
  const cpu::Executor executor = cpu::thread_executor(workers);
  cpu::Searcher<float> searcher(layout, codes.data(), executor, 1 << 20);
  const auto count = static_cast<int64_t>(rows.size()) / kDim;
  std::vector<int64_t> indices(count);
  searcher.search(rows.data(), count, indices.data());
  for (int64_t n = 0; n < count; ++n) {
    const int64_t expected = test::nearest_by_distance(&rows[n * kDim], codes, layout);
    if (indices[n] == expected) continue;
    std::printf("FAILED: %s: row %d has code %d, not %d\n", name.c_str(), static_cast<int>(n),
                static_cast<int>(indices[n]), static_cast<int>(expected));
    ++failures;
    break;
  }
  return static_cast<double>(searcher.codes_compared()) / static_cast<double>(count);
}

struct Case {
  std::string name;
  double most;                                                           // codes compared for a row
  std::function<void(std::vector<float>&, std::vector<float>&)> change;  // of codes and rows
};

void scale_code(std::vector<float>& codes, int64_t i, float factor) {
  for (int d = 0; d < kDim; ++d) codes[i * kDim + d] *= factor;
}

void collapse(std::vector<float>& vectors, float spread) {
  const std::vector<float> centre(vectors.begin(), vectors.begin() + kDim);
  for (size_t i = 0; i < vectors.size(); ++i) {
    vectors[i] = centre[i % kDim] + spread * vectors[i];
  }
}

// What was packed is used again while the codes are the same, and no longer.
void check_kept_codes() {
  const cpu::Executor executor = cpu::thread_executor(1);
  const CodebookLayout layout = test::make_layout(kCodes, kDims, false, {1.0, 0.5});
  std::vector<float> codes = gaussian(kCodes);
  const std::vector<float> rows = gaussian(5);
  std::uniform_int_distribution<size_t> somewhere(0, codes.size() - 1);
  for (int turn = 0; turn < 60; ++turn) {
    if (turn % 4 == 3) codes[somewhere(generator)] = 0.3f * static_cast<float>(turn);
    if (turn % 8 == 7) {  // a new nearest code for one of them, lower than the last
      std::copy_n(rows.begin() + turn / 8 % 5 * kDim, kDim,
                  codes.begin() + (kCodes - 1 - 11 * turn) * kDim);
    }
    int64_t indices[5];
    cpu::Searcher<float>(layout, codes.data(), executor, 5).search(rows.data(), 5, indices);
    for (int n = 0; n < 5; ++n) {
      if (indices[n] == test::nearest_by_distance(&rows[n * kDim], codes, layout)) continue;
      std::printf("FAILED: codes that changed, turn %d\n", turn);
      ++failures;
    }
  }
}

int run_all() {
  check_kept_codes();
  // A crowd is given up beyond 64 + codes / 256 candidates and a block, at two levels.
  const double crowds = 2 * (64 + kCodes / 256 + 64);
  std::vector<Case> cases = {
      {"ordinary", 40, [](auto&, auto&) {}},
      {"equal codes", crowds,
       [](auto& codes, auto&) {
         for (size_t i = kDim; i < codes.size(); ++i) codes[i] = codes[i % kDim];
       }},
      {"nearly all codes equal", crowds,
       [](auto& codes, auto&) {
         for (size_t i = 0; i < codes.size(); ++i) {
           if (i / kDim % 97 != 5) codes[i] = codes[i % kDim];
         }
       }},
      {"zeros of both signs", crowds,
       [](auto& codes, auto&) {
         for (size_t i = 0; i < codes.size(); ++i) codes[i] = i / kDim % 2 ? 0.0f : -0.0f;
       }},
      {"rows of zeros", 40,
       [](auto&, auto& rows) { std::fill(rows.begin(), rows.begin() + 50 * kDim, 0.0f); }},
      {"a giant", crowds, [](auto& codes, auto&) { scale_code(codes, kCodes / 2, 1e3f); }},
      {"two giants of a kind", crowds,
       [](auto& codes, auto&) {
         scale_code(codes, 7, 1e6f);
         scale_code(codes, kCodes - 1, 1e6f);
       }},
      {"lengths of many sizes", 3 * crowds,
       [](auto& codes, auto&) {
         std::normal_distribution<float> normal;
         for (int64_t i = 0; i < kCodes; ++i) scale_code(codes, i, std::exp(3 * normal(generator)));
       }},
      {"a dead codebook", 40,
       [](auto& codes, auto&) {
         for (int64_t i = 0; i < kCodes; ++i) scale_code(codes, i, 1e-6f);
       }},
  };
  for (const float spread : {1e-1f, 1e-2f, 1e-3f, 1e-4f}) {
    const std::string name = "codes within " + std::to_string(spread);
    cases.push_back({name, crowds, [=](auto& codes, auto&) { collapse(codes, spread); }});
    cases.push_back({name + ", and rows", crowds, [=](auto& codes, auto& rows) {
                       const std::vector<float> centre(codes.begin(), codes.begin() + kDim);
                       collapse(codes, spread);
                       for (size_t i = 0; i < rows.size(); ++i) {
                         rows[i] = centre[i % kDim] + spread * rows[i];
                       }
                     }});
  }
  for (const bool l2_norm : {true, false}) {
    for (const Metric metric : {Metric::kSquaredL2, Metric::kDot}) {
      for (const Case& one : cases) {
        CodebookLayout layout = test::make_layout(kCodes, kDims, l2_norm, {1.0, 0.5});
        layout.metric = metric;
        std::vector<float> codes = gaussian(kCodes), rows = gaussian(kRows);
        one.change(codes, rows);
        const std::string name = one.name + (l2_norm ? ", unit groups" : "") +
                                 (metric == Metric::kDot ? ", inner product" : "");
        const double compared = check(name, layout, codes, rows, 2);
        if (compared > one.most) {
          std::printf("FAILED: %s: %.1f codes compared for a row, at most %.1f\n", name.c_str(),
                      compared, one.most);
          ++failures;
        }
      }
    }
  }
  if (failures == 0) std::printf("ok\n");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace

int main() { return test::run(run_all); }
