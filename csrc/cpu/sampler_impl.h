// Body of sampler_portable.cpp, sampler_avx2.cpp and sampler_avx512.cpp: one source, compiled with
// each instruction set's flags. TOKENFLOW_SAMPLE_ROW names the function that the including file
// defines. Everything else has internal linkage (see kernels_impl.h).
//
// A row of V codes: one pass over the logits leaves 4 V bytes of keys in the L2 and
// the maxima of groups of 8 of them in the first. The k-th largest maximum is a lower bound of the
// k-th largest key: k groups hold a key that is no smaller. What is above it, some 5% more than k
// codes as a rule, is gathered, and all that follows runs over these: the k-th largest key,
// weights, top-p's boundary, the draw. Boundaries are found by bisection: a step is a pass of
// compares and adds, so that a vector of keys costs a cycle or two, where a histogram costs a cycle
// or two a key.
#include <cstddef>

#include "sampler_kernels.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace tokenflow::cpu {
namespace {

struct FloatLogit {
  static constexpr LogitType kType = LogitType::kFloat;
  typedef float Stored;
  static inline float load(Stored stored) { return stored; }
};
struct BFloat16Logit {
  static constexpr LogitType kType = LogitType::kBFloat16;
  typedef uint16_t Stored;
  static inline float load(Stored stored) { return from_bfloat16(stored); }
};
struct HalfLogit {
  static constexpr LogitType kType = LogitType::kHalf;
  typedef uint16_t Stored;
  static inline float load(Stored stored) { return from_float16(stored); }
};

struct Scratch {
  uint32_t* keys;       // [codes], then masked keys up to a whole block
  uint32_t* group_max;  // [groups]
  // Candidates, in order of their positions.
  uint32_t* candidate_keys;
  uint32_t* positions;
  uint64_t* weights;
  uint64_t* open_weights;  // with `keys`, once they are gathered: where top-p's boundary may lie
};

struct KeySummary {
  uint32_t largest;
  bool any_nan;
};

// Keys of up to a block's codes.
template <typename Logit, bool kGuided>
static inline uint32_t make_keys_of(const typename Logit::Stored* logits,
                                    const typename Logit::Stored* uncond, const Guidance& guidance,
                                    int64_t count, uint32_t* keys) {
  uint32_t any_nan = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float logit = Logit::load(logits[i]);
    const Combined code = kGuided ? guided<Logit::kType>(logit, Logit::load(uncond[i]), guidance)
                                  : unguided<Logit::kType>(logit);
    any_nan |= is_nan(code);
    keys[i] = key_of(code);
  }
  return any_nan;
}

template <typename Logit, bool kGuided>
static KeySummary make_keys(const SampleArgs& args, int64_t row, const Guidance& guidance,
                            const Scratch& scratch) {
  typedef typename Logit::Stored Stored;
  const Stored* logits =
      static_cast<const Stored*>(args.logits.data) + first_of_row(args.logits, args.inner, row);
  const Stored* uncond = nullptr;
  if (kGuided) {
    uncond =
        static_cast<const Stored*>(args.uncond.data) + first_of_row(args.uncond, args.inner, row);
  }
  uint32_t any_nan = 0;
  uint32_t largest[kBlockGroups] = {};
  for (int64_t first = 0; first < args.codes; first += kBlockOfKeys) {
    uint32_t* keys = scratch.keys + first;
    if (first + kBlockOfKeys <= args.codes) {
      any_nan |= make_keys_of<Logit, kGuided>(logits + first, kGuided ? uncond + first : nullptr,
                                              guidance, kBlockOfKeys, keys);
    } else {
      const int64_t count = args.codes - first;
      any_nan |= make_keys_of<Logit, kGuided>(logits + first, kGuided ? uncond + first : nullptr,
                                              guidance, count, keys);
      for (int64_t i = count; i < kBlockOfKeys; ++i) keys[i] = kMaskedKey;
    }
    uint32_t* group_max = scratch.group_max + first / kGroupCodes;
    for (int64_t g = 0; g < kBlockGroups; ++g) {
      uint32_t most = keys[g];
      for (int64_t i = 1; i < kGroupCodes; ++i) {
        const uint32_t key = keys[i * kBlockGroups + g];
        most = key > most ? key : most;
      }
      group_max[g] = most;
      largest[g] = most > largest[g] ? most : largest[g];
    }
  }
  KeySummary summary = {0, any_nan != 0};
  for (int64_t g = 0; g < kBlockGroups; ++g) {
    summary.largest = largest[g] > summary.largest ? largest[g] : summary.largest;
  }
  return summary;
}

