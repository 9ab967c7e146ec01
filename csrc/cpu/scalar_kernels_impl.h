// Scalar quantization's part of kernels_impl.h: digits, what stands in the place of values, and the
// losses. As there, everything has internal linkage and calls no inline library function.
//
// Rows lie one after the other, and tables along them: those of several rows side by side, `width`
// channels, so that short rows fill vectors too (see scalar_tables.h). A part of a vector at the
// end of a row, or of all rows, is filled with zeros.
#pragma once

#include <cstring>

#include "../common/curve.h"
#include "../common/normalize.h"
#include "../common/scalar_args.h"
#include "packing.h"

namespace tokenflow::cpu {
namespace {

// Numbers of a vector's size, and whole numbers of theirs.
template <typename T>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float Numbers __attribute__((vector_size(kLanes * 4), aligned(4)));
  typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
  typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
  typedef int16_t Digits __attribute__((vector_size(kLanes * 2), aligned(2)));
  typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));
};

template <>
struct VectorOf<double> {
  typedef double Numbers __attribute__((vector_size(kHalfLanes * 8), aligned(8)));
  typedef int64_t Integers __attribute__((vector_size(kHalfLanes * 8)));
  typedef uint64_t Words __attribute__((vector_size(kHalfLanes * 8)));
  typedef int16_t Digits __attribute__((vector_size(kHalfLanes * 2), aligned(2)));
  typedef uint8_t Bytes __attribute__((vector_size(kHalfLanes), aligned(1)));
};

template <typename T>
constexpr int kVectorWidth = sizeof(typename VectorOf<T>::Numbers) / sizeof(T);

// Up to a vector's width of numbers, then zeros.
template <typename T>
static inline typename VectorOf<T>::Numbers load_some(const T* p, int count) {
  using Numbers = typename VectorOf<T>::Numbers;
  if (count >= kVectorWidth<T>) return *reinterpret_cast<const Numbers*>(p);
  T padded[kVectorWidth<T>] = {};
  for (int i = 0; i < count; ++i) padded[i] = p[i];
  return *reinterpret_cast<const Numbers*>(padded);
}

template <typename T>
static inline void store_some(typename VectorOf<T>::Numbers numbers, T* p, int count) {
  if (count >= kVectorWidth<T>) {
    *reinterpret_cast<typename VectorOf<T>::Numbers*>(p) = numbers;
  } else {
    for (int i = 0; i < count; ++i) p[i] = numbers[i];
  }
}

// step(i, j, n) for the n numbers from i on of `count`, j being their position among `width`.
template <typename T, typename Step>
static inline void for_vectors(int64_t count, int width, const Step& step) {
  for (int64_t first = 0; first < count; first += width) {
    const int here = count - first < width ? static_cast<int>(count - first) : width;
    int j = 0;
    for (; j + kVectorWidth<T> <= here; j += kVectorWidth<T>) step(first + j, j, kVectorWidth<T>);
    if (j < here) step(first + j, j, here - j);
  }
}

// Of numbers in float32 and float64: how e^x is taken apart, and how many terms of a series are
// beyond rounding.
template <typename T>
struct MathConstants;

template <>
struct MathConstants<float> {
  static constexpr float kMost = 87, kOne = 1;
  static constexpr float kRound = 12582912;  // 1.5 * 2^23: what is added to it is a whole number
  static constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  static constexpr int kMantissa = 23, kExponent = 127;
  static constexpr int kExpTerms = 8, kLogTerms = 9;
};

template <>
struct MathConstants<double> {
  static constexpr double kMost = 708, kOne = 1;
  static constexpr double kRound = 6755399441055744;  // 1.5 * 2^52
  static constexpr double kLog2High = 6.93145751953125e-1, kLog2Low = 1.42860682030941723212e-6;
  static constexpr int kMantissa = 52, kExponent = 1023;
  static constexpr int kExpTerms = 14, kLogTerms = 17;
};

template <typename T>
struct VectorMath : MathConstants<T> {
  using Of = MathConstants<T>;
  using X = typename VectorOf<T>::Numbers;
  using Words = typename VectorOf<T>::Words;

