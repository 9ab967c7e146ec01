// A searcher's codebook: which coarse scores it gets, and how it is packed for them.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "instruction_set.h"
#include "search.h"

namespace tokenflow::cpu {
namespace {

// Channels up to which sums of 8-bit products, and a bias beside them, stay within 32 bits.
constexpr int kMostInt8Channels = 32768;

// Normalised codes have a bias of float64's rounding, but for those without a length. So small a
// one is not worth counting.
constexpr double kLeastBias = 0x1p-40;

// Beside no more rows than this, packing the codes is a good part of a search.
constexpr int64_t kFewRows = 1024;

// Codes in a block. A block that may hold the nearest code is scanned row by row, at a third of the
// speed of scoring: beside few codes that is much, beside many it is the maxima of small blocks.
int block_codes(int64_t codes) { return codes < 4096 ? 64 : codes < 16384 ? 128 : kMostBlockCodes; }

// The fastest coarse scores of this machine.
const CoarseScoreKernels& fastest_coarse_score(int dim) {
#if defined(__x86_64__)
  const InstructionSet set = detect_instruction_set();
  if (set == InstructionSet::kAmx && bf16_coarse_score_amx()) return *bf16_coarse_score_amx();
  if (dim <= kMostInt8Channels) {
    if (set >= InstructionSet::kAvx512Vnni) return int8_coarse_score_avx512vnni();
    if (set == InstructionSet::kAvx2) return int8_coarse_score_avx2();
  }
#elif defined(__aarch64__)
  if (detect_instruction_set() == InstructionSet::kDotprod && dim <= kMostInt8Channels) {
    return int8_coarse_score_dotprod();
  }
#endif
  return kernels().coarse_score;
}

// Threads raise a maximum together.
void raise(std::atomic<double>& to, double value) {
  double seen = to.load();
  while (seen < value && !to.compare_exchange_weak(seen, value)) {
  }
}

// visit(d, value) for each channel of a code, normalised and times the square root of the weight.
template <typename Visit>
void each_weighted(const CodebookLayout& layout, const float* code, const Visit& visit) {
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const double scale =
        std::sqrt(layout.weight[g]) * inverse_norm(squared_norm(code, begin, end), layout.l2_norm);
    for (int d = begin; d < end; ++d) visit(d, static_cast<double>(code[d]) * scale);
  }
}

// The mean of up to kMeanCodes codes, normalised and times the square roots of the weights.
std::vector<double> mean_of_some(const CodebookLayout& layout, const float* codebook) {
  constexpr int64_t kMeanCodes = 1024;
  const int64_t count = std::min(layout.codes, kMeanCodes);
  std::vector<double> mean(layout.dim);
  for (int64_t i = 0; i < count; ++i) {
    each_weighted(layout, codebook + i * layout.codes / count * layout.dim,
                  [&](int d, double value) { mean[d] += value / count; });
  }
  return mean;
}

}  // namespace

Searcher<float>::Searcher(const CodebookLayout& layout, const float* codebook,
                          const Executor& executor, int64_t rows)
    : Searcher(layout, codebook, executor, Level::kPlain, rows) {}

Searcher<float>::Searcher(const CodebookLayout& layout, const float* codebook,
                          const Executor& executor, Level level, int64_t rows)
    : layout_(layout),
      codebook_(codebook),
      executor_(executor),
      block_codes_(block_codes(layout.codes)),
      level_(level),
      centre_(level == Level::kPlain ? std::vector<double>() : mean_of_some(layout, codebook)),
      is_kept_(level == Level::kPlain && rows <= kFewRows),
      packed_(packed_for(level == Level::kLast ? kernels().coarse_score
                                               : fastest_coarse_score(layout.dim))) {}

std::shared_ptr<const PackedCodebook> Searcher<float>::packed_for(
    const CoarseScoreKernels& coarse) const {
  if (!is_kept_) return pack(coarse);
  return PackedCodebooks::instance().get(layout_, codebook_, coarse, [&] { return pack(coarse); });
}