static KeySummary make_keys(const SampleArgs& args, int64_t row, const Guidance& guidance,
                            const Scratch& scratch) {
  switch (args.type) {
    case LogitType::kBFloat16:
      return guidance.on ? make_keys<BFloat16Logit, true>(args, row, guidance, scratch)
                         : make_keys<BFloat16Logit, false>(args, row, guidance, scratch);
    case LogitType::kHalf:
      return guidance.on ? make_keys<HalfLogit, true>(args, row, guidance, scratch)
                         : make_keys<HalfLogit, false>(args, row, guidance, scratch);
    default:
      return guidance.on ? make_keys<FloatLogit, true>(args, row, guidance, scratch)
                         : make_keys<FloatLogit, false>(args, row, guidance, scratch);
  }
}

static uint64_t count_below(const uint32_t* keys, int64_t count, uint32_t bound) {
  // 32 bits count 2^22 codes, and leave the vectors as wide as those of the keys.
  uint32_t below = 0;
  for (int64_t i = 0; i < count; ++i) below += keys[i] < bound ? 1u : 0u;
  return below;
}

static uint64_t weight_below(const uint32_t* keys, const uint64_t* weights, int64_t count,
                             uint32_t bound) {
  uint64_t below = 0;
  for (int64_t i = 0; i < count; ++i) below += keys[i] < bound ? weights[i] : 0;
  return below;
}

static uint64_t sum(const uint64_t* weights, int64_t count) {
  uint64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += weights[i];
  return total;
}

struct Boundary {
  uint32_t key;    // what lies below may be dropped
  uint64_t below;  // the sum of it
};

struct NeverNarrow {
  void operator()(const Boundary&, uint32_t) const {}
};

// The largest boundary in [low, end) whose sum below is at most `limit`, or, as it decides the
// same, one where the sum is within `slack` of the limit. sum_below(low) is at most the limit and
// sum_below(end) is not.
//
// narrow(found, end) is told after each step that the boundary lies in [found.key, end).
template <typename SumBelow, typename Narrow = NeverNarrow>
static inline Boundary find_boundary(uint32_t low, uint32_t end, uint64_t limit, uint64_t slack,
                                     const SumBelow& sum_below, const Narrow& narrow = Narrow()) {
  Boundary found = {low, sum_below(low)};
  for (int step = 0; end - found.key > 1 && limit - found.below > slack; ++step) {
    uint32_t middle = found.key + (end - found.key) / 2;
    if (step < 12) {
      // Halve the interval of numbers, not that of keys, most of which are close to zero.
      const uint32_t half = key_of(0.5f * value_of(found.key) + 0.5f * value_of(end));
      if (half > found.key && half < end) middle = half;
    }
    const uint64_t below = sum_below(middle);
    if (below <= limit) {
      found = {middle, below};
    } else {
      end = middle;
    }
    narrow(found, end);
  }
  return found;
}

// Keeps those of `count` keys in [low, end), with their weights, in order; returns how many. As
// `gather` reads and writes.
static int64_t keep_open(const uint32_t* keys, const uint64_t* weights, int64_t count, uint32_t low,
                         uint32_t end, uint32_t* to_keys, uint64_t* to_weights) {
  int64_t found = 0;
#if defined(__AVX512F__)
  const __m512i least = _mm512_set1_epi32(static_cast<int>(low));
  const __m512i width = _mm512_set1_epi32(static_cast<int>(end - low));
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __m512i weight0 = _mm512_loadu_si512(weights + i);
    const __m512i weight1 = _mm512_loadu_si512(weights + i + 8);
    __mmask16 keep = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(key, least), width);
    if (count - i < 16) keep &= static_cast<__mmask16>((1u << (count - i)) - 1u);
    const __mmask8 keep0 = static_cast<__mmask8>(keep), keep1 = static_cast<__mmask8>(keep >> 8);
    _mm512_storeu_si512(to_keys + found, _mm512_maskz_compress_epi32(keep, key));
    _mm512_storeu_si512(to_weights + found, _mm512_maskz_compress_epi64(keep0, weight0));
    found += __builtin_popcount(keep0);
    _mm512_storeu_si512(to_weights + found, _mm512_maskz_compress_epi64(keep1, weight1));
    found += __builtin_popcount(keep1);
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = keys[i];
    to_keys[found] = key;
    to_weights[found] = weights[i];
    found += key - low < end - low ? 1 : 0;
  }
