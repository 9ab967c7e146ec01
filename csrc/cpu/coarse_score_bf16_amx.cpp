// Coarse scores in bfloat16 by the matrix unit of AMX: 16 rows x 16 codes x 32 channels an
// instruction, summed in float32.
//
// Rows z and codes c, normalised and each scaled by the square root of the weight, are rounded to
// Z = z - e and C = c - f. Then
//
//   <z, c> - <Z, C> = <e, c> + <Z, f>,   at most |e| |c| + |Z| |f|,
//
// where |e| and |Z| are measured for every row, max |c| and max |f| over the codes. The sums begin
// with the bias and are of products that float32 holds exactly, each step rounded or, below
// float32's smallest normal number, cut to zero.
//
// Compiled with the flags of its instruction set where the compiler has them. Internal linkage, as
// in kernels_impl.h.
#include "packing.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <cstring>

namespace tokenflow::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kVectors = 4;  // of codes in a panel
constexpr int kPanelWidth = kVectors * kLanes;
constexpr int kTimesFloat = 8;
constexpr int kStepPairs = 16;  // pairs of channels an instruction takes
static_assert(kLanes == 16, "a tile has 16 columns");
static_assert(kMostBlockCodes % kPanelWidth == 0, "a block is a whole number of panels");

// GCC keeps arrays of this type in registers; of __m512 it does not.
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef uint32_t HalfWords __attribute__((vector_size(kHalfLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kHalfLanes * sizeof(uint16_t)), aligned(2)));

static inline int pairs_of(int dim) { return (dim + 1) / 2; }

static inline int steps_of(int dim) { return (pairs_of(dim) + kStepPairs - 1) / kStepPairs; }

// A panel: the biases, then [kVectors][pairs][kLanes] pairs of channels of a code.
size_t panel_bytes(int dim) { return sizeof(float) * kPanelWidth * (1 + pairs_of(dim)); }

// A tile: [kTileRows][steps] pairs of channels, and zeros for what a row or a tile lacks.
size_t row_bytes(int dim) { return sizeof(uint32_t) * kStepPairs * steps_of(dim); }

double step(double) { return 1.0; }

// Squared lengths of a vector as it is packed, and of what rounding took from it.
struct Rounded {
  double packed;
  double error;
};

// Writes the pairs of channels of a vector `stride` further each.
static inline Rounded pack_vector(const float* vector, const CodebookLayout& layout,
                                  const Lengths& lengths, const double* centre, uint32_t* out,
                                  int64_t stride) {
  Doubles packed = {}, error = {};
  for (int first = 0; first < layout.dim; first += kChunk) {
    double exact[kChunk];
    uint16_t halves[kChunk];
    const int count = scale_chunk(vector, layout, lengths.scale, centre, first, exact);
    for (int i = 0; i < count; i += kHalfLanes) {
      const Doubles values = *reinterpret_cast<const Doubles*>(exact + i);
      const HalfWords bits =
          reinterpret_cast<HalfWords>(__builtin_convertvector(values, HalfFloats));
      // To the nearest, ties to even; below float32's smallest normal number to zero, as which the
      // instructions take it.
      HalfWords rounded = bits + 0x7fffu + (bits >> 16 & 1u);
      rounded &= reinterpret_cast<HalfWords>((bits & 0x7f800000u) != 0) & 0xffff0000u;
      const Doubles half = __builtin_convertvector(reinterpret_cast<HalfFloats>(rounded), Doubles);
      packed += half * half;
      error += (values - half) * (values - half);
      *reinterpret_cast<Halves*>(halves + i) = __builtin_convertvector(rounded >> 16, Halves);
    }
    for (int i = 0; i < count && first + i < layout.dim; i += 2, out += stride) {
      std::memcpy(out, halves + i, sizeof(*out));
    }
  }
  return {horizontal_sum(packed), horizontal_sum(error)};
}

void pack_panel(const float* codes, int count, const CodebookLayout& layout, void* packed,
                CodeBounds* bounds) {
  float* biases = static_cast<float*>(packed);
  uint32_t* pairs = reinterpret_cast<uint32_t*>(biases + kPanelWidth);
  Largest largest;
  for (int i = 0; i < kPanelWidth; ++i) {
    const float* code = codes + static_cast<int64_t>(i < count ? i : count - 1) * layout.dim;
    Lengths lengths;
    measure(code, layout, *bounds, &lengths);
    const Rounded rounded =
        pack_vector(code, layout, lengths, bounds->centre,
                    pairs + i / kLanes * pairs_of(layout.dim) * kLanes + i % kLanes, kLanes);
    biases[i] = static_cast<float>(lengths.bias);
    largest.count(lengths, rounded.error);
  }
  largest.raise(bounds);
}

