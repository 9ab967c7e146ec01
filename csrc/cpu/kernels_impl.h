// Body of kernels_portable.cpp, kernels_avx2.cpp and kernels_avx512.cpp: one source, compiled with
// each instruction set's flags. TOKENFLOW_KERNEL_TABLE names the table that the including file
// defines.
//
// Everything here has internal linkage and calls no inline library function, so that no symbol
// compiled with wider instructions can replace its twin elsewhere at link time.
//
// Coarse scores, the loop that takes nearly all the time: a tile of rows is held against a panel of
// codes, `kTileRows` x 2 vectors of scores in registers, one fused multiply-add a score and
// channel. The argmax is not carried along: each row keeps one maximum for each block of
// codes, and the blocks that may hold the nearest code are scanned again (search.cpp).
#include <cstdint>
#include <cstring>

#include "../common/normalize.h"
#include "packing.h"
#include "scalar_kernels_impl.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tokenflow::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kPanelWidth = 2 * kLanes;
static_assert(kMostBlockCodes % kPanelWidth == 0, "a block is a whole number of panels");

constexpr float kInfinity = __builtin_inff();

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

static inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }

static inline Vector broadcast(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return x - Vector{};  // unlike a sum, a difference with +0 is x itself, and compiles to nothing
#endif
}

// a where a > b, else b: a NaN in `a` is passed over.
static inline Vector maximum(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// A bit for each lane of v that is at least x.
static inline unsigned at_least(Vector v, float x) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, broadcast(x), _CMP_GE_OQ);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, broadcast(x), _CMP_GE_OQ)));
#else
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (v[i] >= x ? 1u : 0u) << i;
  return mask;
#endif
}