#endif
  return found;
}

// Top-p's boundary: where there are many candidates, those that are decided are left out in time.
static Boundary find_weight_boundary(const uint32_t* keys, const uint64_t* weights, int64_t count,
                                     uint32_t low, uint32_t end, uint64_t limit,
                                     const Scratch& scratch) {
  constexpr int64_t kFew = 1024;
  constexpr int kSteps = 3;
  uint64_t decided = 0;  // sum of what was left out below
  int steps = 0;
  return find_boundary(
      low, end, limit, 0,
      [&](uint32_t middle) { return decided + weight_below(keys, weights, count, middle); },
      [&](const Boundary& found, uint32_t open_end) {
        if (count <= kFew || ++steps % kSteps != 0) return;
        count = keep_open(keys, weights, count, found.key, open_end, scratch.keys,
                          scratch.open_weights);
        keys = scratch.keys;
        weights = scratch.open_weights;
        decided = found.below;
      });
}

// Keeps those of `count` keys that are at least `bound`, with their positions (`from_positions`, or
// null for 0, 1, ...), in order; returns how many. In place where `keys` is `to_keys`. Reads and
// writes whole vectors: of `keys`, there must be a multiple of 16.
static int64_t gather(const uint32_t* keys, const uint32_t* from_positions, int64_t count,
                      uint32_t bound, uint32_t* to_keys, uint32_t* to_positions) {
  int64_t found = 0;
#if defined(__AVX512F__)
  const __m512i least = _mm512_set1_epi32(static_cast<int>(bound));
  __m512i position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    if (from_positions) position = _mm512_loadu_si512(from_positions + i);
    __mmask16 keep = _mm512_cmpge_epu32_mask(key, least);
    if (count - i < 16) keep &= static_cast<__mmask16>((1u << (count - i)) - 1u);
    // Compressed in registers and stored whole: to memory it is slow on many processors.
    _mm512_storeu_si512(to_keys + found, _mm512_maskz_compress_epi32(keep, key));
    _mm512_storeu_si512(to_positions + found, _mm512_maskz_compress_epi32(keep, position));
    found += __builtin_popcount(keep);
    if (!from_positions) position = _mm512_add_epi32(position, _mm512_set1_epi32(16));
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = keys[i];
    to_keys[found] = key;
    to_positions[found] = from_positions ? from_positions[i] : static_cast<uint32_t>(i);
    found += key >= bound ? 1 : 0;
  }
#endif
  return found;
}

static int64_t first_position_of(const uint32_t* keys, int64_t count, uint32_t key) {
  int64_t i = 0;
  while (i + 1 < count && keys[i] != key) ++i;
  return i;
}

// Position of the candidate at which the running sum exceeds `target`.
static int64_t find_in_running_sum(const uint64_t* weights, int64_t count, uint64_t target) {
  constexpr int64_t kStride = 64;
  int64_t i = 0;
  for (; i + kStride < count; i += kStride) {
    const uint64_t step = sum(weights + i, kStride);
    if (step > target) break;
    target -= step;
  }
  for (; i + 1 < count; ++i) {
    if (weights[i] > target) break;
    target -= weights[i];
  }
  return i;
}