void pack_tile(const float* rows, int count, const CodebookLayout& layout, const CodeBounds& bounds,
               void* tile, RowScale* scales) {
  const int dim = layout.dim;
  const size_t bytes = row_bytes(dim);
  std::memset(tile, 0, kTileRows * bytes);
  for (int r = 0; r < count; ++r) {
    const float* row = rows + static_cast<int64_t>(r) * dim;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(static_cast<char*>(tile) + r * bytes);
    Lengths lengths;
    measure(row, layout, bounds, &lengths);
    const Rounded rounded = pack_vector(row, layout, lengths, bounds.centre, pairs, 1);
    const double packed = __builtin_sqrt(rounded.packed);
    const double magnitudes = packed * (bounds.norm + bounds.error) + bounds.bias;
    // A sum takes two steps for a pair, each rounded by at most 2^-24 of all magnitudes; 2^-23 is
    // taken. A term that is cut to zero is below 2^-126.
    const double bound = __builtin_sqrt(rounded.error) * bounds.norm + packed * bounds.error +
                         (dim + 8) * 0x1p-23 * magnitudes + (dim + 8) * 0x1p-125 +
                         (bounds.has_bias ? 0 : bounds.bias) +
                         packed_distance_error(dim, lengths.length, bounds);
    // Sums that may be beyond float32 tell nothing.
    const float margin = !__builtin_isfinite(lengths.squared) ? __builtin_nanf("")
                         : !(magnitudes < 0x1p120)            ? __builtin_inff()
                                                   : static_cast<float>(2 * bound * 1.00001);
    if (!__builtin_isfinite(margin)) std::memset(pairs, 0, bytes);
    scales[r] = {margin, 1};
  }
}

// Tiles 0 to 3 are sums; 4 and 6 hold a whole step of codes and rows, 5 and 7 the last one.
void begin(int dim) {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
  } configuration;
  const int last = pairs_of(dim) - (steps_of(dim) - 1) * kStepPairs;
  for (int i = 0; i < 8; ++i) {
    configuration.rows[i] = 16;
    configuration.column_bytes[i] = 64;
  }
  configuration.rows[5] = static_cast<uint8_t>(last);
  configuration.column_bytes[7] = static_cast<uint16_t>(4 * last);
  // GCC believes that the instruction reads a pointer, and would leave the rest unwritten.
  __asm__ volatile("" : : "r"(&configuration) : "memory");
  _tile_loadconfig(&configuration);
}

void end() { _tile_release(); }

// Of 16 vectors the maxima, that of vector 4 p + l in lane 4 l + p.
static inline Floats maxima_of(const Floats (&v)[16]) {
  Floats eight[8], four[4], two[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    eight[i] = _mm512_max_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    four[i] = _mm512_max_ps(_mm512_shuffle_f32x4(eight[2 * i], eight[2 * i + 1], 0x88),
                            _mm512_shuffle_f32x4(eight[2 * i], eight[2 * i + 1], 0xdd));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    two[i] = _mm512_max_ps(_mm512_unpacklo_ps(four[2 * i], four[2 * i + 1]),
                           _mm512_unpackhi_ps(four[2 * i], four[2 * i + 1]));
  }
  return _mm512_max_ps(_mm512_shuffle_ps(two[0], two[1], 0x44),
                       _mm512_shuffle_ps(two[0], two[1], 0xee));
}

// A step of `rows` times the four vectors of `codes`, in tiles that only literals can name.
#define TOKENFLOW_MULTIPLY_STEP(row_tile, code_tile) \
  do {                                               \
    _tile_loadd(row_tile, rows, row_stride);         \
    _tile_loadd(code_tile, codes, 64);               \
    _tile_dpbf16ps(0, row_tile, code_tile);          \
    _tile_loadd(code_tile, codes + vector, 64);      \
    _tile_dpbf16ps(1, row_tile, code_tile);          \
    _tile_loadd(code_tile, codes + 2 * vector, 64);  \
    _tile_dpbf16ps(2, row_tile, code_tile);          \
    _tile_loadd(code_tile, codes + 3 * vector, 64);  \
    _tile_dpbf16ps(3, row_tile, code_tile);          \
  } while (false)

