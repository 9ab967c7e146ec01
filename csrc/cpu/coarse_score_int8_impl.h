// Body of coarse_score_int8_avx2.cpp, coarse_score_int8_avx512vnni.cpp and
// coarse_score_int8_dotprod.cpp: coarse scores in 8-bit integers.
// TOKENFLOW_COARSE_SCORE_KERNELS names the function that the including file defines. Internal
// linkage, as in kernels_impl.h.
//
// Rows z and codes c, normalised and each scaled by the square root of the weight, are rounded to
// integers Z and C with z = a Z + e, c = b C + f: a is the row's own step, b the codebook's. Then
//
//   <z, c> - a b <Z, C> = <e, c> + <a Z, f>   and   |<z, c> - a b <Z, C>| <= |e| |c| + |a Z| |f|
//
// where the integer sum is exact. |e| and |a Z| are measured for every row, max |c| and max |f|
// over the codes, so the bound follows what rounding really did. The bias, if any code has one that
// matters, is rounded to units of a b. On x86 codes are stored with 128 added, as unsigned bytes,
// which is what the instructions multiply with signed ones; it adds 128 sum Z to every score of a
// row alike.
// On AVX2 products are summed in 16 bits first (narrow_sums.h).
#include <cstdint>
#include <cstring>

#include "int8_vectors.h"
#include "narrow_sums.h"
#include "packing.h"