  // e^x = 2^n e^r with |r| <= log(2) / 2, by Taylor's series. x is -kMost to 0.
  static inline X exp_of_negative(X x) {
    const X shifted = x * static_cast<T>(1.44269504088896340736) + Of::kRound;  // ends in n
    const X n = shifted - Of::kRound;
    const X r = (x - n * Of::kLog2High) - n * Of::kLog2Low;
    X sum = X{} + Of::kOne;
#pragma GCC unroll 16
    for (int k = Of::kExpTerms - 1; k > 0; --k) {
      sum = sum * (r * (Of::kOne / static_cast<T>(k))) + Of::kOne;
    }
    Words bits;
    __builtin_memcpy(&bits, &shifted, sizeof(bits));
    // What is left of kRound is shifted out.
    bits = (bits + static_cast<unsigned>(Of::kExponent)) << Of::kMantissa;
    X power;
    __builtin_memcpy(&power, &bits, sizeof(power));
    return sum * power;
  }

  // 2 atanh(s) with s = u / (2 + u) <= 1/3.
  static inline X log1p(X u) {
    const X s = u / (u + (Of::kOne + Of::kOne)), square = s * s;
    X sum = X{};
#pragma GCC unroll 20
    for (int k = Of::kLogTerms - 1; k >= 0; --k) {
      sum = sum * square + Of::kOne / static_cast<T>(2 * k + 1);
    }
    return (s + s) * sum;
  }
};

template <typename T>
static inline T sum_of(typename VectorOf<T>::Numbers v) {
  T sum = 0;
  for (int i = 0; i < kVectorWidth<T>; ++i) sum += v[i];
  return sum;
}

template <bool kFlips, typename T>
static inline void quantize_from(const T* rows, int64_t size, const T* thresholds, const T* values,
                                 int count, int width, const bool* flips, int16_t* digits,
                                 T* codes) {
  using Numbers = typename VectorOf<T>::Numbers;
  using Integers = typename VectorOf<T>::Integers;
  using Digits = typename VectorOf<T>::Digits;
  using Bytes = typename VectorOf<T>::Bytes;
  for_vectors<T>(size, width, [&](int64_t at, int j, int n) {
    if (n < kVectorWidth<T>) {
      for (int i = 0; i < n; ++i) {
        int digit = digit_of(rows[at + i], thresholds + j + i, count, width);
        if constexpr (kFlips) digit ^= flips[at + i];
        digits[at + i] = static_cast<int16_t>(digit);
        codes[at + i] = values[static_cast<int64_t>(digit) * width + j + i];
      }
      return;
    }
    const Numbers numbers = *reinterpret_cast<const Numbers*>(rows + at);
    Integers digit = {}, inverted = {};  // there is one threshold where any is inverted
    if constexpr (kFlips) {
      const Bytes bytes = *reinterpret_cast<const Bytes*>(flips + at);
      inverted = -__builtin_convertvector(bytes, Integers);
    }
    Numbers code = *reinterpret_cast<const Numbers*>(values + j);
    for (int i = 0; i < count; ++i) {
      const int64_t line = static_cast<int64_t>(i) * width + j;
      Integers exceeds = numbers > *reinterpret_cast<const Numbers*>(thresholds + line);
      if constexpr (kFlips) exceeds ^= inverted;
      digit -= exceeds;
      code = exceeds ? *reinterpret_cast<const Numbers*>(values + line + width) : code;
    }
    *reinterpret_cast<Digits*>(digits + at) = __builtin_convertvector(digit, Digits);
    *reinterpret_cast<Numbers*>(codes + at) = code;
  });
}

template <typename T>
void quantize_scalars(const T* rows, int64_t size, const T* thresholds, const T* values, int count,
                      int width, const bool* flips, int16_t* digits, T* codes) {
  const auto quantize = flips ? quantize_from<true, T> : quantize_from<false, T>;
  quantize(rows, size, thresholds, values, count, width, flips, digits, codes);
}

// kDim channels, or any number of them where it is 0: a loop over few is not worth its beginning.
template <int kDim>
static inline void pack_tokens_of(const PackDigitsArgs& args, const int16_t* digits, int64_t count,
                                  int64_t* indices, int64_t stride) {
  for (int64_t n = 0; n < count; ++n) {
    for (int g = 0; g < args.groups; ++g) {
      int64_t index = 0;
      if constexpr (kDim == 0) {
        index = pack_digits(args, digits);
        digits += args.dim;
      } else {
#pragma GCC unroll 16
        for (int d = 0; d < kDim; ++d) index += args.place[d] * digits[d];
        digits += kDim;
      }
      indices[g * args.tokens + n * stride] = index;
    }
  }
}

template <int kDim>
static inline void pack_tokens_up_to(const PackDigitsArgs& args, const int16_t* digits,
                                     int64_t count, int64_t* indices, int64_t stride) {
  if constexpr (kDim == 0) {
    pack_tokens_of<0>(args, digits, count, indices, stride);
  } else if (args.dim == kDim) {
    pack_tokens_of<kDim>(args, digits, count, indices, stride);
  } else {
    pack_tokens_up_to<kDim - 1>(args, digits, count, indices, stride);
  }
}

