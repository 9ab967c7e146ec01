// The CPU back end without torch: exact search on every instruction set the machine has, and the
// pyramid's operators against their adjoints and against sampling written out here.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/quantizer.h"
#include "thread_executor.h"

namespace {

using namespace tokenflow;
using namespace tokenflow::cpu;

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

std::mt19937 generator(7);

template <typename T>
std::vector<T> randn(size_t count) {
  std::normal_distribution<T> normal;
  std::vector<T> values(count);
  for (T& v : values) v = normal(generator);
  return values;
}

// The definition, with nothing shared with the library: the weighted squared distances.
std::vector<double> naive_distances(const float* row, const std::vector<float>& codebook,
                                    const CodebookLayout& layout) {
  std::vector<double> distances(layout.codes);
  for (int64_t i = 0; i < layout.codes; ++i) {
    double total = 0;
    for (int g = 0; g < layout.groups; ++g) {
      double a = 0, b = 0, d = 0;
      const float* code = codebook.data() + i * layout.dim;
      for (int c = layout.begin[g]; c < layout.begin[g + 1]; ++c) {
        a += static_cast<double>(row[c]) * row[c];
        b += static_cast<double>(code[c]) * code[c];
      }
      a = layout.l2_norm ? std::max(std::sqrt(a), 1e-12) : 1;
      b = layout.l2_norm ? std::max(std::sqrt(b), 1e-12) : 1;
      for (int c = layout.begin[g]; c < layout.begin[g + 1]; ++c) {
        d += (row[c] / a - code[c] / b) * (row[c] / a - code[c] / b);
      }
      total += layout.weight[g] * d;
    }
    distances[i] = total;
  }
  return distances;
}

void test_search() {
  for (const std::vector<int>& dims : {std::vector<int>{1}, {32, 8}, {3, 2, 1}, {17}}) {
    for (const int64_t codes : {1, 31, 512, 1700}) {
      for (const int64_t count : {1, 5, 13, 250}) {
        for (const bool l2_norm : {true, false}) {
          const CodebookLayout layout = test::make_layout(codes, dims, l2_norm, {1.0, 1.5, 2.0});
          const std::vector<float> codebook = randn<float>(codes * layout.dim);
          const std::vector<float> rows = randn<float>(count * layout.dim);
          std::vector<int64_t> found(count, -1);
          nearest_code<float>({layout, codebook.data(), count, rows.data(), found.data()},
                              thread_executor(2));
          bool same = true;
          for (int64_t n = 0; n < count; ++n) {
            const std::vector<double> d =
                naive_distances(rows.data() + n * layout.dim, codebook, layout);
            const auto best = std::min_element(d.begin(), d.end());  // the first of equals
            // Where two are equal to float64's rounding, either may come out.
            same = same && found[n] >= 0 && found[n] < codes &&
                   (found[n] == best - d.begin() || d[found[n]] <= *best * (1 + 1e-12));
          }
          expect(same, "nearest_code is the naive search");
        }
      }
    }
  }
}

template <typename T>
double dot(const std::vector<T>& a, const std::vector<T>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

void test_adjoints(const ChannelKernels<double>& plane, const char* name) {
  const int dim = 5;
  for (const Extent full : {Extent{7, 7}, Extent{4, 9}, Extent{1, 6}}) {
    for (const Extent grid : {Extent{1, 1}, Extent{3, 2}, Extent{7, 7}, Extent{9, 4}}) {
      const size_t full_size = full.height * full.width * dim;
      const size_t grid_size = grid.height * grid.width * dim;
      const std::vector<double> x = randn<double>(full_size), y = randn<double>(grid_size);
      std::vector<double> scratch(grid.height * full.width * dim);

      std::vector<double> pooled(grid_size), pool_back(full_size);
      plane.pool(x.data(), dim, full, grid, pooled.data());
      plane.pool_transpose_add(y.data(), dim, full, grid, pool_back.data());
      expect(std::abs(dot(pooled, y) - dot(x, pool_back)) < 1e-9, name);

      for (const Upsampling upsampling : {Upsampling::kBicubic, Upsampling::kBilinear}) {
        std::vector<double> up(full_size), down(full_size), up_back(grid_size);
        plane.upsample(y.data(), dim, grid, full, upsampling, scratch.data(), up.data(),
                       down.data());
        plane.upsample_transpose(x.data(), dim, grid, full, upsampling, scratch.data(),
                                 up_back.data());
        expect(std::abs(dot(up, x) - dot(y, up_back)) < 1e-9, name);
        for (size_t i = 0; i < full_size; ++i) expect(up[i] == -down[i], name);
      }

      std::vector<double> first(full_size), back(full_size);
      plane.to_channels_last(x.data(), dim, full.height * full.width, first.data());
      plane.to_channels_first(first.data(), dim, full.height * full.width, back.data());
      expect(back == x, name);
    }
  }
}

// Keys' cubic kernel with A = -0.75 as a function of distance, not as four polynomials.
double cubic(double x) {
  const double a = -0.75;
  x = std::abs(x);
  if (x <= 1) return (a + 2) * x * x * x - (a + 3) * x * x + 1;
  if (x < 2) return a * x * x * x - 5 * a * x * x + 8 * a * x - 4 * a;
  return 0;
}

// Sides up to the longest, in arithmetic that has room to spare.
void test_long_sides() {
  const int sides[] = {1, 2, 3, 1000, kLargestSide - 1, kLargestSide};
  for (const int64_t input : sides) {
    for (const int64_t output : sides) {
      for (const int64_t o : {int64_t{0}, output / 3, output / 2, output - 1}) {
        const AreaBin bin =
            area_bin(static_cast<int>(o), static_cast<int>(input), static_cast<int>(output));
        expect(
            bin.begin == o * input / output && bin.end == ((o + 1) * input + output - 1) / output,
            "area bins of long sides");
        const Taps<double> taps =
            upsampling_taps<double>(static_cast<int>(o), static_cast<int>(input),
                                    static_cast<int>(output), Upsampling::kBilinear);
        // Twice the output times the source position, and the position below it.
        const int64_t doubled = (2 * o + 1) * input - output;
        const int64_t below = (doubled + 2 * output) / (2 * output) - 1;
        for (int k = 0; k < 4; ++k) {
          expect(taps.position[k] == std::clamp<int64_t>(below - 1 + k, 0, input - 1),
                 "tap positions of long sides");
        }
        const double t =
            static_cast<double>(doubled - below * 2 * output) / static_cast<double>(2 * output);
        expect(taps.weight[2] == t && taps.weight[1] == 1 - t, "tap weights of long sides");
      }
    }
  }
}

void test_geometry() {
  for (int input = 1; input <= 12; ++input) {
    for (int output = 1; output <= 12; ++output) {
      std::vector<std::vector<int>> owners(input);
      for (int o = 0; o < output; ++o) {
        const AreaBin bin = area_bin(o, input, output);
        expect(bin.begin == static_cast<int>(std::floor(1.0 * o * input / output)) &&
                   bin.end == static_cast<int>(std::ceil(1.0 * (o + 1) * input / output)),
               "area bins are those of adaptive pooling");
        for (int i = bin.begin; i < bin.end; ++i) owners[i].push_back(o);

        for (const Upsampling upsampling : {Upsampling::kBicubic, Upsampling::kBilinear}) {
          const Taps<double> taps = upsampling_taps<double>(o, input, output, upsampling);
          const double source = (o + 0.5) * input / output - 0.5;
          double sum = 0;
          for (int k = 0; k < 4; ++k) {
            const int position = static_cast<int>(std::floor(source + 1e-9)) - 1 + k;
            const double distance = source - position;
            const double weight = upsampling == Upsampling::kBicubic
                                      ? cubic(distance)
                                      : std::max(0.0, 1 - std::abs(distance));
            sum += taps.weight[k];
            expect(taps.position[k] == std::clamp(position, 0, input - 1), "tap positions");
            expect(std::abs(taps.weight[k] - weight) < 1e-7, "tap weights");
          }
          expect(std::abs(sum - 1) < 1e-12, "tap weights sum to one");
        }
      }
      for (int i = 0; i < input; ++i) {
        const AreaBin range = area_bins_of(i, input, output);
        expect(!owners[i].empty() && owners[i].front() == range.begin &&
                   owners[i].back() == range.end - 1,
               "area_bins_of is the transpose of area_bin");
      }
    }
  }
}

void test_executor() {
  for (const int workers : {1, 3}) {
    std::vector<std::atomic<int>> seen(1000);
    thread_executor(workers).for_each(1000, [&](int64_t i) { ++seen[i]; });
    expect(std::all_of(seen.begin(), seen.end(), [](const auto& n) { return n == 1; }),
           "every task runs once");
    thread_executor(workers).for_each(0, [&](int64_t) { expect(false, "no task, no call"); });
  }
}

}  // namespace

int run_all() {
  test_geometry();
  test_long_sides();
  test_executor();
  test_search();
  test_adjoints(portable_kernels().channels_double, "adjoints (portable)");
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    test_adjoints(avx2_kernels().channels_double, "adjoints (avx2)");
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
    test_adjoints(avx512_kernels().channels_double, "adjoints (avx512)");
  }
#endif
  if (failures == 0) std::printf("ok\n");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

int main() { return test::run(run_all); }