namespace tokenflow::cpu {
namespace {

typedef int32_t HalfInts __attribute__((vector_size(kHalfLanes * sizeof(int32_t)), aligned(4)));
typedef int8_t HalfBytes __attribute__((vector_size(kHalfLanes), aligned(1)));

constexpr int kVectors = 2;  // of codes in a panel
constexpr int kPanelWidth = kVectors * kLanes;
constexpr int kCodeLevels = 127;
static_assert(kMostBlockCodes % kPanelWidth == 0, "a block is a whole number of panels");

// A row's step is never so fine that a bias exceeds this many units.
constexpr double kLargestBias = 1 << 28;

static inline int quads_of(int dim) { return (dim + 3) / 4; }

// A panel: the biases, then [quads][kPanelWidth] groups of four channels of a code.
size_t panel_bytes(int dim) { return sizeof(float) * kPanelWidth * (1 + quads_of(dim)); }

// A tile: lines [rows] of four channels of a row each. Narrow sums have a line before all others
// that holds the number of quads in a chunk, and one before each chunk of what its parts start
// from.
size_t row_bytes(int dim) {
  const int quads = quads_of(dim);
  const int most_chunks = (quads + kShortestChunk - 1) / kShortestChunk;
  return sizeof(int32_t) * (quads + (kNarrowSums ? 1 + most_chunks : 0));
}

static inline int32_t four_bytes(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof(four));
  return four;
}

double step(double largest) { return largest > 0 ? largest / kCodeLevels : 1.0; }

// Code `from` of a panel, as it was packed, is its code `to` as well.
static inline void copy_code(uint8_t* bytes, int quads, int from, int to) {
  for (int q = 0; q < quads; ++q, bytes += 4 * kPanelWidth) {
    std::memcpy(bytes + 4 * to, bytes + 4 * from, 4);
  }
}

void pack_panel(const float* codes, int count, const CodebookLayout& layout, void* packed,
                CodeBounds* bounds) {
  const int dim = layout.dim, quads = quads_of(dim);
  float* bias_line = static_cast<float*>(packed);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(bias_line + kPanelWidth);
  constexpr int kPositive = kCodeLevels + 1;
  const double per_step = 1 / bounds->step;
  Largest largest;
  for (int lane = 0; lane < count; ++lane) {
    const float* code = codes + static_cast<int64_t>(lane) * dim;
    Lengths lengths;
    measure(code, layout, *bounds, &lengths);
    double exact[kChunk];
    Doubles squared_error = {};
    LongestPart parts[] = {LongestPart(chunk_size(0)), LongestPart(chunk_size(1)),
                           LongestPart(chunk_size(2))};
    static_assert(sizeof(parts) / sizeof(parts[0]) == kChunkSizes);
    for (int first = 0; first < dim; first += kChunk) {
      const int count = scale_chunk(code, layout, lengths.scale, bounds->centre, first, exact);
      uint8_t values[kChunk];
      for (int i = 0; i < count; i += kHalfLanes) {
        const Doubles c = *reinterpret_cast<const Doubles*>(exact + i);
        // Positive before the conversion cuts the fraction off; `step` keeps it within a byte.
        const HalfInts value =
            __builtin_convertvector(c * per_step + (kPositive + 0.5), HalfInts) - kPositive;
        const Doubles whole = __builtin_convertvector(value, Doubles);
        const Doubles error = c - whole * bounds->step;
        squared_error += error * error;
        for (int k = 0; kNarrowSums && k < kChunkSizes; ++k) parts[k].count(whole * whole);
        *reinterpret_cast<HalfBytes*>(values + i) =
            __builtin_convertvector(value + kCodeOffset, HalfBytes);
      }
      uint8_t* out = bytes + first * kPanelWidth + 4 * lane;
      for (int i = 0; i < count && first + i < dim; i += 4, out += 4 * kPanelWidth) {
        std::memcpy(out, values + i, 4);
      }
    }
    for (int k = 0; kNarrowSums && k < kChunkSizes; ++k) {
      bounds->parts[k] = larger(bounds->parts[k], parts[k].squared());
    }
    bias_line[lane] = static_cast<float>(lengths.bias);
    largest.count(lengths, horizontal_sum(squared_error));
  }
  largest.raise(bounds);
  for (int lane = count; lane < kPanelWidth; ++lane) {
    bias_line[lane] = bias_line[count - 1];
    copy_code(bytes, quads, count - 1, lane);
  }
}

// Less the offset of codes, times four channels of a row, in the two sums that a chunk starts from.
static inline void take_back_offset(const int8_t* four, int8_t* sums) {
  uint16_t parts[2];
  std::memcpy(parts, sums, sizeof(parts));
  for (int i = 0; i < 4; ++i) parts[i / 2] -= static_cast<uint16_t>(kCodeOffset * four[i]);
  std::memcpy(sums, parts, sizeof(parts));
}

void pack_tile(const float* rows, int count, const CodebookLayout& layout, const CodeBounds& bounds,
               void* tile, RowScale* scales) {
  const int dim = layout.dim;
  const ChunkChoice choice(bounds, quads_of(dim), kRowLevels);
  const int chunk = choice.quads;
  const int64_t line = 4 * static_cast<int64_t>(count);
  int8_t* bytes = static_cast<int8_t*>(tile);
  for (int r = 0; r < count; ++r, bytes += 4) {
    const float* row = rows + static_cast<int64_t>(r) * dim;
    int8_t *out = bytes, *sums = nullptr;
    if (kNarrowSums) {
      std::memcpy(out, &chunk, 4);
      out += line;
    }
    Lengths lengths;
    measure(row, layout, bounds, &lengths);
    if (!__builtin_isfinite(lengths.squared)) {
      const int8_t* end = bytes + static_cast<int64_t>(row_bytes(dim)) * count;
      for (; out < end; out += line) std::memset(out, 0, 4);
      scales[r] = {__builtin_nanf(""), 0};
      continue;
    }
    double exact[kChunk];
    int in_chunk = 0;
    Doubles largest = {};
    LongestPart part(chunk);
    for (int first = 0; first < dim; first += kChunk) {
      in_chunk = scale_chunk(row, layout, lengths.scale, bounds.centre, first, exact);
      for (int i = 0; i < in_chunk; i += kHalfLanes) {
        const Doubles z = *reinterpret_cast<const Doubles*>(exact + i);
        largest = z > largest ? z : largest;
        largest = -z > largest ? -z : largest;
        if (kNarrowSums) part.count(z * z);
      }
    }
    double unit = bounds.bias / (bounds.step * kLargestBias);
    if (kNarrowSums) unit = larger(unit, choice.least_step(part.squared()));
    for (int i = 0; i < kHalfLanes; ++i) unit = larger(unit, largest[i] / kRowLevels);
    if (!(unit > 0)) unit = 1;
    const double per_unit = 1 / unit;
    Doubles squared_error = {}, packed_length = {};
    for (int first = 0; first < dim; first += kChunk) {
      if (dim > kChunk)
        in_chunk = scale_chunk(row, layout, lengths.scale, bounds.centre, first, exact);
      int8_t values[kChunk];
      for (int i = 0; i < in_chunk; i += kHalfLanes) {
        const Doubles z = *reinterpret_cast<const Doubles*>(exact + i);
        // Positive before the conversion cuts the fraction off.
        const HalfInts value =
            __builtin_convertvector(z * per_unit + (kRowLevels + 0.5), HalfInts) - kRowLevels;
        const Doubles packed = __builtin_convertvector(value, Doubles) * unit;
        squared_error += (z - packed) * (z - packed);
        packed_length += packed * packed;
        *reinterpret_cast<HalfBytes*>(values + i) = __builtin_convertvector(value, HalfBytes);
      }
      for (int i = 0; i < in_chunk && first + i < dim; i += 4, out += line) {
        if (kNarrowSums && (first + i) / 4 % chunk == 0) {
          sums = out;
          std::memset(sums, 0, 4);
          out += line;
        }
        std::memcpy(out, values + i, 4);
        if (kNarrowSums) take_back_offset(values + i, sums);
      }
    }
    const double bias_scale = 1 / (unit * bounds.step);
    const double bias_units = bounds.bias * bias_scale;
    const double bound = (__builtin_sqrt(horizontal_sum(squared_error)) * bounds.norm +
                          __builtin_sqrt(horizontal_sum(packed_length)) * bounds.error +
                          packed_distance_error(dim, lengths.length, bounds)) *
                             bias_scale +
                         // The bias in float32, its product with bias_scale, then an integer.
                         bias_units * (bounds.has_bias ? 0x1p-22 : 1.0) + 1 +
                         // Integer sums are kept as float32 maxima.
                         (bias_units + 255.0 * kRowLevels * dim) * 0x1p-23;
    scales[r] = {static_cast<float>(2 * bound * 1.00001), static_cast<float>(bias_scale)};
  }
}

// What a row's sums start from; `line` is what the chunk begins with, where it has such a line.
static inline Sums start(const int8_t* line) {
  return reinterpret_cast<Sums>(broadcast(kNarrowSums ? four_bytes(line) : 0));
}

template <int kRows, bool kHasBias, bool kIsOneChunk>
void score_rows(const int8_t* tile, int quads, int chunk, const RowScale* scales,
                const uint8_t* panels, int64_t num_panels, float* block_max, int64_t stride) {
  Ints best[kRows];
  for (int r = 0; r < kRows; ++r) best[r] = broadcast(INT32_MIN);
  for (int64_t p = 0; p < num_panels; ++p) {
    const float* bias = reinterpret_cast<const float*>(panels);
    const uint8_t* code = panels + sizeof(float) * kPanelWidth;
    const int8_t* z = tile;
    Ints sum_low[kRows], sum_high[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows && !kIsOneChunk; ++r) sum_low[r] = sum_high[r] = broadcast(0);
    int left = quads;
    do {
      const int in_chunk = kIsOneChunk || left < chunk ? left : chunk;
      left -= in_chunk;
      Sums low[kRows], high[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) low[r] = high[r] = start(z + 4 * r);
      if (kNarrowSums) z += 4 * kRows;
      for (int q = 0; q < in_chunk; ++q) {
        const Ints code_low = load(code), code_high = load(code + sizeof(Ints));
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const Ints value = broadcast(four_bytes(z + 4 * r));
          low[r] = dot4(low[r], code_low, value);
          high[r] = dot4(high[r], code_high, value);
        }
        code += 4 * kPanelWidth;
        z += 4 * kRows;
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        sum_low[r] = kIsOneChunk ? widen(low[r]) : sum_low[r] + widen(low[r]);
        sum_high[r] = kIsOneChunk ? widen(high[r]) : sum_high[r] + widen(high[r]);
      }
    } while (!kIsOneChunk && left > 0);
    panels = code;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      if (kHasBias) {
        sum_low[r] += scaled_bias(bias, scales[r].bias_scale);
        sum_high[r] += scaled_bias(bias + kLanes, scales[r].bias_scale);
      }
      best[r] = maximum(best[r], maximum(sum_low[r], sum_high[r]));
    }
  }
  for (int r = 0; r < kRows; ++r) {
    block_max[r * stride] = static_cast<float>(horizontal_maximum(best[r]));
  }
}

