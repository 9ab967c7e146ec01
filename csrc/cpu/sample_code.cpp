#include "sample_code.h"

#include <cmath>
#include <limits>
#include <vector>

namespace tokenflow::cpu {
namespace {

// Rows that share a pass over the codebook, codes that are scaled together for them, and rows whose
// scores are in registers. All in float64, compiled once: the same bits on every machine.
constexpr int kRows = 64;
constexpr int kCodes = 64;
constexpr int kTileRows = 4;
static_assert(kCodes % kGumbelCodes == 0, "a group of codes has one block of random words");

// A vector of float64, normalised by groups and times the square roots of the weights, into every
// `stride`-th position of `out`; returns whether it is finite.
template <typename T>
bool scale_vector(const T* vector, const CodebookLayout& layout, double* out, int stride) {
  double total = 0;
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const double squared = squared_norm(vector, begin, end);
    const double scale = channel_scale(squared, layout.weight[g], layout.l2_norm);
    total += squared;
    for (int d = begin; d < end; ++d) out[d * stride] = static_cast<double>(vector[d]) * scale;
  }
  return std::isfinite(total);
}

// sums[r][c] over channels of (z_r - c_c)^2 or z_r c_c. rows [dim][kTileRows], codes [dim][kCodes].
template <bool kDot>
void sum_channels(const double* rows, const double* codes, int dim,
                  double (&sums)[kTileRows][kGumbelCodes]) {
  double total[kTileRows][kGumbelCodes] = {};
  for (int d = 0; d < dim; ++d, rows += kTileRows, codes += kCodes) {
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < kGumbelCodes; ++c) {
        const double other = kDot ? codes[c] : rows[r] - codes[c];
        total[r][c] += kDot ? rows[r] * other : other * other;
      }
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int c = 0; c < kGumbelCodes; ++c) sums[r][c] = total[r][c];
  }
}

}  // namespace

template <typename T>
void sample_code(const SampleCodeArgs<T>& args, const Executor& executor) {
  const CodebookLayout& layout = args.layout;
  const int dim = layout.dim;
  // Without noise the root, which makes equal what is not, decides nothing.
  const bool noisy = args.temperature > 0;
  const Metric metric = !noisy && layout.metric == Metric::kL2 ? Metric::kSquaredL2 : layout.metric;
  double bounds[33];
  for (int i = 0; i <= 32; ++i) bounds[i] = args.temperature * gumbel_bound(i);

  executor.for_each(ceil_div(args.num_rows, kRows), [&](int64_t task) {
    const int64_t first_row = task * kRows;
    const int count = static_cast<int>(std::min<int64_t>(kRows, args.num_rows - first_row));
    thread_local std::vector<double> rows, codes;
    rows.assign(static_cast<size_t>(kRows) * dim, 0.0);
    codes.assign(static_cast<size_t>(kCodes) * dim, 0.0);
    bool finite[kRows];
    GumbelChoice best[kRows];
    uint64_t seeds[kRows], positions[kRows];
    for (int r = 0; r < count; ++r) {
      const int64_t n = first_row + r;
      double* tile = rows.data() + static_cast<int64_t>(r / kTileRows) * kTileRows * dim;
      finite[r] = scale_vector(args.rows + n * dim, layout, tile + r % kTileRows, kTileRows);
      best[r] = {-std::numeric_limits<double>::infinity(), 0};
      seeds[r] = static_cast<uint64_t>(value_at(args.seed, n));
      positions[r] = stream_position(args.seed, args.offset, n);
    }
    for (int64_t first = 0; first < layout.codes; first += kCodes) {
      const int some = static_cast<int>(std::min<int64_t>(kCodes, layout.codes - first));
      for (int c = 0; c < some; ++c) {
        scale_vector(args.codebook + (first + c) * dim, layout, codes.data() + c, kCodes);
      }
      for (int t = 0; t < count; t += kTileRows) {
        const double* tile = rows.data() + static_cast<int64_t>(t) * dim;
        for (int c = 0; c < some; c += kGumbelCodes) {
          double sums[kTileRows][kGumbelCodes];
          if (metric == Metric::kDot) {
            sum_channels<true>(tile, codes.data() + c, dim, sums);
          } else {
            sum_channels<false>(tile, codes.data() + c, dim, sums);
          }
          for (int r = t; r < std::min(count, t + kTileRows); ++r) {
            PhiloxBlock random = {};
            if (noisy) random = gumbel_words(seeds[r], positions[r], (first + c) / kGumbelCodes);
            for (int i = 0; i < kGumbelCodes && c + i < some; ++i) {
              double value = score_of(sums[r - t][i], metric);
              if (noisy) {
                const uint32_t word = random.word[i], complement = ~word;
                const int zeros = complement ? __builtin_clz(complement) : 32;
                if (!(value + bounds[zeros] >= best[r].value)) continue;
                value += args.temperature * gumbel(word);
              }
              if (value > best[r].value) best[r] = {value, first + c + i};
            }
          }
        }
      }
    }
    for (int r = 0; r < count; ++r) args.indices[first_row + r] = finite[r] ? best[r].index : 0;
  });
}

template void sample_code<float>(const SampleCodeArgs<float>&, const Executor&);
template void sample_code<double>(const SampleCodeArgs<double>&, const Executor&);

}  // namespace tokenflow::cpu
