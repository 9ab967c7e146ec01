// Vectors of 8-bit products and their sums for coarse_score_int8_impl.h: AVX-512 with VNNI, NEON
// with dot products, AVX2. Internal linkage, as in packing.h.
#pragma once

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <cstdint>

#include "packing.h"

namespace tokenflow::cpu {
namespace {

#if defined(__AVX512VNNI__)
constexpr int kTileRows = 12;
constexpr int kRowLevels = 127;
constexpr int kTimesFloat = 4;
constexpr int kCodeOffset = 128;
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kTileRows = 8;
constexpr int kRowLevels = 127;
constexpr int kTimesFloat = 3;
constexpr int kCodeOffset = 0;
#else
constexpr int kTileRows = 6;
// Two products of a code (at most 255) and a row meet in 16 bits: 2 * 255 * 63 < 2^15.
constexpr int kRowLevels = 63;
constexpr int kTimesFloat = 3;
constexpr int kCodeOffset = 128;
#endif

#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kNarrowSums = false;
#else
constexpr bool kNarrowSums = true;
#endif

// GCC keeps arrays of this type in registers; of __m512i it does not.
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4)));

static inline Ints load(const void* p) { return *static_cast<const Ints*>(p); }

static inline Ints broadcast(int32_t x) { return x - Ints{}; }

#if defined(__AVX512VNNI__)
static inline __m512i raw(Ints a) { return reinterpret_cast<__m512i>(a); }

static inline Ints maximum(Ints a, Ints b) {
  return reinterpret_cast<Ints>(_mm512_max_epi32(raw(a), raw(b)));
}

static inline int32_t horizontal_maximum(Ints a) { return _mm512_reduce_max_epi32(raw(a)); }

// sum + the products of four unsigned bytes of `codes` with four signed ones of `row`, by lane.
static inline Ints dot4(Ints sum, Ints codes, Ints row) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(raw(sum), raw(codes), raw(row)));
}

static inline unsigned at_least(Ints a, Ints b) { return _mm512_cmpge_epi32_mask(raw(a), raw(b)); }

static inline Ints scaled_bias(const float* bias, float scale) {
  return reinterpret_cast<Ints>(
      _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(bias), _mm512_set1_ps(scale))));
}
#elif defined(__ARM_FEATURE_DOTPROD)
static inline int32x4_t raw(Ints a) { return reinterpret_cast<int32x4_t>(a); }

static inline Ints maximum(Ints a, Ints b) {
  return reinterpret_cast<Ints>(vmaxq_s32(raw(a), raw(b)));
}

static inline int32_t horizontal_maximum(Ints a) { return vmaxvq_s32(raw(a)); }

static inline Ints dot4(Ints sum, Ints codes, Ints row) {
  return reinterpret_cast<Ints>(
      vdotq_s32(raw(sum), reinterpret_cast<int8x16_t>(codes), reinterpret_cast<int8x16_t>(row)));
}

static inline unsigned at_least(Ints a, Ints b) {
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (a[i] >= b[i] ? 1u : 0u) << i;
  return mask;
}

static inline Ints scaled_bias(const float* bias, float scale) {
  return reinterpret_cast<Ints>(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(bias), scale)));
}
#else
static inline __m256i raw(Ints a) { return reinterpret_cast<__m256i>(a); }

static inline Ints maximum(Ints a, Ints b) {
  return reinterpret_cast<Ints>(_mm256_max_epi32(raw(a), raw(b)));
}

static inline int32_t horizontal_maximum(Ints a) {
  __m128i best = _mm_max_epi32(_mm256_castsi256_si128(raw(a)), _mm256_extracti128_si256(raw(a), 1));
  best = _mm_max_epi32(best, _mm_shuffle_epi32(best, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(best, _mm_shuffle_epi32(best, 0xb1)));
}

// The same in 16 bits, two sums a lane.
typedef uint16_t Sums __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4)));

static inline Sums dot4(Sums sum, Ints codes, Ints row) {
  return sum + reinterpret_cast<Sums>(_mm256_maddubs_epi16(raw(codes), raw(row)));
}

// The two sums of every lane added up.
static inline Ints widen(Sums sums) {
  return reinterpret_cast<Ints>(
      _mm256_madd_epi16(reinterpret_cast<__m256i>(sums), _mm256_set1_epi16(1)));
}

static inline unsigned at_least(Ints a, Ints b) {
  const __m256i less = _mm256_cmpgt_epi32(raw(b), raw(a));
  return ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(less))) & 0xffu;
}

static inline Ints scaled_bias(const float* bias, float scale) {
  return reinterpret_cast<Ints>(
      _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(bias), _mm256_set1_ps(scale))));
}
#endif

#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
typedef Ints Sums;

static inline Ints widen(Sums sums) { return sums; }
#endif

}  // namespace
}  // namespace tokenflow::cpu
