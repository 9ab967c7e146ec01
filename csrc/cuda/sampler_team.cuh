// What the threads of a sampler's block do together: sums, searches by histograms, and lists of
// entries.
#pragma once

#include "device.cuh"
#include "sampler.h"

namespace tokenflow::cuda {

template <int kThreads>
struct SamplerShared {
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kList = 2 * kThreads;
  RowSettings settings;
  uint64_t partial[kWarps];
  // 64-bit sums a bin, as two words: shared memory adds 32 bits at once.
  uint32_t low_word[kThreads];
  uint32_t high_word[kThreads];
  uint64_t found_below;
  uint32_t found;
  // Candidates, in order of their positions.
  uint32_t keys[kList];
  uint32_t positions[kList];
};

template <LogitType kType>
__device__ __forceinline__ float load_logit(const void* logits, int64_t i) {
  if constexpr (kType == LogitType::kFloat) {
    return static_cast<const float*>(logits)[i];
  } else if constexpr (kType == LogitType::kBFloat16) {
    return from_bfloat16(static_cast<const uint16_t*>(logits)[i]);
  } else {
    return from_half(static_cast<const uint16_t*>(logits)[i]);
  }
}

template <LogitType kType>
struct Row {
  const void* logits;
  const void* uncond;
  int64_t first_logit;
  int64_t first_uncond;
  Guidance guidance;

  __device__ __forceinline__ float logit(int i) const {
    return load_logit<kType>(logits, first_logit + i);
  }
  __device__ __forceinline__ float unconditional(int i) const {
    return guidance.on ? load_logit<kType>(uncond, first_uncond + i) : 0.0f;
  }
  __device__ __forceinline__ Combined combined(float logit, float unconditional) const {
    return guidance.on ? guided<kType>(logit, unconditional, guidance) : unguided<kType>(logit);
  }
};

// Codes with their keys: kept in shared memory, or read and combined again.
template <LogitType kType>
struct Entries {
  const uint32_t* keys;       // null: from the row
  const uint32_t* positions;  // null: entry i is code i
  int count;
  Row<kType> row;

  __device__ __forceinline__ uint32_t key(int i) const {
    return keys ? keys[i] : key_of(row.combined(row.logit(i), row.unconditional(i)));
  }
  __device__ __forceinline__ int position(int i) const {
    return positions ? static_cast<int>(positions[i]) : i;
  }
};

struct Scan {
  uint64_t before;  // sum over lower threads
  uint64_t total;
};

struct Boundary {
  uint32_t key;
  uint64_t below;
};

// What the threads of a block do together.
template <int kThreads>
struct Team {
  static constexpr int kWarps = kThreads / kWarpSize;
  SamplerShared<kThreads>& shared;

  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }

  __device__ __forceinline__ uint64_t partial_of_lane() const {
    return lane_index() < kWarps ? shared.partial[lane_index()] : 0;
  }