static inline float horizontal_maximum(Vector v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

// A panel: the biases, then [dim][kPanelWidth]. A tile: [dim][rows].
size_t panel_bytes(int dim) { return sizeof(float) * kPanelWidth * (dim + 1); }

size_t row_bytes(int dim) { return sizeof(float) * dim; }

double step(double) { return 1.0; }

// out = a vector times its groups' scales and less the centre, channels `stride` apart.
static inline void store_scaled(const float* vector, const CodebookLayout& layout,
                                const Lengths& lengths, const double* centre, int64_t stride,
                                float* out) {
  for (int first = 0; first < layout.dim; first += kChunk) {
    double exact[kChunk];
    scale_chunk(vector, layout, lengths.scale, centre, first, exact);
    for (int i = 0; i < kChunk && first + i < layout.dim; ++i, out += stride) {
      *out = static_cast<float>(exact[i]);
    }
  }
}

void pack_panel(const float* codes, int count, const CodebookLayout& layout, void* packed,
                CodeBounds* bounds) {
  float* biases = static_cast<float*>(packed);
  Largest largest;
  for (int lane = 0; lane < kPanelWidth; ++lane) {
    const float* code = codes + static_cast<int64_t>(lane < count ? lane : count - 1) * layout.dim;
    Lengths lengths;
    measure(code, layout, *bounds, &lengths);
    store_scaled(code, layout, lengths, bounds->centre, kPanelWidth, biases + kPanelWidth + lane);
    biases[lane] = static_cast<float>(lengths.bias);
    largest.count(lengths, 0);
  }
  largest.raise(bounds);
}

void pack_tile(const float* rows, int count, const CodebookLayout& layout, const CodeBounds& bounds,
               void* tile, RowScale* scales) {
  for (int r = 0; r < count; ++r) {
    const float* row = rows + static_cast<int64_t>(r) * layout.dim;
    Lengths lengths;
    measure(row, layout, bounds, &lengths);
    store_scaled(row, layout, lengths, bounds.centre, count, static_cast<float*>(tile) + r);
    // Where scaled numbers underflow in float32, the distance's error is beyond theirs: the largest
    // of the codes, or a row of unit length, is at least 1/2.
    const double bound =
        score_error_bound(layout.dim, __builtin_sqrt(lengths.norm), bounds.norm, bounds.bias) +
        packed_distance_error(layout.dim, lengths.length, bounds);
    scales[r] = {static_cast<float>(2 * bound), 1};
  }
}

template <int kRows>
void score_rows(const float* tile, int dim, const float* panels, int64_t num_panels,
                float* block_max, int64_t stride) {
  Vector best[kRows];
  for (int r = 0; r < kRows; ++r) best[r] = broadcast(-kInfinity);
  for (int64_t p = 0; p < num_panels; ++p) {
    Vector low[kRows], high[kRows];
    const float* code = panels + p * (dim + 1) * kPanelWidth;
    const Vector bias_low = load(code), bias_high = load(code + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      low[r] = bias_low;
      high[r] = bias_high;
    }
    const float* z = tile;
    for (int d = 0; d < dim; ++d) {
      code += kPanelWidth;
      const Vector code_low = load(code), code_high = load(code + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vector value = broadcast(z[r]);
        low[r] += value * code_low;
        high[r] += value * code_high;
      }
      z += kRows;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) best[r] = maximum(maximum(low[r], high[r]), best[r]);
  }
  for (int r = 0; r < kRows; ++r) block_max[r * stride] = horizontal_maximum(best[r]);
}

template <int kRows>
void score_tile_from(const float* tile, int count, int dim, const float* panels, int64_t num_panels,
                     float* block_max, int64_t stride) {
  if constexpr (kRows > 0) {
    if (count == kRows) {
      score_rows<kRows>(tile, dim, panels, num_panels, block_max, stride);
    } else {
      score_tile_from<kRows - 1>(tile, count, dim, panels, num_panels, block_max, stride);
    }
  }
}

void score_tile(const void* tile, int count, int dim, const RowScale*, bool, const void* panels,
                int64_t num_panels, float* block_max, int64_t stride) {
  score_tile_from<kTileRows>(static_cast<const float*>(tile), count, dim,
                             static_cast<const float*>(panels), num_panels, block_max, stride);
}

int scan_block(const void* tile, int count, int r, int dim, const RowScale*, bool,
               const void* panels, int64_t num_panels, float threshold, int* codes) {
  const float* row = static_cast<const float*>(tile) + r;
  int found = 0;
  // Several panels at once, for enough independent sums to keep the multiply-adds busy.
  constexpr int kPanels = 4;
  for (int64_t p = 0; p < num_panels; p += kPanels) {
    const int64_t last = num_panels - 1 - p;
    const float* code[kPanels];
    Vector scores[kPanels][2];
#pragma GCC unroll 4
    for (int k = 0; k < kPanels; ++k) {
      code[k] =
          static_cast<const float*>(panels) + (p + (k < last ? k : last)) * (dim + 1) * kPanelWidth;
      scores[k][0] = load(code[k]);
      scores[k][1] = load(code[k] + kLanes);
    }
    for (int d = 0; d < dim; ++d) {
      const Vector value = broadcast(row[static_cast<int64_t>(d) * count]);
#pragma GCC unroll 4
      for (int k = 0; k < kPanels; ++k) {
        code[k] += kPanelWidth;
        scores[k][0] += value * load(code[k]);
        scores[k][1] += value * load(code[k] + kLanes);
      }
    }
    for (int k = 0; k <= last && k < kPanels; ++k) {
      if (horizontal_maximum(maximum(scores[k][0], scores[k][1])) < threshold) continue;
      for (int lane = 0; lane < kPanelWidth; ++lane) {
        if (scores[k][lane / kLanes][lane % kLanes] < threshold) continue;
        codes[found++] = static_cast<int>(p + k) * kPanelWidth + lane;
      }
    }
  }
  return found;
}

int near_blocks(const float* block_max, int count, float margin, int* blocks, float* threshold) {
  float best = -kInfinity;
  int b = 0;
  if (count >= kLanes) {
    Vector widest = load(block_max);
    for (b = kLanes; b + kLanes <= count; b += kLanes)
      widest = maximum(load(block_max + b), widest);
    best = horizontal_maximum(widest);
  }
  for (; b < count; ++b) best = block_max[b] > best ? block_max[b] : best;
  const float least = *threshold = best - margin;
  if (!__builtin_isfinite(least)) return 0;
  int found = 0;
  for (b = 0; b + kLanes <= count; b += kLanes) {
    unsigned near = at_least(load(block_max + b), least);
    for (; near != 0; near &= near - 1) blocks[found++] = b + __builtin_ctz(near);
  }
  for (; b < count; ++b) {
    blocks[found] = b;  // overwritten unless it counts: no branch to predict
    found += block_max[b] >= least;
  }
  return found;
}

void scores(const double* unit_row, const float* codebook, const CodebookLayout& layout,
            const int64_t* codes, int64_t count, double* scores) {
  for (int64_t i = 0; i < count; ++i) {
    const float* code = codebook + codes[i] * layout.dim;
    double score = 0;
    for (int g = 0; g < layout.groups; ++g) {
      const int end = layout.begin[g + 1];
      Doubles dots = {}, squares = {};
      double dot = 0, squared = 0;
      int d = layout.begin[g];
      for (; d + kHalfLanes <= end; d += kHalfLanes) {
        const Doubles c = load_doubles(code + d);
        dots += *reinterpret_cast<const Doubles*>(unit_row + d) * c;
        squares += c * c;
      }
      for (; d < end; ++d) {
        const double c = static_cast<double>(code[d]);
        dot += unit_row[d] * c;
        squared += c * c;
      }
      for (int lane = 0; lane < kHalfLanes; ++lane) {
        dot += dots[lane];
        squared += squares[lane];
      }
      score += layout.weight[g] * dot * inverse_norm(squared, layout.l2_norm) +
               group_bias(squared, layout, g);
    }
    scores[i] = score;
  }
}

template <typename T>
struct FourOf;

template <>
struct FourOf<float> {
  typedef float Numbers __attribute__((vector_size(16), aligned(4)));
};

template <>
struct FourOf<double> {
  typedef double Numbers __attribute__((vector_size(32), aligned(8)));
};

// out [columns, rows] = in [rows, columns], by blocks of 4 x 4; `rows` at a time are written side
// by side, and lines of `in` and `out` are `stride` and `out_stride` apart.
template <typename T>
static inline void transpose(const T* in, int64_t stride, int64_t rows, int64_t columns, T* out,
                             int64_t out_stride) {
  using Four = typename FourOf<T>::Numbers;
  for (int64_t r = 0; r < rows; r += 4) {
    for (int64_t c = 0; c < columns; c += 4) {
      const T* from = in + r * stride + c;
      T* to = out + c * out_stride + r;
      if (r + 4 <= rows && c + 4 <= columns) {
        const Four a0 = *reinterpret_cast<const Four*>(from);
        const Four a1 = *reinterpret_cast<const Four*>(from + stride);
        const Four a2 = *reinterpret_cast<const Four*>(from + 2 * stride);
        const Four a3 = *reinterpret_cast<const Four*>(from + 3 * stride);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          *reinterpret_cast<Four*>(to + i * out_stride) = Four{a0[i], a1[i], a2[i], a3[i]};
        }
        continue;
      }
      for (int64_t i = r; i < rows && i < r + 4; ++i) {
        for (int64_t j = c; j < columns && j < c + 4; ++j) {
          out[j * out_stride + i] = in[i * stride + j];
        }
      }
    }
  }
}

