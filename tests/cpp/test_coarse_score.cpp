// Every coarse score the machine can run, against scores in float64: they are within the margin
// that they claim, and the codes within it are found again.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"

namespace {

using namespace tokenflow;
using namespace tokenflow::cpu;

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

std::mt19937 generator(11);

// Gaussian rows whose lengths are spread over 10^(middle - decades) .. 10^(middle + decades).
std::vector<float> rows_of(int64_t count, int dim, double decades, double middle = 0) {
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> exponent(-decades, decades);
  std::vector<float> values(count * dim);
  for (int64_t n = 0; n < count; ++n) {
    const double length = std::pow(10.0, middle + exponent(generator));
    for (int d = 0; d < dim; ++d) {
      values[n * dim + d] = static_cast<float>(normal(generator) * length);
    }
  }
  return values;
}

// -1/2 the weighted distance, and what is the same for all codes taken out before it can cancel:
// sum_g w_g (<z_g, c_g> - |c_g|^2 / 2).
double score(const float* row, const float* code, const CodebookLayout& layout) {
  double total = 0;
  for (int g = 0; g < layout.groups; ++g) {
    double a = 0, b = 0, dot = 0;
    for (int d = layout.begin[g]; d < layout.begin[g + 1]; ++d) {
      a += static_cast<double>(row[d]) * row[d];
      b += static_cast<double>(code[d]) * code[d];
      dot += static_cast<double>(row[d]) * code[d];
    }
    const double x = layout.l2_norm ? std::max(std::sqrt(a), 1e-12) : 1;
    const double y = layout.l2_norm ? std::max(std::sqrt(b), 1e-12) : 1;
    total += layout.weight[g] * (dot / x / y - b / y / y / 2);
  }
  return total;
}

unsigned char* aligned(std::vector<unsigned char>& memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (kAlignment - address % kAlignment) % kAlignment;
}

struct Scorer {
  std::string name;
  const CoarseScoreKernels* kernels;
};

std::vector<Scorer> scorers() {
  std::vector<Scorer> all = {{"portable", &portable_kernels().coarse_score}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    all.push_back({"avx2", &avx2_kernels().coarse_score});
    all.push_back({"int8 avx2", &int8_coarse_score_avx2()});
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
    all.push_back({"avx512", &avx512_kernels().coarse_score});
    if (__builtin_cpu_supports("avx512vnni")) {
      all.push_back({"int8 avx512vnni", &int8_coarse_score_avx512vnni()});
    }
    if (detect_instruction_set() == InstructionSet::kAmx && bf16_coarse_score_amx()) {
      all.push_back({"bf16 amx", bf16_coarse_score_amx()});
    }
  }
#elif defined(__aarch64__)
  if (detect_instruction_set() == InstructionSet::kDotprod) {
    all.push_back({"int8 dotprod", &int8_coarse_score_dotprod()});
  }
#endif
  return all;
}

void test_scorer(const Scorer& scorer, const CodebookLayout& layout,
                 const std::vector<float>& codebook, const std::vector<float>& rows,
                 const std::string& name, bool has_bias = true, double centre_size = 0) {
  const CoarseScoreKernels& coarse = *scorer.kernels;
  const int dim = layout.dim, width = coarse.panel_width;
  const int count = static_cast<int>(rows.size()) / dim;
  const std::string where = scorer.name + ", " + name;

  // Each code fills a panel of its own, so that a block's maximum is its score.
  double largest = 0;
  for (int g = 0; g < layout.groups; ++g) {
    const double root = std::sqrt(layout.weight[g]);
    if (layout.l2_norm) largest = std::max(largest, root);
    for (int64_t i = 0; i < layout.codes && !layout.l2_norm; ++i) {
      for (int d = layout.begin[g]; d < layout.begin[g + 1]; ++d) {
        largest = std::max(largest, std::abs(static_cast<double>(codebook[i * dim + d])) * root);
      }
    }
  }
  const size_t panel_bytes = coarse.panel_bytes(dim);
  std::vector<unsigned char> memory(layout.codes * panel_bytes + kAlignment);
  unsigned char* panels = aligned(memory);
  int exponent = 0;
  const double below_one = std::frexp(largest, &exponent);
  const double step = coarse.step(below_one + centre_size);
  CodeBounds bounds = {std::ldexp(1.0, -exponent), step, 0, 0, 0, true};
  // What is taken away need not be the middle of anything.
  std::uniform_real_distribution<double> uniform(-centre_size, centre_size);
  std::vector<double> centre(dim);
  for (double& value : centre) value = uniform(generator);
  if (centre_size > 0) {
    bounds.centre = centre.data();
    bounds.centre_bias = uniform(generator);
  }
  for (int64_t i = 0; i < layout.codes; ++i) {
    coarse.pack_panel(&codebook[i * dim], 1, layout, panels + i * panel_bytes, &bounds);
  }
  bounds.has_bias = has_bias;
  std::vector<unsigned char> tile_memory(coarse.tile_rows * coarse.row_bytes(dim) + kAlignment);
  unsigned char* tile = aligned(tile_memory);
  std::vector<RowScale> scales(coarse.tile_rows);

  for (int first = 0; first < count; first += coarse.tile_rows) {
    const int some = std::min(coarse.tile_rows, count - first);
    coarse.pack_tile(rows.data() + first * dim, some, layout, bounds, tile, scales.data());
    std::vector<float> scores(some * layout.codes);
    if (coarse.begin) coarse.begin(dim);
    for (int64_t i = 0; i < layout.codes; ++i) {
      coarse.score_tile(tile, some, dim, scales.data(), has_bias, panels + i * panel_bytes, 1,
                        scores.data() + i, layout.codes);
    }
    if (coarse.end) coarse.end();
    for (int r = 0; r < some; ++r) {
      // Whatever is added to all scores of a row alike does not matter.
      double low = std::numeric_limits<double>::infinity(), high = -low;
      for (int64_t i = 0; i < layout.codes; ++i) {
        const double exact = score(&rows[(first + r) * dim], &codebook[i * dim], layout);
        const double unit = bounds.scale * bounds.scale * scales[r].bias_scale;
        const double error = scores[r * layout.codes + i] - exact * unit;
        low = std::min(low, error);
        high = std::max(high, error);
      }
      const bool compares_all = std::isinf(scales[r].margin);
      expect(compares_all || high - low <= scales[r].margin,
             where + ": scores are off by more than the margin");
      expect(scales[r].margin >= 0, where + ": a margin");
      if (compares_all) continue;

      // A scan finds, in order, the codes whose score reaches the threshold. Integers beyond 2^24
      // are rounded where they are kept as maxima, and bfloat16 is summed in another order.
      const float* mine = &scores[r * layout.codes];
      std::vector<float> sorted(mine, mine + layout.codes);
      std::sort(sorted.begin(), sorted.end());
      const float threshold = sorted[layout.codes / 2];
      const float largest = std::max(std::abs(sorted.front()), std::abs(sorted.back()));
      const float slack = scorer.name == "bf16 amx" ? scales[r].margin
                          : largest < 0x1p24f       ? 0.0f
                                                    : largest * 0x1p-23f;
      const int64_t block = std::min<int64_t>(layout.codes, kMostBlockCodes / width);
      int codes[kMostBlockCodes];
      const int found = coarse.scan_block(tile, some, r, dim, scales.data(), has_bias, panels,
                                          block, threshold, codes);
      bool ok = std::is_sorted(codes, codes + found);
      for (int i = 0; i < block * width; ++i) {
        const bool is_found = std::binary_search(codes, codes + found, i);
        ok = ok && (is_found ? mine[i / width] >= threshold - slack
                             : mine[i / width] < threshold + slack);
      }
      expect(ok, where + ": scan_block");
    }
  }
}

// A panel of few codes is one whose last codes are copies, and a maximum is over all of it.
void test_partial_panel(const Scorer& scorer) {
  const CoarseScoreKernels& coarse = *scorer.kernels;
  for (const int dim : {1, 7, 40, 129}) {
    const CodebookLayout layout = test::make_layout(coarse.panel_width, {dim}, false, {1.0});
    const std::vector<float> codes = rows_of(coarse.panel_width, dim, 0), row = rows_of(1, dim, 0);
    const size_t bytes = coarse.panel_bytes(dim);
    for (const int count : {1, 2, coarse.panel_width - 1, coarse.panel_width}) {
      std::vector<unsigned char> memory((coarse.panel_width + 1) * bytes + kAlignment);
      unsigned char* panels = aligned(memory);
      CodeBounds bounds = {0x1p-4, coarse.step(1.0), 0, 0, 0, true};
      coarse.pack_panel(codes.data(), count, layout, panels, &bounds);
      CodeBounds alone = bounds;
      for (int i = 0; i < count; ++i) {
        coarse.pack_panel(&codes[i * dim], 1, layout, panels + (i + 1) * bytes, &alone);
      }
      expect(alone.norm == bounds.norm && alone.error == bounds.error && alone.bias == bounds.bias,
             scorer.name + ": bounds cover every code of a panel");
      std::vector<unsigned char> tile_memory(coarse.tile_rows * coarse.row_bytes(dim) + kAlignment);
      std::vector<RowScale> scales(1);
      coarse.pack_tile(row.data(), 1, layout, bounds, aligned(tile_memory), scales.data());
      std::vector<float> maxima(count + 1);
      if (coarse.begin) coarse.begin(dim);
      for (int i = 0; i <= count; ++i) {
        coarse.score_tile(aligned(tile_memory), 1, dim, scales.data(), true, panels + i * bytes, 1,
                          &maxima[i], 1);
      }
      if (coarse.end) coarse.end();
      expect(maxima[0] == *std::max_element(maxima.begin() + 1, maxima.end()),
             scorer.name + ": a panel of " + std::to_string(count) + " codes");
    }
  }
}

void test_near_blocks(const KernelTable& table, const std::string& name) {
  std::normal_distribution<float> normal;
  for (const int count : {1, 3, 16, 17, 40, 129}) {
    std::vector<float> maxima(count);
    for (float& m : maxima) m = normal(generator);
    for (const float margin : {0.0f, 0.5f, 100.0f}) {
      const float threshold = *std::max_element(maxima.begin(), maxima.end()) - margin;
      std::vector<int> expected, blocks(count);
      for (int b = 0; b < count; ++b) {
        if (maxima[b] >= threshold) expected.push_back(b);
      }
      float got;
      blocks.resize(table.near_blocks(maxima.data(), count, margin, blocks.data(), &got));
      expect(blocks == expected && got == threshold, name + ": near_blocks");
    }
    std::vector<int> blocks(count);
    float threshold = 0;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    expect(table.near_blocks(maxima.data(), count, nan, blocks.data(), &threshold) == 0 &&
               std::isnan(threshold),
           name + ": a margin that is not a number");
  }
}

void test_scores(const KernelTable& table, const std::string& name) {
  for (const std::vector<int>& dims : {std::vector<int>{1}, {32, 8}, {3, 2, 1}, {17}, {70, 5}}) {
    for (const bool l2_norm : {true, false}) {
      const std::vector<double> weights = {1.0, 0.25, 3.0};
      const CodebookLayout layout = test::make_layout(50, dims, l2_norm, weights);
      const std::vector<float> codebook = rows_of(50, layout.dim, 2);
      const std::vector<float> row = rows_of(1, layout.dim, 2);
      std::vector<double> unit(layout.dim), scores(3);
      for (int g = 0; g < layout.groups; ++g) {
        double squared = 0;
        for (int d = layout.begin[g]; d < layout.begin[g + 1]; ++d) {
          squared += static_cast<double>(row[d]) * row[d];
        }
        for (int d = layout.begin[g]; d < layout.begin[g + 1]; ++d) {
          unit[d] = row[d] / (l2_norm ? std::sqrt(squared) : 1);
        }
      }
      const int64_t codes[] = {49, 0, 7};
      table.scores(unit.data(), codebook.data(), layout, codes, 3, scores.data());
      for (int i = 1; i < 3; ++i) {  // up to what is the same for all codes
        const double exact = score(row.data(), &codebook[codes[i] * layout.dim], layout) -
                             score(row.data(), &codebook[codes[0] * layout.dim], layout);
        expect(std::abs(scores[i] - scores[0] - exact) <= 1e-11 * (1 + std::abs(exact)),
               name + ": scores");
      }
    }
  }
}

}  // namespace