// A bound of the numbers among the codes, normalised, times the square root of the weight and less
// the centre.
double Searcher<float>::largest_entry() const {
  std::atomic<double> largest{0};
  if (!centre_.empty()) {
    executor_.for_ranges(layout_.codes, 2 * layout_.dim, [&](int64_t begin, int64_t end) {
      double most = 0;
      for (int64_t i = begin; i < end; ++i) {
        each_weighted(layout_, codebook_ + i * layout_.dim, [&](int d, double value) {
          most = std::max(most, std::abs(value - centre_[d]));
        });
      }
      raise(largest, most * (1 + 0x1p-40));  // packing may round otherwise
    });
    return largest;
  }
  bool same_weight = true;
  for (int g = 0; g < layout_.groups; ++g) {
    if (layout_.l2_norm) raise(largest, std::sqrt(layout_.weight[g]));
    same_weight &= layout_.weight[g] == layout_.weight[0];
  }
  if (layout_.l2_norm) return largest;
  const int64_t dim = layout_.dim;
  executor_.for_ranges(layout_.codes, dim, [&](int64_t begin, int64_t end) {
    if (same_weight) {
      const float most = kernels().largest_magnitude(codebook_ + begin * dim, (end - begin) * dim);
      raise(largest, static_cast<double>(most) * std::sqrt(layout_.weight[0]));
      return;
    }
    for (int g = 0; g < layout_.groups; ++g) {
      const int first = layout_.begin[g], count = layout_.begin[g + 1] - first;
      float most = 0;
      for (int64_t i = begin; i < end; ++i) {
        most = std::max(most, kernels().largest_magnitude(codebook_ + i * dim + first, count));
      }
      raise(largest, static_cast<double>(most) * std::sqrt(layout_.weight[g]));
    }
  });
  return largest;
}

std::shared_ptr<const PackedCodebook> Searcher<float>::pack(
    const CoarseScoreKernels& coarse) const {
  const int dim = layout_.dim, width = coarse.panel_width;
  const int64_t num_panels = ceil_div(layout_.codes, width);
  const size_t panel_bytes = coarse.panel_bytes(dim);
  PackedCodebook packed = {&coarse, allocate(num_panels * panel_bytes), panel_bytes, num_panels, {},
                           {}};
  int exponent = 0;
  const double largest = std::frexp(largest_entry(), &exponent);
  packed.bounds.scale = std::ldexp(1.0, -exponent);
  packed.bounds.step = coarse.step(largest);
  if (!centre_.empty()) {
    packed.centre = centre_;
    for (double& value : packed.centre) value *= packed.bounds.scale;
    packed.bounds.centre = packed.centre.data();
    const double square =
        std::inner_product(packed.centre.begin(), packed.centre.end(), packed.centre.begin(), 0.0);
    packed.bounds.centre_bias = centre_bias(square, layout_);
  }
  std::atomic<double> norm{0}, length{0}, error{0}, bias{0}, parts[kChunkSizes] = {};
  executor_.for_ranges(num_panels, int64_t{width} * dim, [&](int64_t begin, int64_t end) {
    CodeBounds bounds = packed.bounds;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * width;
      const int count = static_cast<int>(std::min<int64_t>(width, layout_.codes - first));
      coarse.pack_panel(codebook_ + first * dim, count, layout_,
                        packed.panels.get() + p * panel_bytes, &bounds);
    }
    raise(norm, bounds.norm);
    raise(length, bounds.length);
    raise(error, bounds.error);
    raise(bias, bounds.bias);
    for (int i = 0; i < kChunkSizes; ++i) raise(parts[i], bounds.parts[i]);
  });
  packed.bounds.norm = norm;
  packed.bounds.length = length;
  packed.bounds.error = error;
  packed.bounds.bias = bias;
  std::copy_n(parts, kChunkSizes, packed.bounds.parts);
  packed.bounds.has_bias = bias > kLeastBias;
  return std::make_shared<const PackedCodebook>(std::move(packed));
}

}  // namespace tokenflow::cpu