void score_tile(const void* tile, int count, int dim, const RowScale*, bool has_bias,
                const void* panels, int64_t num_panels, float* block_max, int64_t stride) {
  const int steps = steps_of(dim);
  const int64_t row_stride = static_cast<int64_t>(row_bytes(dim));
  const int64_t vector = int64_t{pairs_of(dim)} * kLanes;  // of codes, in words
  alignas(64) float scores[kVectors][kTileRows][kLanes];
  Floats best[kTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) best[r] = _mm512_set1_ps(-__builtin_inff());
  const char* panel = static_cast<const char*>(panels);
  for (int64_t p = 0; p < num_panels; ++p, panel += panel_bytes(dim)) {
    const float* bias = reinterpret_cast<const float*>(panel);
    const uint32_t* codes = reinterpret_cast<const uint32_t*>(bias + kPanelWidth);
    const char* rows = static_cast<const char*>(tile);
    if (has_bias) {  // the same for every row
      _tile_loadd(0, bias, 0);
      _tile_loadd(1, bias + kLanes, 0);
      _tile_loadd(2, bias + 2 * kLanes, 0);
      _tile_loadd(3, bias + 3 * kLanes, 0);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int s = 0; s + 1 < steps; ++s) {
      TOKENFLOW_MULTIPLY_STEP(6, 4);
      rows += 64;
      codes += kStepPairs * kLanes;
    }
    TOKENFLOW_MULTIPLY_STEP(7, 5);
    _tile_stored(0, scores[0], 64);
    _tile_stored(1, scores[1], 64);
    _tile_stored(2, scores[2], 64);
    _tile_stored(3, scores[3], 64);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        best[r] = _mm512_max_ps(_mm512_load_ps(scores[v][r]), best[r]);
      }
    }
  }
  alignas(64) float maxima[kTileRows];
  _mm512_store_ps(maxima, maxima_of(best));
  for (int r = 0; r < count; ++r) block_max[r * stride] = maxima[r % 4 * 4 + r / 4];
}

#undef TOKENFLOW_MULTIPLY_STEP

int scan_block(const void* tile, int, int r, int dim, const RowScale*, bool has_bias,
               const void* panels, int64_t num_panels, float threshold, int* codes) {
  const int pairs = pairs_of(dim);
  const char* row = static_cast<const char*>(tile) + r * row_bytes(dim);
  const char* panel = static_cast<const char*>(panels);
  int found = 0;
  for (int64_t p = 0; p < num_panels; ++p, panel += panel_bytes(dim)) {
    const float* bias = reinterpret_cast<const float*>(panel);
    const uint32_t* code = reinterpret_cast<const uint32_t*>(bias + kPanelWidth);
    // Two sums for a vector of codes, so that enough products are on their way.
    __m512 scores[kVectors], others[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      scores[v] = has_bias ? _mm512_loadu_ps(bias + v * kLanes) : _mm512_setzero_ps();
      others[v] = _mm512_setzero_ps();
    }
    const auto add = [&](int q, __m512(&sums)[kVectors]) {
      int32_t pair;
      __builtin_memcpy(&pair, row + 4 * q, sizeof(pair));
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const __m512bh some = (__m512bh)_mm512_loadu_si512(code + (v * pairs + q) * kLanes);
        sums[v] = _mm512_dpbf16_ps(sums[v], some, value);
      }
    };
    int q = 0;
    for (; q + 1 < pairs; q += 2) {
      add(q, scores);
      add(q + 1, others);
    }
    if (q < pairs) add(q, scores);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) scores[v] = scores[v] + others[v];
    for (int v = 0; v < kVectors; ++v) {
      unsigned near = _mm512_cmp_ps_mask(scores[v], _mm512_set1_ps(threshold), _CMP_GE_OQ);
      for (; near != 0; near &= near - 1) {
        codes[found++] = static_cast<int>(p) * kPanelWidth + v * kLanes + __builtin_ctz(near);
      }
    }
  }
  return found;
}

}  // namespace

const CoarseScoreKernels* bf16_coarse_score_amx() {
  static constexpr CoarseScoreKernels kernels = {kPanelWidth, kTileRows,  kTimesFloat, panel_bytes,
                                                 row_bytes,   step,       pack_panel,  pack_tile,
                                                 begin,       score_tile, end,         scan_block};
  return &kernels;
}

}  // namespace tokenflow::cpu

#else

const tokenflow::cpu::CoarseScoreKernels* tokenflow::cpu::bf16_coarse_score_amx() {
  return nullptr;
}

#endif