int main() {
  const std::vector<std::pair<std::vector<int>, std::vector<double>>> groups = {
      {{1}, {1.0}},           {{32, 8}, {1.0, 1.0}},   {{5, 3, 2}, {1.0, 0.25, 3.0}},
      {{17}, {2.0}},          {{70, 5}, {0.5, 4.0}},   {{3, 4}, {1.0, 0.0}},
      {{64, 64}, {1.0, 1.0}}, {{256, 44}, {1.0, 2.0}},
  };
  for (const Scorer& scorer : scorers()) {
    test_partial_panel(scorer);
    for (const auto& [dims, weights] : groups) {
      for (const bool l2_norm : {true, false}) {
        const CodebookLayout layout = test::make_layout(40, dims, l2_norm, weights);
        const int dim = layout.dim;
        const std::string name =
            std::to_string(dim) + " channels" + (l2_norm ? ", unit groups" : "");
        test_scorer(scorer, layout, rows_of(40, dim, 0),
                    rows_of(2 * scorer.kernels->tile_rows + 1, dim, 0), name);
        test_scorer(scorer, layout, rows_of(40, dim, 3), rows_of(30, dim, 6),
                    name + ", many lengths");
        test_scorer(scorer, layout, rows_of(40, dim, 0), rows_of(30, dim, 3),
                    name + ", biases left out", false);
        test_scorer(scorer, layout, rows_of(40, dim, 1), rows_of(30, dim, 1), name + ", a centre",
                    true, 0.3);
        for (const double codes : {-44, -30, -20, -12, 12, 20, 37}) {
          const std::string size = ", codes of 10^" + std::to_string(static_cast<int>(codes));
          const std::vector<float> some = rows_of(40, dim, 0.3, codes);
          test_scorer(scorer, layout, some, rows_of(30, dim, 0.3, codes), name + size);
          test_scorer(scorer, layout, some, rows_of(30, dim, 40, -5), name + size + ", any rows");
        }
        test_scorer(scorer, layout, rows_of(40, dim, 40, -5), rows_of(30, dim, 40, -5),
                    name + ", any codes, any rows");
        std::vector<float> codebook = rows_of(40, dim, 0), rows = rows_of(3, dim, 0);
        std::fill_n(&codebook[7 * dim], dim, 0.0f);
        std::fill_n(&rows[dim], dim, 0.0f);
        std::fill_n(&rows[2 * dim], dim, 1e-20f);
        test_scorer(scorer, layout, codebook, rows, name + ", rows and codes of zeros");
        test_scorer(scorer, layout, std::vector<float>(40 * dim, 0.0f), rows,
                    name + ", zeros alone");
        // All of the rounding on one side: numbers just below half a step.
        std::vector<float> halves(40 * dim), half_rows(5 * dim);
        for (size_t i = 0; i < halves.size(); ++i) halves[i] = i % dim == 0 ? 127.0f : 3.499f;
        for (size_t i = 0; i < half_rows.size(); ++i) half_rows[i] = i % dim == 0 ? 63.0f : 5.499f;
        for (int i = 0; i < 20; ++i) halves[i * dim] *= -1;
        test_scorer(scorer, layout, halves, half_rows, name + ", rounding to one side");
        // The longest sums: every channel as large as the largest, and rows along codes.
        std::vector<float> flat(40 * dim);
        for (float& value : flat) value = generator() % 2 ? 1.0f : -1.0f;
        std::fill_n(flat.begin(), dim, 1.0f);
        std::fill_n(flat.begin() + dim, dim, -1.0f);
        test_scorer(scorer, layout, flat, flat, name + ", equal magnitudes");
        test_scorer(scorer, layout, flat, rows_of(30, dim, 0),
                    name + ", codes of equal magnitudes");
      }
    }
  }
  test_near_blocks(portable_kernels(), "portable");
  test_scores(portable_kernels(), "portable");
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    test_near_blocks(avx2_kernels(), "avx2");
    test_scores(avx2_kernels(), "avx2");
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
    test_near_blocks(avx512_kernels(), "avx512");
    test_scores(avx512_kernels(), "avx512");
  }
#endif
  if (failures == 0) std::printf("ok\n");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
