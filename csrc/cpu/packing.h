// What packing rows and codes has in common, for every format of coarse scores: their lengths, and
// their channels times the scale of their group. Internal linkage and no inline library function,
// as in kernels_impl.h, whose files include this one.
#pragma once

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tokenflow::cpu {
namespace {

// Numbers in float32 that a vector of the instruction set holds.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Half as many doubles fill a vector.
constexpr int kHalfLanes = kLanes / 2;
typedef double Doubles __attribute__((vector_size(kHalfLanes * sizeof(double)), aligned(8)));
typedef float HalfFloats __attribute__((vector_size(kHalfLanes * sizeof(float)), aligned(4)));

static inline Doubles load_doubles(const float* p) {
  return __builtin_convertvector(*reinterpret_cast<const HalfFloats*>(p), Doubles);
}

static inline double horizontal_sum(Doubles v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd(v);
#elif defined(__AVX2__)
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return half[0] + half[1];
#else
  return v[0] + v[1];
#endif
}

static inline double larger(double a, double b) { return a > b ? a : b; }

// What a row or a code is measured as.
struct Lengths {
  double scale[kMaxGroups];  // of each group, to be packed
  double squared;            // as it is
  double length;             // squared, times the scales
  double norm;               // squared, without the centre
  double bias;               // of a code, as it is packed
};

// Channels of a vector are scaled this many at a time.
constexpr int kChunk = 64;

// out = channels [first, first + kChunk) of a vector times their group's scale and less the centre,
// and zeros up to a whole number of kHalfLanes and of 4. Returns how many there are with these.
static inline int scale_chunk(const float* vector, const CodebookLayout& layout,
                              const double* scale, const double* centre, int first, double* out) {
  const int last = layout.dim - first < kChunk ? layout.dim : first + kChunk;
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g] > first ? layout.begin[g] : first;
    const int end = layout.begin[g + 1] < last ? layout.begin[g + 1] : last;
    for (int d = begin; d < end; ++d) out[d - first] = static_cast<double>(vector[d]) * scale[g];
  }
  int count = last - first;
  for (int i = 0; centre && i < count; ++i) out[i] -= centre[first + i];
  for (; count % (kHalfLanes < 4 ? 4 : kHalfLanes) != 0; ++count) out[count] = 0;
  return count;
}

static inline void measure(const float* vector, const CodebookLayout& layout,
                           const CodeBounds& bounds, Lengths* lengths) {
  lengths->squared = lengths->length = lengths->bias = 0;
  for (int g = 0; g < layout.groups; ++g) {
    const int end = layout.begin[g + 1];
    Doubles squares = {};
    int d = layout.begin[g];
    for (; d + kHalfLanes <= end; d += kHalfLanes) {
      const Doubles values = load_doubles(vector + d);
      squares += values * values;
    }
    const double squared = horizontal_sum(squares) + squared_norm(vector, d, end);
    const double scale =
        bounds.scale * __builtin_sqrt(layout.weight[g]) * inverse_norm(squared, layout.l2_norm);
    lengths->scale[g] = scale;
    lengths->squared += squared;
    lengths->length += squared * scale * scale;
    lengths->bias += group_bias(squared, layout, g);
  }
  lengths->bias *= bounds.scale * bounds.scale;
  lengths->norm = lengths->length;
  if (bounds.centre) {
    lengths->norm = 0;
    lengths->bias -= bounds.centre_bias;
    for (int first = 0; first < layout.dim; first += kChunk) {
      double exact[kChunk];
      scale_chunk(vector, layout, lengths->scale, bounds.centre, first, exact);
      for (int i = 0; i < kChunk && first + i < layout.dim; ++i) {
        lengths->norm += exact[i] * exact[i];
        lengths->bias += exact[i] * bounds.centre[first + i];
      }
    }
  }
}

// The largest of a panel's codes; of norms, lengths and errors the squares.
struct Largest {
  double norm = 0, length = 0, error = 0, bias = 0;

  void count(const Lengths& lengths, double squared_error) {
    norm = larger(norm, lengths.norm);
    length = larger(length, lengths.length);
    error = larger(error, squared_error);
    bias = larger(bias, lengths.bias < 0 ? -lengths.bias : lengths.bias);
  }
  void raise(CodeBounds* bounds) const {
    bounds->norm = larger(bounds->norm, __builtin_sqrt(norm));
    bounds->length = larger(bounds->length, __builtin_sqrt(length));
    bounds->error = larger(bounds->error, __builtin_sqrt(error));
    bounds->bias = larger(bounds->bias, bias);
  }
};

}  // namespace
}  // namespace tokenflow::cpu