void pack_tokens(const PackDigitsArgs& args, const int16_t* digits, int64_t count, int64_t* indices,
                 int64_t stride) {
  pack_tokens_up_to<8>(args, digits, count, indices, stride);
}

static inline Doubles load_doubles(const double* p) { return *reinterpret_cast<const Doubles*>(p); }

// The inner product of a group's numbers.
template <typename T>
static inline double product_of(const T* a, const T* b, int count) {
  Doubles sums = {};
  int i = 0;
  for (; i + kHalfLanes <= count; i += kHalfLanes) {
    sums += load_doubles(a + i) * load_doubles(b + i);
  }
  double sum = horizontal_sum(sums);
  for (; i < count; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

template <typename T>
void stand_in(const StandInTable<T>& table, const T* rows, int64_t size, T* z) {
  if (table.kind == StandIn::kUnit) {
    for (int64_t first = 0; first < size; first += table.group) {
      const T* row = rows + first;
      const T inverse = static_cast<T>(inverse_norm(product_of(row, row, table.group), true));
      for (int d = 0; d < table.group; ++d) z[first + d] = row[d] * inverse;
    }
    return;
  }
  const T *inner = table.curves, *shift = inner + table.width;
  const T *outer = shift + table.width, *offset = outer + table.width;
  for_vectors<T>(size, table.width, [&](int64_t at, int j, int n) {
    const auto y = load_some(rows + at, n) * load_some(inner + j, n) + load_some(shift + j, n);
    const auto value = bend<VectorMath<T>>(table.kind, y).value;
    store_some(value * load_some(outer + j, n) + load_some(offset + j, n), z + at, n);
  });
}

template <typename T>
void stand_in_backward(const StandInTable<T>& table, const T* rows, int64_t size, T* grad) {
  if (table.kind == StandIn::kUnit) {
    for (int64_t first = 0; first < size; first += table.group) {
      const T* row = rows + first;
      T* g = grad + first;
      const GroupTranspose transpose =
          group_transpose(product_of(row, row, table.group), product_of(row, g, table.group), true);
      const T scale = static_cast<T>(transpose.scale);
      const T along = static_cast<T>(transpose.projection * transpose.scale);
      for (int d = 0; d < table.group; ++d) g[d] = (g[d] - row[d] * along) * scale;
    }
    return;
  }
  const T *inner = table.curves, *shift = inner + table.width, *outer = shift + table.width;
  for_vectors<T>(size, table.width, [&](int64_t at, int j, int n) {
    const auto by = load_some(inner + j, n);
    const auto y = load_some(rows + at, n) * by + load_some(shift + j, n);
    const auto slope = bend<VectorMath<T>>(table.kind, y).slope;
    store_some(load_some(grad + at, n) * slope * (by * load_some(outer + j, n)), grad + at, n);
  });
}

template <typename T>
T squared_error(const T* a, const T* b, int64_t size) {
  typename VectorOf<T>::Numbers sum = {};
  for_vectors<T>(size, kVectorWidth<T>, [&](int64_t at, int, int n) {
    const auto error = load_some(a + at, n) - load_some(b + at, n);
    sum += error * error;
  });
  return sum_of<T>(sum);
}

template <typename T>
T sign_choices(const T* z, int64_t size, int width, T slope, T* chances) {
  using X = typename VectorOf<T>::Numbers;
  X entropy = {};
  for_vectors<T>(size, width, [&](int64_t at, int j, int n) {
    const auto choice = sign_choice<VectorMath<T>>(static_cast<X>(load_some(z + at, n) * slope));
    store_some(load_some(chances + j, n) + choice.chance, chances + j, n);
    if (n == kVectorWidth<T>) {
      entropy += choice.entropy;
    } else {
      for (int i = 0; i < n; ++i) entropy[i] += choice.entropy[i];
    }
  });
  return sum_of<T>(entropy);
}

template <typename T>
void sign_choices_backward(const T* z, int64_t size, int width, T slope, T by_entropy,
                           const T* by_chance, T* grad) {
  using X = typename VectorOf<T>::Numbers;
  const X by = X{} + by_entropy;
  for_vectors<T>(size, width, [&](int64_t at, int j, int n) {
    const X of_logit = sign_choice_backward<VectorMath<T>>(
        static_cast<X>(load_some(z + at, n) * slope), load_some(by_chance + j, n), by);
    store_some(load_some(grad + at, n) + of_logit * slope, grad + at, n);
  });
}

}  // namespace
}  // namespace tokenflow::cpu