  __device__ __forceinline__ Scan scan(uint64_t value) const {
    uint64_t up_to = value;
    for (int step = 1; step < kWarpSize; step *= 2) {
      const uint64_t lower = shuffle_up(up_to, step);
      if (lane_index() >= step) up_to += lower;
    }
    if (lane_index() == kWarpSize - 1) shared.partial[warp_index()] = up_to;
    block_barrier();
    uint64_t total = partial_of_lane(), lower = lane_index() < warp_index() ? total : 0;
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      total += shuffle_xor(total, mask);
      lower += shuffle_xor(lower, mask);
    }
    block_barrier();
    return {lower + up_to - value, total};
  }

  __device__ __forceinline__ uint64_t sum(uint64_t value) const {
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    if (lane_index() == 0) shared.partial[warp_index()] = value;
    block_barrier();
    uint64_t total = partial_of_lane();
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
    block_barrier();
    return total;
  }

  // The largest key, and whether any thread has the flag.
  __device__ __forceinline__ uint32_t maximum(uint32_t key, bool* flag) const {
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      const uint32_t other = shuffle_xor(key, mask);
      key = other > key ? other : key;
    }
    const uint64_t flagged = ballot(*flag) != 0 ? 1 : 0;
    if (lane_index() == 0) shared.partial[warp_index()] = flagged << 32 | key;
    block_barrier();
    const uint64_t partial = partial_of_lane();
    key = static_cast<uint32_t>(partial);
    *flag = ballot(partial >> 32 != 0) != 0;
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      const uint32_t other = shuffle_xor(key, mask);
      key = other > key ? other : key;
    }
    block_barrier();
    return key;
  }

  // The key at which the sum of values over keys in [low, key] first exceeds `limit`, and the sum
  // below it, found by `levels` histograms of kThreads bins each, every one over the bin that the
  // last one found; the lower end of that bin where levels run out, or where the sum below it is
  // just the limit. visit(add) calls add(key, value) for this thread's share. The sum over
  // [low, high] exceeds the limit.
  template <typename Visit>
  __device__ __forceinline__ Boundary find_boundary(uint32_t low, uint32_t high, uint64_t limit,
                                                    int levels, const Visit& visit) const {
    uint64_t below = 0;
    for (;; --levels) {
      int shift = 0;
      while ((high - low) >> shift >= static_cast<uint32_t>(kThreads)) ++shift;
      shared.low_word[thread()] = 0;
      shared.high_word[thread()] = 0;
      block_barrier();
      visit([&](uint32_t key, uint64_t value) {
        if (key < low || key > high || value == 0) return;
        const uint32_t bin = (key - low) >> shift, word = static_cast<uint32_t>(value);
        const uint32_t before = atomic_add(&shared.low_word[bin], word);
        // Whoever makes the low word overflow carries: the sum is exact in any order.
        const uint32_t carry = before + word < before ? 1u : 0u;
        const uint32_t rest = static_cast<uint32_t>(value >> 32) + carry;
        if (rest != 0) atomic_add(&shared.high_word[bin], rest);
      });
      block_barrier();
      const uint64_t own = uint64_t{shared.high_word[thread()]} << 32 | shared.low_word[thread()];
      const uint64_t before = below + scan(own).before;
      if (before <= limit && limit < before + own) {
        shared.found = static_cast<uint32_t>(thread());
        shared.found_below = before;
      }
      block_barrier();
      below = shared.found_below;
      low += shared.found << shift;
      const uint32_t others = (1u << shift) - 1u;
      if (high - low > others) high = low + others;
      if (shift == 0 || below == limit || levels == 1) return {low, below};
    }
  }

  // The first i in [0, count) at which the running sum of value(i) exceeds `target`. There is one.
  template <typename Value>
  __device__ __forceinline__ int find_in_running_sum(int count, uint64_t target,
                                                     const Value& value) const {
    uint64_t before = 0;
    for (int first = 0; first < count && before <= target; first += kThreads) {
      const int i = first + thread();
      const uint64_t own = i < count ? value(i) : 0;
      const Scan tile = scan(own);
      const uint64_t lower = before + tile.before;
      if (lower <= target && target < lower + own) shared.found = static_cast<uint32_t>(i);
      before += tile.total;
    }
    block_barrier();
    return static_cast<int>(shared.found);
  }

  // Lists the entries with keys of at least `bound`, in order, if there is room for all of them;
  // returns how many they are. A warp owns a range of entries.
  template <LogitType kType>
  __device__ __forceinline__ int gather(const Entries<kType>& entries, uint32_t bound) const {
    const int share = (entries.count + kThreads - 1) / kThreads * kWarpSize;
    const int begin = warp_index() * share;
    const int end = begin + share < entries.count ? begin + share : entries.count;
    int own = 0;
    for (int first = begin; first < end; first += kWarpSize) {
      const int i = first + lane_index();
      own += count_bits(ballot(i < end && entries.key(i) >= bound));
    }
    const bool last_lane =
        lane_index() == kWarpSize - 1;  // of the warp's count others know nothing
    const Scan warps = scan(last_lane ? static_cast<uint64_t>(own) : 0);
    const int count = static_cast<int>(warps.total);
    if (count > SamplerShared<kThreads>::kList) return count;
    int next = static_cast<int>(warps.before);
    for (int first = begin; first < end; first += kWarpSize) {
      const int i = first + lane_index();
      const uint32_t key = i < end ? entries.key(i) : 0;
      const bool keep = i < end && key >= bound;
      const unsigned kept = ballot(keep);
      if (keep) {
        const int at = next + count_bits(kept & ((1u << lane_index()) - 1u));
        shared.keys[at] = key;
        shared.positions[at] = static_cast<uint32_t>(entries.position(i));
      }
      next += count_bits(kept);
    }
    block_barrier();
    return count;
  }
};

}  // namespace tokenflow::cuda
