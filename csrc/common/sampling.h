// Drawing a code from logits, filtered by top-k, top-p and min-p: the arithmetic that both back
// ends share, so that they draw the same code for the same seed.
//
//   z_i = (1 + t) logits_i - t uncond_i, times a power of two (guidance t, rounded as `guided`
//   does);
//         masked codes (`Combined`) have no part in what follows
//   top-k: the codes with z_i >= the k-th largest stay, ties included
//   w_i = exp((z_i - max z) / temperature), a fixed-point number of kWeightBits fractional bits
//   top-p: in ascending order of (z_i, i), codes are dropped while the sum of their w is at most
//          (1 - p) of the whole; the last one always stays
//   min-p: codes with w_i < min_p * max w are dropped
//   draw:  the first i, in order of i, at which the running sum of w exceeds random * sum
//
// After `guided` everything is exact: codes are compared by integer keys, weights are integers, and
// sums of integers do not depend on their order, on threads or on vector widths. How the boundaries
// are found is a back end's own affair: they are defined by the sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"
#include "philox.h"
#include "row_argument.h"

namespace tokenflow {

enum class LogitType { kFloat, kBFloat16, kHalf };

// Rows [outer, inner] of logits: row r begins at (r / inner) * outer_stride
// + (r % inner) * inner_stride, and its codes follow one another. Strides count elements.
struct LogitRows {
  const void* data;
  int64_t outer_stride;
  int64_t inner_stride;
};

struct SampleArgs {
  LogitType type;
  int64_t rows;
  int64_t inner;
  int64_t codes;  // 1 .. kMostCodes
  LogitRows logits;
  LogitRows uncond;  // data may be null: no guidance
  RowArgument<int64_t> top_k;
  RowArgument<double> top_p;
  RowArgument<double> min_p;
  RowArgument<double> temperature;
  RowArgument<double> guidance;
  RowArgument<int64_t> seed;
  RowArgument<int64_t> offset;
  int64_t* indices;    // out [rows]
  float* probability;  // out [rows]: of the drawn code among those that stayed; 0 if none did
  uint8_t* status;     // out [rows]: SampleStatus bits, what the row's inputs had wrong
};

// The largest number of codes whose weights can be summed in 64 bits with room to spare.
constexpr int64_t kMostCodes = int64_t{1} << 22;

// Beyond the number of codes top-k is off; beyond this it is no number of codes but a mistake.
constexpr int64_t kLargestTopK = 0x7fffffff;

// What is wrong with a row. The draw is defined all the same (tokenflow_ext/sampler.py says how).
enum SampleStatus : uint8_t {
  kLogitsNaN = 1,
  kLogitsInfinite = 2,  // +infinity
  kLogitsMasked = 4,    // no code is left
  kTopKTooLarge = 8,
  kTopPOutOfRange = 16,
  kTemperatureNotPositive = 32,
  kGuidanceNotFinite = 64,
  kMinPOutOfRange = 128,
};

// Fractional bits of a weight: weights are 0 .. 2^40, and the largest code's is 2^40.
constexpr int kWeightBits = 40;

// How a row's two logits become one: factors of a z that is `scale` times the true one.
struct Guidance {
  float cond_factor;    // 1 + t
  float uncond_factor;  // -t
  double scale;         // a power of two
  bool on;              // else z is the logits as they are
};

TOKENFLOW_HOST_DEVICE bool is_finite_guidance(double t) { return t >= -1.0e30 && t <= 1.0e30; }

TOKENFLOW_HOST_DEVICE Guidance guidance_of(const SampleArgs& args, int64_t row) {
  const double t = value_at(args.guidance, row);
  if (args.uncond.data == nullptr || t == 0) return {1.0f, 0.0f, 1.0, false};
  if (!is_finite_guidance(t)) return {NAN, NAN, 1.0, true};
  // With (|1 + t| + |t|) scale < 1/2, no z of finite logits overflows; only what is subnormal loses
  // bits by it. The sum is at least 1, a normal number.
  const double sum = fabs(1.0 + t) + fabs(t);
  uint64_t bits;
  memcpy(&bits, &sum, sizeof(bits));
  bits = (uint64_t{2044} - (bits >> 52)) << 52;
  double scale;
  memcpy(&scale, &bits, sizeof(scale));
  return {static_cast<float>((1.0 + t) * scale), static_cast<float>(-t * scale), scale, true};
}

// A row's other arguments as the kernels use them.
struct RowSettings {
  int64_t top_k;                    // 1 .. codes; 1 is argmax, codes is off
  double droppable_share;           // 1 - top_p; < 0 is off
  uint64_t least_weight;            // of a code that stays; 0 is off
  float twice_inverse_temperature;  // of z, with its scale; not negative
  uint64_t random;
  uint8_t status;
};

TOKENFLOW_HOST_DEVICE RowSettings row_settings(const SampleArgs& args, int64_t row) {
  RowSettings settings = {};
  const int64_t top_k = value_at(args.top_k, row);
  const double top_p = value_at(args.top_p, row);
  const double temperature = value_at(args.temperature, row);
  settings.top_k = top_k > 0 && top_k < args.codes ? top_k : args.codes;
  if (top_k > kLargestTopK) settings.status |= kTopKTooLarge;
  settings.droppable_share = top_p > 0 ? (top_p < 1 ? 1.0 - top_p : 0.0) : -1.0;
  if (!(top_p <= 1)) settings.status |= kTopPOutOfRange;
  const double min_p = value_at(args.min_p, row);
  if (min_p > 0 && min_p <= 1) {
    settings.least_weight =
        static_cast<uint64_t>(ceil(min_p * static_cast<double>(uint64_t{1} << kWeightBits)));
  }
  if (!(min_p <= 1)) settings.status |= kMinPOutOfRange;
  if (temperature > 0) {
    const double scale = guidance_of(args, row).scale;
    settings.twice_inverse_temperature = static_cast<float>(2.0 / temperature / scale);
  } else {
    settings.top_k = 1;  // the limit of small temperatures
  }
  if (!(temperature > 0 && temperature <= 1.7e308)) settings.status |= kTemperatureNotPositive;
  if (args.uncond.data && !is_finite_guidance(value_at(args.guidance, row))) {
    settings.status |= kGuidanceNotFinite;
  }
  settings.random = random_bits(static_cast<uint64_t>(value_at(args.seed, row)),
                                stream_position(args.seed, args.offset, row));
  return settings;
}

// Where a row begins, in elements.
TOKENFLOW_HOST_DEVICE int64_t first_of_row(const LogitRows& rows, int64_t inner, int64_t row) {
  return row / inner * rows.outer_stride + row % inner * rows.inner_stride;
}

// Conditions on codes are words, all ones or zero: loops over selects of floats are left scalar by
// compilers for all but AVX-512.
TOKENFLOW_HOST_DEVICE uint32_t word_of(bool condition) { return condition ? ~0u : 0u; }

TOKENFLOW_HOST_DEVICE uint32_t select(uint32_t condition, uint32_t where, uint32_t otherwise) {
#if defined(__CUDACC__)
  return condition != 0 ? where : otherwise;  // nvcc keeps such words in predicates
#else
  return (where & condition) | (otherwise & ~condition);
#endif
}

// Keys are ordered as the numbers are; both zeros have one key, a NaN has that of -infinity. Codes
// with that key are masked: they are never drawn.
constexpr uint32_t kMaskedKey = 0x007fffffu;
constexpr uint32_t kInfinityKey = 0xff800000u;

TOKENFLOW_HOST_DEVICE uint32_t key_of(float z, uint32_t masked = 0) {
  masked |= word_of(z != z);
  z += 0.0f;
  uint32_t bits;
  memcpy(&bits, &z, sizeof(bits));
  bits ^= static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u;
  return select(masked, kMaskedKey, bits);
}

// A code's z, and whether it is masked: its logit, or the unconditional one, is -infinity or the
// lowest number of the type. For float32 that is bfloat16's, so that a mask is one after a cast
// too. A masked code's z means nothing.
struct Combined {
  float z;
  uint32_t masked;
};

template <LogitType kType>
TOKENFLOW_HOST_DEVICE Combined unguided(float logit) {
  return {logit, word_of(logit <= (kType == LogitType::kHalf ? -65504.0f : -3.38953139e38f))};
}

// The product is rounded, then one fused multiply-add: the same bits everywhere.
template <LogitType kType>
TOKENFLOW_HOST_DEVICE Combined guided(float logit, float uncond, const Guidance& guidance) {
  return {fmaf(guidance.cond_factor, logit, guidance.uncond_factor * uncond),
          unguided<kType>(logit).masked | unguided<kType>(uncond).masked};
}

TOKENFLOW_HOST_DEVICE uint32_t key_of(const Combined& code) { return key_of(code.z, code.masked); }

// Whether z is a NaN that makes the row's inputs wrong, as a word.
TOKENFLOW_HOST_DEVICE uint32_t is_nan(const Combined& code) {
  return select(code.masked, 0u, word_of(code.z != code.z));
}

TOKENFLOW_HOST_DEVICE float value_of(uint32_t key) {
  const uint32_t bits = key ^ (((key >> 31) - 1u) | 0x80000000u);
  float z;
  memcpy(&z, &bits, sizeof(z));
  return z;
}

// A logit this far below the largest, times the temperature, has weight zero.
constexpr float kWeightlessBelow = 30.0f;

// exp((z - largest) / temperature) in fixed point, rounded down. With d the exponent as
// rounded, n = rint(d / ln 2) and r = d - n ln 2, exp(r) is a polynomial of degree 6 (minimax on
// |r| <= ln 2 / 2, off by 2^-27.9) whose 24 bits are shifted into place: within 2^-23 of exp(d),
// and 2^-40 for what the shift cuts off. Neither operand may be a NaN.
TOKENFLOW_HOST_DEVICE uint64_t fixed_point_weight(float z, float largest,
                                                  float twice_inverse_temperature) {
  const float toward_integer = 12582912.0f;  // 1.5 2^23: adding it leaves no fractional bits
  // Half the difference: the difference of two float32 need not be one.
  float d = fmaf(0.5f, z, -0.5f * largest) * twice_inverse_temperature;
  d = z == largest ? 0.0f : d;  // infinity - infinity, and 0 times infinity
  d = d > -40.0f ? d : -40.0f;  // weight zero, as is a NaN's
  const float n = fmaf(d, 1.44269504f, toward_integer) - toward_integer;
  float r = fmaf(n, -0.693145752f, d);
  r = fmaf(n, -1.42860677e-6f, r);
  float e = 1.38145988e-3f;
  e = fmaf(e, r, 8.36871751e-3f);
  e = fmaf(e, r, 4.1668389e-2f);
  e = fmaf(e, r, 0.166665211f);
  e = fmaf(e, r, 0.49999994f);
  e = fmaf(e, r, 1.0f);
  e = fmaf(e, r, 1.0f);
  // e is in [0.70, 1.42): a multiple of 2^-24.
  const uint64_t fraction = static_cast<uint64_t>(static_cast<int32_t>(e * 16777216.0f));
  return fraction << (kWeightBits - 24) >> -static_cast<int32_t>(n);
}

// A key that no code with a weight lies below.
TOKENFLOW_HOST_DEVICE uint32_t least_weighted_key(float largest, float twice_inverse_temperature) {
  const float least = largest - 2.0f * kWeightlessBelow / twice_inverse_temperature;
  const uint32_t key = key_of(least);  // that of -infinity for a NaN
  return key > kMaskedKey ? key : kMaskedKey + 1;
}

// How much may be dropped from weights that sum to `total` > 0: the last always stays.
TOKENFLOW_HOST_DEVICE uint64_t droppable(double share, uint64_t total) {
  const double limit = share * static_cast<double>(total);
  const uint64_t whole = static_cast<uint64_t>(limit);
  return whole < total ? whole : total - 1;
}

// random / 2^64 * total, rounded down: below total.
TOKENFLOW_HOST_DEVICE uint64_t scaled_random(uint64_t random, uint64_t total) {
  const uint64_t a = random >> 32, b = random & 0xffffffffu;
  const uint64_t c = total >> 32, d = total & 0xffffffffu;
  const uint64_t low = b * d, middle = a * d + (low >> 32);
  const uint64_t cross = b * c + (middle & 0xffffffffu);
  return a * c + (middle >> 32) + (cross >> 32);
}

// --- Half precision, exactly
// -----------------------------------------------------------------------

TOKENFLOW_HOST_DEVICE float from_bfloat16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &word, sizeof(value));
  return value;
}

// IEEE half, without subnormal float32 in between (which a thread may flush to zero).
TOKENFLOW_HOST_DEVICE float from_float16(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t subnormal = word_of(exponent == 0), not_finite = word_of(exponent == 0x0f800000u);
  uint32_t word = magnitude + 0x38000000u + (0x38000000u & not_finite) + (0x00800000u & subnormal);
  const uint32_t least = 0x38800000u & subnormal;  // 2^-14
  float value, offset;
  memcpy(&value, &word, sizeof(value));
  memcpy(&offset, &least, sizeof(offset));
  value -= offset;
  memcpy(&word, &value, sizeof(word));
  word |= static_cast<uint32_t>(bits & 0x8000u) << 16;
  memcpy(&value, &word, sizeof(value));
  return value;
}

}  // namespace tokenflow