static void draw(const SampleArgs& args, const RowSettings& settings, const Scratch& scratch,
                 uint32_t largest, int64_t* index, float* probability) {
  if (settings.top_k == 1) {
    *index = first_position_of(scratch.keys, args.codes, largest);
    *probability = 1.0f;
    return;
  }
  const int64_t padded = (args.codes + kBlockOfKeys - 1) / kBlockOfKeys * kBlockOfKeys;
  const float maximum = value_of(largest);
  const uint32_t end = largest + 1;
  uint32_t bound = least_weighted_key(maximum, settings.twice_inverse_temperature);

  // A bound of the k-th largest key: k of the groups' maxima are no smaller.
  const int64_t k = settings.top_k, groups = padded / kGroupCodes;
  if (k < args.codes && k <= groups &&
      groups - static_cast<int64_t>(count_below(scratch.group_max, groups, bound)) > k) {
    bound = find_boundary(
                bound, end, static_cast<uint64_t>(groups - k), static_cast<uint64_t>(k / 8),
                [&](uint32_t middle) { return count_below(scratch.group_max, groups, middle); })
                .key;
  }
  uint32_t* keys = scratch.candidate_keys;
  uint64_t* weights = scratch.weights;
  int64_t count = gather(scratch.keys, nullptr, padded, bound, keys, scratch.positions);

  if (k < count) {
    bound = find_boundary(bound, end, static_cast<uint64_t>(count - k), 0, [&](uint32_t middle) {
              return count_below(keys, count, middle);
            }).key;
    count = gather(keys, scratch.positions, count, bound, keys, scratch.positions);
  }

  uint64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    weights[i] = fixed_point_weight(value_of(keys[i]), maximum, settings.twice_inverse_temperature);
  }
  total = sum(weights, count);

  if (settings.droppable_share >= 0) {
    const uint64_t limit = droppable(settings.droppable_share, total);
    const Boundary boundary =
        find_weight_boundary(keys, weights, count, bound, end, limit, scratch);
    for (int64_t i = 0; i < count; ++i) weights[i] = keys[i] < boundary.key ? 0 : weights[i];
    total -= boundary.below;
    // Of the codes at the boundary, equal ones, the first may go as well.
    uint64_t left = limit - boundary.below;
    for (int64_t i = 0; left > 0 && i < count; ++i) {
      if (keys[i] != boundary.key) continue;
      if (weights[i] > left) break;
      left -= weights[i];
      total -= weights[i];
      weights[i] = 0;
    }
  }

  if (settings.least_weight > 0) {
    for (int64_t i = 0; i < count; ++i) {
      weights[i] = weights[i] < settings.least_weight ? 0 : weights[i];
    }
    total = sum(weights, count);
  }

  const int64_t chosen = find_in_running_sum(weights, count, scaled_random(settings.random, total));
  *index = scratch.positions[chosen];
  *probability =
      static_cast<float>(static_cast<double>(weights[chosen]) / static_cast<double>(total));
}

}  // namespace

void TOKENFLOW_SAMPLE_ROW(const SampleArgs& args, int64_t row, std::byte* memory) {
  const int64_t padded = (args.codes + kBlockOfKeys - 1) / kBlockOfKeys * kBlockOfKeys;
  Scratch scratch;
  scratch.weights = reinterpret_cast<uint64_t*>(memory);
  scratch.open_weights = scratch.weights + padded + kBlockGroups;
  scratch.keys = reinterpret_cast<uint32_t*>(scratch.open_weights + padded + kBlockGroups);
  scratch.group_max = scratch.keys + padded + kBlockGroups;
  scratch.candidate_keys = scratch.group_max + padded / kGroupCodes;
  scratch.positions = scratch.candidate_keys + padded + kBlockGroups;

  const RowSettings settings = row_settings(args, row);
  const KeySummary summary = make_keys(args, row, guidance_of(args, row), scratch);
  uint8_t status = settings.status;
  if (summary.any_nan) status |= kLogitsNaN;
  if (summary.largest == kInfinityKey) status |= kLogitsInfinite;
  if (summary.largest > kMaskedKey) {
    draw(args, settings, scratch, summary.largest, args.indices + row, args.probability + row);
  } else {
    status |= kLogitsMasked;
    args.indices[row] = 0;
    args.probability[row] = 0;
  }
  args.status[row] = status;
}

}  // namespace tokenflow::cpu