// Of so many positions at a time both sides stay in the nearest cache.
constexpr int64_t kTransposeTile = 32;

template <typename T>
void to_channels_last(const T* planes, int dim, int64_t positions, T* out) {
  for (int64_t p = 0; p < positions; p += kTransposeTile) {
    const int64_t count = positions - p < kTransposeTile ? positions - p : kTransposeTile;
    transpose(planes + p, positions, dim, count, out + p * dim, dim);
  }
}

template <typename T>
void to_channels_first(const T* plane, int dim, int64_t positions, T* out) {
  for (int64_t p = 0; p < positions; p += kTransposeTile) {
    const int64_t count = positions - p < kTransposeTile ? positions - p : kTransposeTile;
    transpose(plane + p * dim, dim, count, dim, out + p, positions);
  }
}

// to += scale * from along `dim` channels.
template <typename T>
static inline void add_scaled(const T* __restrict from, T scale, int64_t dim, T* __restrict to) {
  for (int64_t d = 0; d < dim; ++d) to[d] += scale * from[d];
}

template <typename T>
static inline void fill_zero(T* to, int64_t count) {
  std::memset(to, 0, static_cast<size_t>(count) * sizeof(T));
}

template <typename T>
bool all_finite(const T* values, int64_t count) {
  int bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= !(values[i] - values[i] == 0);
  return bad == 0;
}

float largest_magnitude(const float* values, int64_t count) {
  // Magnitudes are ordered as their bit patterns are, and a maximum of integers needs no order.
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, values + i, sizeof(bits));
    bits &= INT32_MAX;
    largest = bits > largest ? bits : largest;
  }
  float magnitude;
  __builtin_memcpy(&magnitude, &largest, sizeof(magnitude));
  return magnitude;
}

