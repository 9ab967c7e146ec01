// segment_sum against a loop in float64.
#include <algorithm>

#include "support.h"

using namespace test;
using namespace tokenflow;

namespace {

void check(const std::string& what, int64_t codes, int dim, const Indices& indices) {
  const int64_t num_rows = static_cast<int64_t>(indices.size());
  const std::string name = what + ": " + std::to_string(num_rows) + " rows of " +
                           std::to_string(dim) + " to " + std::to_string(codes) + " codes";
  const Floats rows = random_floats(num_rows * dim, 1);

  Vector wanted(static_cast<size_t>(codes * dim));
  Indices wanted_counts(static_cast<size_t>(codes));
  for (int64_t n = 0; n < num_rows; ++n) {
    if (indices[n] < 0 || indices[n] >= codes) continue;
    ++wanted_counts[indices[n]];
    for (int d = 0; d < dim; ++d) wanted[indices[n] * dim + d] += rows[n * dim + d];
  }
  Floats first;
  int poison = 0;  // also a key: what the sort leaves unwritten must not be taken for a pair
  in_every_order([&](const char*) {
    Floats sums = poisoned<float>(codes * dim);
    Indices counts = poisoned<int64_t>(codes);
    SegmentSumArgs<float> args = {};
    args.codes = codes;
    args.dim = dim;
    args.num_rows = num_rows;
    args.rows = rows.data();
    args.indices = indices.data();
    args.sums = sums.data();
    args.counts = counts.data();
    poison = 0xff - poison;
    CHECK(run(args, cuda::segment_sum_workspace_bytes, cuda::launch_segment_sum, poison) ==
              cudaSuccess,
          "launch");
    CHECK(counts == wanted_counts, "%s: counts", name.c_str());
    if (first.empty()) first = sums;
    CHECK(same_bits(sums, first), "%s: other bits in another order", name.c_str());
    check_close(sums, wanted, 1e-7, name);
  });
}

// Indices from `lowest` to `highest`, both included.
void check(int64_t codes, int dim, int64_t num_rows, int64_t lowest, int64_t highest) {
  Indices indices(static_cast<size_t>(num_rows));
  std::mt19937_64 generator(2);
  std::uniform_int_distribution<int64_t> pick(lowest, highest);
  for (int64_t& index : indices) index = pick(generator);
  check("random", codes, dim, indices);
}

// Code i has counts[i] rows, in shuffled order with `missing` rows that name no code.
void check_counts(const std::string& what, int dim, const std::vector<int>& counts, int missing) {
  Indices indices(static_cast<size_t>(missing), -1);
  for (size_t i = 0; i < counts.size(); ++i) {
    indices.insert(indices.end(), static_cast<size_t>(counts[i]), static_cast<int64_t>(i));
  }
  std::shuffle(indices.begin(), indices.end(), std::mt19937(3));
  check(what, static_cast<int64_t>(counts.size()), dim, indices);
}

}  // namespace

int main() {
  check(7, 5, 0, 0, 6);
  check(1, 1, 1, 0, 0);
  check(5, 3, 1, -1, -1);
  check(20, 33, 700, -3, 24);         // indices that name no code; more columns than lanes
  check(300, 4, 4500, 0, 299);        // two digits, several tiles
  check(256, 2, 2049, 0, 256);        // the largest number of codes of one digit
  check(257, 2, 2049, 250, 256);      // the smallest that needs two
  check(65536, 1, 90, 65500, 65536);  // the largest of two
  check(300, 1, 70000, -5, 299);      // tiles of several rounds

  check_counts("hardly any", 2, {3}, 40);
  check_counts("hardly any of two digits", 2, std::vector<int>(300, 1), 40);

  // Long segments are summed by the blocks of the chunks of 256 pairs that they reach into.
  check_counts("one long code", 40, {0, 2300, 0}, 0);
  check_counts("just long", 3, {255, 257, 256, 300}, 40);
  check_counts("two in a chunk", 70, {10, 400, 3, 270, 700}, 5);
  check_counts("neighbours", 5, {300, 300, 2000, 300, 257}, 0);
  check_counts("whole chunks", 5, {256, 512, 512, 256, 1024}, 700);

  // Far outside the range.
  check(4, 2, 40, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max());

  check(4, 2, 40, (int64_t{1} << 32) - 1, (int64_t{1} << 32) + 3);  // a code in 32 bits
  check(4, 2, 40, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::min() + 3);

  SegmentSumArgs<float> args = {};
  args.num_rows = 4;
  CHECK(cuda::launch_segment_sum(args, nullptr, nullptr) == cudaErrorInvalidValue, "no codes");
  return 0;
}
