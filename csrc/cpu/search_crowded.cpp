// The rows that so many codes come near to that comparing them would take longer than all the rest.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <utility>

#include "search.h"

namespace tokenflow::cpu {
namespace {

// Codes whose lengths are within a factor of 8 are a class, and so many of one are compared without
// a search.
constexpr int kClassOctaves = 3;
constexpr size_t kFewCodes = 16;

// Ascending numbers of the codes that equal none before them: the others are never the nearest.
std::vector<int64_t> different_codes(const float* codebook, int64_t codes, int dim) {
  std::vector<int64_t> table(size_t{2} << (64 - __builtin_clzll(codes)), -1), numbers;
  for (int64_t i = 0; i < codes; ++i) {
    const float* code = codebook + i * dim;
    uint64_t hash = 0;
    for (int d = 0; d < dim; ++d) {
      const float value = code[d] + 0.0f;  // -0 is 0
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
    for (size_t at = hash & (table.size() - 1);; at = (at + 1) & (table.size() - 1)) {
      if (table[at] < 0) {
        table[at] = i;
        numbers.push_back(i);
        break;
      }
      if (std::equal(code, code + dim, codebook + table[at] * dim)) break;
    }
  }
  return numbers;
}

}  // namespace

Searcher<float>::~Searcher() = default;

// The rows whose index is not known yet.
void Searcher<float>::search_crowded(const float* rows, int64_t num_rows, int64_t* indices) {
  const int dim = layout_.dim;
  std::vector<int64_t> numbers;
  std::vector<float> crowded;
  for (int64_t n = 0; n < num_rows; ++n) {
    if (indices[n] == kZeroRow) {
      if (nearest_to_zero_ < 0) nearest_to_zero_ = nearest_to_zero();
      indices[n] = nearest_to_zero_;
    }
    if (indices[n] != kCrowded) continue;
    const float* row = rows + n * dim;
    numbers.push_back(n);
    crowded.insert(crowded.end(), row, row + dim);
  }
  if (numbers.empty()) return;
  if (classes_.empty()) set_classes();
  const auto count = static_cast<int64_t>(numbers.size());
  std::vector<std::vector<int64_t>> found(classes_.size());
  for (size_t c = 0; c < classes_.size(); ++c) {
    found[c].resize(count);
    classes_[c]->searcher->search(crowded.data(), count, found[c].data());
  }
  executor_.for_ranges(count, 64 * dim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::vector<int64_t> candidates = few_;
      for (size_t c = 0; c < classes_.size(); ++c) {
        candidates.push_back(classes_[c]->numbers[found[c][i]]);
      }
      std::sort(candidates.begin(), candidates.end());
      indices[numbers[i]] =
          candidates.size() == 1 ? candidates[0] : nearest_of(crowded.data() + i * dim, candidates);
    }
  });
}

int64_t Searcher<float>::codes_compared() const {
  int64_t compared = codes_compared_;
  for (const auto& one : classes_) compared += one->searcher->codes_compared();
  return compared;
}

void Searcher<float>::set_classes() {
  const int dim = layout_.dim;
  std::map<int, std::vector<int64_t>> by_length;
  if (level_ == Level::kCentred) {
    by_length[0].resize(layout_.codes);
    std::iota(by_length[0].begin(), by_length[0].end(), 0);
  } else {
    for (const int64_t i : different_codes(codebook_, layout_.codes, dim)) {
      double squared = 0;
      for (int g = 0; g < layout_.groups && !layout_.l2_norm; ++g) {
        squared += layout_.weight[g] *
                   squared_norm(codebook_ + i * dim, layout_.begin[g], layout_.begin[g + 1]);
      }
      const int exponent = squared > 0 ? std::ilogb(squared) : -2048;
      by_length[(exponent + 2048) / (2 * kClassOctaves)].push_back(i);
    }
  }
  for (auto& [length, numbers] : by_length) {
    if (by_length.size() > 1 && numbers.size() <= kFewCodes) {
      few_.insert(few_.end(), numbers.begin(), numbers.end());
      continue;
    }
    auto one = std::make_unique<Class>();
    one->numbers = std::move(numbers);
    one->layout = layout_;
    one->layout.codes = static_cast<int64_t>(one->numbers.size());
    one->codes.reserve(one->numbers.size() * dim);
    for (const int64_t i : one->numbers) {
      one->codes.insert(one->codes.end(), codebook_ + i * dim, codebook_ + (i + 1) * dim);
    }
    one->searcher.reset(new Searcher(one->layout, one->codes.data(), executor_,
                                     level_ == Level::kPlain ? Level::kCentred : Level::kLast, 0));
    classes_.push_back(std::move(one));
  }
}

// A row of zeros is as far from all codes of unit length, but for rounding.
int64_t Searcher<float>::nearest_to_zero() const {
  if (layout_.metric == Metric::kDot) return 0;  // all tie
  const std::vector<float> zeros(layout_.dim);
  std::vector<double> distances(layout_.codes);
  executor_.for_ranges(layout_.codes, 8 * layout_.dim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      distances[i] = distance(zeros.data(), codebook_ + i * layout_.dim, layout_);
    }
  });
  return std::min_element(distances.begin(), distances.end()) - distances.begin();
}

}  // namespace tokenflow::cpu