// The averages of `pool` that are not finite once more, with sums in float64: sums of numbers close
// to the largest may be beyond T where their average is not.
template <typename T>
void pool_again(const T* plane, int dim, Extent from, Extent to, T* rows) {
  for (int y = 0; y < to.height; ++y) {
    const AreaBin bin_y = area_bin(y, from.height, to.height);
    for (int x = 0; x < to.width; ++x) {
      const AreaBin bin_x = area_bin(x, from.width, to.width);
      const double count = (bin_y.end - bin_y.begin) * (bin_x.end - bin_x.begin);
      T* row = rows + (static_cast<int64_t>(y) * to.width + x) * dim;
      for (int d = 0; d < dim; ++d) {
        if (all_finite(row + d, 1)) continue;
        double sum = 0;
        for (int sy = bin_y.begin; sy < bin_y.end; ++sy) {
          for (int sx = bin_x.begin; sx < bin_x.end; ++sx) {
            sum += plane[(static_cast<int64_t>(sy) * from.width + sx) * dim + d];
          }
        }
        row[d] = static_cast<T>(sum / count);
      }
    }
  }
}

template <typename T>
void pool(const T* plane, int dim, Extent from, Extent to, T* rows) {
  using Numbers = typename VectorOf<T>::Numbers;
  for (int y = 0; y < to.height; ++y) {
    const AreaBin bin_y = area_bin(y, from.height, to.height);
    for (int x = 0; x < to.width; ++x) {
      const AreaBin bin_x = area_bin(x, from.width, to.width);
      T* row = rows + (static_cast<int64_t>(y) * to.width + x) * dim;
      const T count = static_cast<T>((bin_y.end - bin_y.begin) * (bin_x.end - bin_x.begin));
      // each(position) for every position of the bin.
      const auto for_bin = [&](const auto& each) {
        for (int sy = bin_y.begin; sy < bin_y.end; ++sy) {
          for (int sx = bin_x.begin; sx < bin_x.end; ++sx) {
            each(plane + (static_cast<int64_t>(sy) * from.width + sx) * dim);
          }
        }
      };
      int d = 0;
      for (; d + kVectorWidth<T> <= dim; d += kVectorWidth<T>) {
        Numbers sum = {};
        for_bin([&](const T* p) { sum += *reinterpret_cast<const Numbers*>(p + d); });
        *reinterpret_cast<Numbers*>(row + d) = sum / count;
      }
      if (d == dim) continue;
      fill_zero(row + d, dim - d);
      for_bin([&](const T* p) { add_scaled(p + d, T(1), dim - d, row + d); });
      for (; d < dim; ++d) row[d] /= count;
    }
  }
  if (!all_finite(rows, static_cast<int64_t>(to.height) * to.width * dim)) {
    pool_again(plane, dim, from, to, rows);
  }
}

template <typename T>
void pool_transpose_add(const T* grad_rows, int dim, Extent from, Extent to, T* grad_plane) {
  for (int y = 0; y < to.height; ++y) {
    const AreaBin bin_y = area_bin(y, from.height, to.height);
    for (int x = 0; x < to.width; ++x) {
      const AreaBin bin_x = area_bin(x, from.width, to.width);
      const T* grad = grad_rows + (static_cast<int64_t>(y) * to.width + x) * dim;
      const T share = T(1) / static_cast<T>((bin_y.end - bin_y.begin) * (bin_x.end - bin_x.begin));
      for (int sy = bin_y.begin; sy < bin_y.end; ++sy) {
        for (int sx = bin_x.begin; sx < bin_x.end; ++sx) {
          add_scaled(grad, share, dim,
                     grad_plane + (static_cast<int64_t>(sy) * from.width + sx) * dim);
        }
      }
    }
  }
}

// The taps that weigh anything, kTaps of them around the middle of the four.
template <int kTaps, typename T>
static inline T weigh(const Taps<T>& taps, const T* const (&lines)[4], int64_t i) {
  if constexpr (kTaps == 2) {
    return taps.weight[1] * lines[1][i] + taps.weight[2] * lines[2][i];
  } else {
    return taps.weight[0] * lines[0][i] + taps.weight[1] * lines[1][i] +
           taps.weight[2] * lines[2][i] + taps.weight[3] * lines[3][i];
  }
}