template <int kRows>
void score_tile_from(const int8_t* tile, int count, int quads, const RowScale* scales,
                     bool has_bias, const uint8_t* panels, int64_t num_panels, float* block_max,
                     int64_t stride) {
  if constexpr (kRows > 0) {
    if (count != kRows) {
      score_tile_from<kRows - 1>(tile, count, quads, scales, has_bias, panels, num_panels,
                                 block_max, stride);
      return;
    }
    // Tiles of narrow sums begin with a line of their own.
    const int chunk = kNarrowSums ? four_bytes(tile) : quads;
    if (kNarrowSums) tile += 4 * kRows;
    auto* score = has_bias ? score_rows<kRows, true, true> : score_rows<kRows, false, true>;
    if constexpr (kNarrowSums) {
      if (quads > chunk) {
        score = has_bias ? score_rows<kRows, true, false> : score_rows<kRows, false, false>;
      }
    }
    score(tile, quads, chunk, scales, panels, num_panels, block_max, stride);
  }
}

void score_tile(const void* tile, int count, int dim, const RowScale* scales, bool has_bias,
                const void* panels, int64_t num_panels, float* block_max, int64_t stride) {
  score_tile_from<kTileRows>(static_cast<const int8_t*>(tile), count, quads_of(dim), scales,
                             has_bias, static_cast<const uint8_t*>(panels), num_panels, block_max,
                             stride);
}

