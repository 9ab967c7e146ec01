// Sums of 8-bit products in 16 bits, for processors that multiply pairs of bytes into 16 bits and
// would take as long to widen every pair as to multiply it. Internal linkage, as in packing.h.
//
// A chunk is some quads of channels. Its products with a code are summed in two parts: channels 0,
// 1, 4, 5, ... and channels 2, 3, 6, 7, ... A part starts from -128 sum Z, which takes back the 128
// that is added to every code. Sums wrap around on the way, and the last is exact all the same: it
// is <Z, C> of the part, and |<Z, C>| <= |Z| |C| < 2^15. The codebook decides how long a chunk is,
// so that this holds for rows that are spread like uniform numbers, and a flatter row gets a
// coarser step. Chunks of two quads hold any: 4 * 63 * 127 < 2^15.
#pragma once

#include "packing.h"

namespace tokenflow::cpu {
namespace {

constexpr int kShortestChunk = 2;  // quads
static_assert(kShortestChunk << kChunkSizes == kChunk / 4, "a chunk of packing holds whole chunks");

// The quads of the chunk that CodeBounds::parts[i] is of.
static constexpr int chunk_size(int i) { return kShortestChunk << (i + 1); }

// Less than 2^15 by what the bounds below are rounded by.
constexpr double kLargestSum = (1 << 15) - 2;

// The longer of a chunk's two parts, squared, from its squares by channel modulo kHalfLanes.
static inline double longer_part(Doubles squares) {
  double parts[2] = {};
  for (int i = 0; i < kHalfLanes; ++i) parts[i / 2 % 2] += squares[i];
  return larger(parts[0], parts[1]);
}

// The squared lengths of the parts of chunks of a given number of quads: the largest.
class LongestPart {
 public:
  explicit LongestPart(int quads) : vectors_(quads * 4 / kHalfLanes) {}

  // The squares of the next kHalfLanes channels.
  void count(Doubles squares) {
    sum_ += squares;
    if (++counted_ == vectors_) end();
  }
  double squared() {
    end();
    return largest_;
  }

 private:
  void end() {
    largest_ = larger(largest_, longer_part(sum_));
    sum_ = Doubles{};
    counted_ = 0;
  }

  int vectors_, counted_ = 0;
  Doubles sum_ = {};
  double largest_ = 0;
};

// A chunk for rows of some quads of numbers up to `levels`.
struct ChunkChoice {
  int quads = kShortestChunk;
  double part = 0;  // CodeBounds::parts of it; of the shortest chunk, which holds any row, 0

  ChunkChoice(const CodeBounds& bounds, int row_quads, int levels) {
    for (int i = kChunkSizes - 1; i >= 0 && quads == kShortestChunk; --i) {
      const int channels = 2 * (chunk_size(i) < row_quads ? chunk_size(i) : row_quads);
      const double uniform = channels * levels * levels / 3.0;
      if (bounds.parts[i] * uniform > kLargestSum * kLargestSum) continue;
      quads = chunk_size(i);
      part = bounds.parts[i];
    }
  }

  // The least step of a row whose longest part, squared, is `row_part`. Rounding adds at most half
  // a step a channel to its length.
  double least_step(double row_part) const {
    const double rounding = __builtin_sqrt(2.0 * quads) / 2;
    return part > 0 ? __builtin_sqrt(row_part) / (kLargestSum / __builtin_sqrt(part) - rounding)
                    : 0;
  }
};

}  // namespace
}  // namespace tokenflow::cpu
