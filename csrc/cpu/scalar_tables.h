// Tables of scalar quantization, made wide.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "../common/scalar_args.h"

namespace tokenflow::cpu {

// Rows are seldom wide: several are one for the inner loops, with the tables as often. So many that
// they are whole vectors, and 64 channels or more.
inline int rows_together(int dim, int64_t lines) {
  constexpr int kWidth = 64, kVector = 16, kMostEntries = 1 << 16;
  if (dim >= kWidth) return 1;
  const int whole = kVector / std::gcd(kVector, dim);
  const int together = (kWidth + whole * dim - 1) / (whole * dim) * whole;
  return lines * together * dim > kMostEntries ? 1 : together;
}

// A table [lines, dim] as [lines, together * dim], every line so many times side by side.
template <typename T>
std::vector<T> side_by_side(const T* table, int64_t lines, int dim, int together) {
  std::vector<T> wide;
  if (!table) return wide;
  wide.reserve(lines * together * dim);
  for (int64_t i = 0; i < lines * together; ++i) {
    const T* line = table + i / together * dim;
    wide.insert(wide.end(), line, line + dim);
  }
  return wide;
}

// Thresholds, values and curves of several rows side by side.
template <typename T>
class WideTables {
 public:
  WideTables(const ScalarTables<T>& tables, int rounds, int thresholds, int dim)
      : count_(thresholds),
        together_(rows_together(dim, int64_t{rounds} * (2 * thresholds + 1 + kCurveParts))),
        width_(together_ * dim),
        thresholds_(side_by_side(tables.thresholds, int64_t{rounds} * count_, dim, together_)),
        values_(side_by_side(tables.values, int64_t{rounds} * (count_ + 1), dim, together_)),
        curves_(side_by_side(tables.curves, int64_t{rounds} * kCurveParts, dim, together_)) {}

  int together() const { return together_; }
  int width() const { return width_; }

  // Of one round.
  const T* thresholds(int64_t round) const { return thresholds_.data() + round * count_ * width_; }
  const T* values(int64_t round) const { return values_.data() + round * (count_ + 1) * width_; }
  const T* curves(int64_t round) const {
    return curves_.empty() ? nullptr : curves_.data() + round * kCurveParts * width_;
  }

 private:
  int count_, together_, width_;
  std::vector<T> thresholds_, values_, curves_;
};

}  // namespace tokenflow::cpu