int scan_block(const void* tile, int count, int r, int dim, const RowScale* scales, bool has_bias,
               const void* panels, int64_t num_panels, float threshold, int* codes) {
  // Scores are integers above -2^31.
  const Ints lowest = broadcast(
      threshold > -0x1p31f ? static_cast<int32_t>(__builtin_floorf(threshold)) : INT32_MIN + 1);
  const int quads = quads_of(dim);
  const int64_t bytes = static_cast<int64_t>(panel_bytes(dim));
  const int8_t* row = static_cast<const int8_t*>(tile) + 4 * r;
  const int64_t line = 4 * static_cast<int64_t>(count);
  const int chunk = kNarrowSums ? four_bytes(row) : quads;
  if (kNarrowSums) row += line;
  int found = 0;
  // Several panels at once, for enough independent sums to keep the multipliers busy.
  constexpr int kPanels = 4;
  for (int64_t p = 0; p < num_panels; p += kPanels) {
    const int64_t last = num_panels - 1 - p;
    const uint8_t* code[kPanels];
    Ints scores[kPanels][kVectors];
#pragma GCC unroll 4
    for (int k = 0; k < kPanels; ++k) {
      const uint8_t* panel =
          static_cast<const uint8_t*>(panels) + (p + (k < last ? k : last)) * bytes;
      const float* bias = reinterpret_cast<const float*>(panel);
      code[k] = panel + sizeof(float) * kPanelWidth;
      for (int v = 0; v < kVectors; ++v) {
        scores[k][v] =
            has_bias ? scaled_bias(bias + v * kLanes, scales[r].bias_scale) : broadcast(0);
      }
    }
    const int8_t* z = row;
    for (int left = quads; left > 0;) {
      const int in_chunk = left < chunk ? left : chunk;
      left -= in_chunk;
      Sums sums[kPanels][kVectors];
#pragma GCC unroll 4
      for (int k = 0; k < kPanels; ++k) sums[k][0] = sums[k][1] = start(z);
      if (kNarrowSums) z += line;
      for (int q = 0; q < in_chunk; ++q, z += line) {
        const Ints value = broadcast(four_bytes(z));
#pragma GCC unroll 4
        for (int k = 0; k < kPanels; ++k) {
          sums[k][0] = dot4(sums[k][0], load(code[k]), value);
          sums[k][1] = dot4(sums[k][1], load(code[k] + sizeof(Ints)), value);
          code[k] += 4 * kPanelWidth;
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < kPanels; ++k) {
        scores[k][0] += widen(sums[k][0]);
        scores[k][1] += widen(sums[k][1]);
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kPanels; ++k) {
      if (k > last) continue;
      for (int v = 0; v < kVectors; ++v) {
        for (unsigned near = at_least(scores[k][v], lowest); near != 0; near &= near - 1) {
          codes[found++] = static_cast<int>(p + k) * kPanelWidth + v * kLanes + __builtin_ctz(near);
        }
      }
    }
  }
  return found;
}

}  // namespace

const CoarseScoreKernels& TOKENFLOW_COARSE_SCORE_KERNELS() {
  static constexpr CoarseScoreKernels kernels = {kPanelWidth, kTileRows,  kTimesFloat, panel_bytes,
                                                 row_bytes,   step,       pack_panel,  pack_tile,
                                                 nullptr,     score_tile, nullptr,     scan_block};
  return kernels;
}

}  // namespace tokenflow::cpu