template <int kTaps, typename T>
void upsample_by(const T* rows, int dim, Extent from, Extent to, Upsampling upsampling,
                 T* __restrict scratch, T* __restrict sum, T* __restrict residual) {
  // Along x into scratch [from.height, to.width, dim], then along y.
  for (int x = 0; x < to.width; ++x) {
    const Taps<T> taps = upsampling_taps<T>(x, from.width, to.width, upsampling);
    for (int y = 0; y < from.height; ++y) {
      const T* lines[4];
      for (int k = 0; k < 4; ++k) {
        lines[k] = rows + (static_cast<int64_t>(y) * from.width + taps.position[k]) * dim;
      }
      T* __restrict out = scratch + (static_cast<int64_t>(y) * to.width + x) * dim;
      for (int d = 0; d < dim; ++d) out[d] = weigh<kTaps>(taps, lines, d);
    }
  }
  const int64_t line = static_cast<int64_t>(to.width) * dim;
  for (int y = 0; y < to.height; ++y) {
    const Taps<T> taps = upsampling_taps<T>(y, from.height, to.height, upsampling);
    const T* lines[4];
    for (int k = 0; k < 4; ++k) lines[k] = scratch + taps.position[k] * line;
    T* __restrict s = sum ? sum + y * line : nullptr;
    T* __restrict r = residual ? residual + y * line : nullptr;
    if (s && r) {
      for (int64_t i = 0; i < line; ++i) {
        const T u = weigh<kTaps>(taps, lines, i);
        s[i] += u;
        r[i] -= u;
      }
    } else if (s) {
      for (int64_t i = 0; i < line; ++i) s[i] += weigh<kTaps>(taps, lines, i);
    } else if (r) {
      for (int64_t i = 0; i < line; ++i) r[i] -= weigh<kTaps>(taps, lines, i);
    }
  }
}

template <typename T>
void upsample(const T* rows, int dim, Extent from, Extent to, Upsampling upsampling, T* scratch,
              T* sum, T* residual) {
  const auto by = upsampling == Upsampling::kBilinear ? upsample_by<2, T> : upsample_by<4, T>;
  by(rows, dim, from, to, upsampling, scratch, sum, residual);
}

template <typename T>
void upsample_transpose(const T* grad_plane, int dim, Extent from, Extent to, Upsampling upsampling,
                        T* scratch, T* grad_rows) {
  const int64_t line = static_cast<int64_t>(to.width) * dim;
  const int first_tap = upsampling == Upsampling::kBilinear ? 1 : 0;
  fill_zero(scratch, from.height * line);
  for (int y = 0; y < to.height; ++y) {
    const Taps<T> taps = upsampling_taps<T>(y, from.height, to.height, upsampling);
    for (int k = first_tap; k < 4 - first_tap; ++k) {
      add_scaled(grad_plane + y * line, taps.weight[k], line, scratch + taps.position[k] * line);
    }
  }
  fill_zero(grad_rows, static_cast<int64_t>(from.height) * from.width * dim);
  for (int x = 0; x < to.width; ++x) {
    const Taps<T> taps = upsampling_taps<T>(x, from.width, to.width, upsampling);
    for (int y = 0; y < from.height; ++y) {
      const T* grad = scratch + (static_cast<int64_t>(y) * to.width + x) * dim;
      T* out = grad_rows + static_cast<int64_t>(y) * from.width * dim;
      for (int k = first_tap; k < 4 - first_tap; ++k) {
        add_scaled(grad, taps.weight[k], dim, out + static_cast<int64_t>(taps.position[k]) * dim);
      }
    }
  }
}

template <typename T>
constexpr ChannelKernels<T> channel_kernels() {
  return {to_channels_last<T>,      to_channels_first<T>, pool<T>,
          pool_transpose_add<T>,    upsample<T>,          upsample_transpose<T>,
          quantize_scalars<T>,      pack_tokens,          stand_in<T>,
          stand_in_backward<T>,     squared_error<T>,     sign_choices<T>,
          sign_choices_backward<T>, all_finite<T>};
}

}  // namespace

const KernelTable& TOKENFLOW_KERNEL_TABLE() {
  static constexpr KernelTable table = {
      {kPanelWidth, kTileRows, 1, panel_bytes, row_bytes, step, pack_panel, pack_tile, nullptr,
       score_tile, nullptr, scan_block},
      channel_kernels<float>(),
      channel_kernels<double>(),
      near_blocks,
      scores,
      largest_magnitude,
  };
  return table;
}

}  // namespace tokenflow::cpu
