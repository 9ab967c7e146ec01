// What the threads of a sampler's block do together: the row's extremes, a list of candidates, and
// searches by histograms.
#pragma once

#include "device.cuh"
#include "sampler.h"
#include "sampler_row.cuh"

namespace tokenflow::cuda {

// The upper half of a key. Half keys are ordered as keys are, but different keys may share one.
constexpr int kHalfKeyBits = 16;

// An interval of keys or of positions, both ends included.
struct Range {
  uint32_t low, high;
  __device__ __forceinline__ bool has(uint32_t x) const { return x - low <= high - low; }
};

struct Anywhere {
  static __device__ __forceinline__ bool has(uint32_t) { return true; }
};

// Compares half keys with a bound, two in a word: after 16 words, bit b of `hits` says whether the
// lower half of word b is at least the bound, bit 16 + b whether the upper one is.
struct HalfKeyFilter {
  uint32_t low_bits;  // of the bound, in both halves
  uint32_t either;    // all ones where the bound's top bit is 0
  uint32_t hits;

  __device__ __forceinline__ explicit HalfKeyFilter(uint32_t bound)
      : low_bits((bound & 0x7fffu) * 0x00010001u), either(word_of(bound < 0x8000u)), hits(0) {}

  __device__ __forceinline__ void add(uint32_t word) {
    constexpr uint32_t kTopBits = 0x80008000u;
    // No borrow leaves a half: its top bit stays where the 15 bits below are at least the bound's.
    // With that, a half is at least the bound if its own top bit is set too, or, where the bound's
    // is not, if either is.
    const uint32_t stays = (word | kTopBits) - low_bits;
    const uint32_t at_least = (word & stays) | (either & (word | stays));
    hits = hits >> 1 | (at_least & kTopBits);
  }
};

struct Extremes {
  uint32_t largest, smallest, any_nan;
};

// Where a running sum over keys first exceeds a limit.
struct Boundary {
  uint32_t key;
  uint64_t below;  // the sum of values at lower keys
  uint64_t limit;
  uint64_t total;  // of the values of all keys
};

struct SamplerShared {
  static constexpr int kBinBits = 8, kBins = 1 << kBinBits;
  static constexpr int kList = 2048;
  static constexpr int kMostWarps = 16;
  // 64-bit sums a bin, as two words: shared memory adds 32 bits at once. Zero between searches.
  alignas(16) uint32_t low_word[kBins];
  alignas(16) uint32_t high_word[kBins];
  RowSettings settings;
  Boundary found;  // its key is a bin
  Extremes of_warp[kMostWarps];
  int listed;
  // Of candidates, in no order.
  uint32_t positions[kList];

  // Behind it: half keys of all codes where there is room, and later in their place the keys of
  // those listed.
  __device__ __forceinline__ uint16_t* half_keys() { return reinterpret_cast<uint16_t*>(this + 1); }
  __device__ __forceinline__ uint32_t* keys() { return reinterpret_cast<uint32_t*>(this + 1); }
};

// What the threads of a block do together.
template <int kThreads>
struct Team {
  static constexpr int kWarps = kThreads / kWarpSize;
  SamplerShared& shared;

  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }

  __device__ __forceinline__ void clear() const {
    static_assert(kThreads >= SamplerShared::kBins, "a bin a thread");
    if (thread() < SamplerShared::kBins) {
      shared.low_word[thread()] = shared.high_word[thread()] = 0;
    }
    if (thread() == 0) shared.listed = 0;
  }

  // Over all threads. Once a block.
  __device__ __forceinline__ Extremes extremes(Extremes own) const {
    const auto over_warp = [](Extremes x) {
      return Extremes{max_over_warp(x.largest), ~max_over_warp(~x.smallest),
                      max_over_warp(x.any_nan)};
    };
    static_assert(kWarps <= SamplerShared::kMostWarps && kWarpSize % kWarps == 0, "a lane a warp");
    own = over_warp(own);
    if (lane_index() == 0) shared.of_warp[warp_index()] = own;
    block_barrier();
    return over_warp(shared.of_warp[lane_index() % kWarps]);
  }

  // The key at which the sum of values over keys in `open` first exceeds limit_of(the sum over all
  // of them), found by histograms, every one over the bin that the last one found. visit(open, add)
  // calls add(key, value) for this thread's share of the keys in `open`; a value is a uint64_t, or
  // a uint32_t where their sum is one. limit_of() is less than the sum.
  //
  // Where the sum below a bin is just the limit, the bin's lower end will do, though no value may
  // be at that key. With kExact the search goes on to the key itself.
  template <bool kExact, typename LimitOf, typename Visit>
  __device__ __forceinline__ Boundary find_boundary(Range open, const LimitOf& limit_of,
                                                    const Visit& visit) const {
    Boundary boundary = {};
    for (bool whole = true;; whole = false) {
      const int bits = 32 - leading_zeros(open.high - open.low);
      const int shift = bits > SamplerShared::kBinBits ? bits - SamplerShared::kBinBits : 0;
      visit(open, [&](uint32_t key, auto value) { add_to_bin((key - open.low) >> shift, value); });
      block_barrier();
      if (warp_index() == 0) search_bins(whole, boundary, limit_of);
      block_barrier();
      boundary = shared.found;
      open.low += boundary.key << shift;
      const uint32_t others = (1u << shift) - 1u;
      if (open.high - open.low > others) open.high = open.low + others;
      boundary.key = open.low;
      if (shift == 0 || (!kExact && boundary.below == boundary.limit)) return boundary;
    }
  }

  template <typename Value>
  __device__ __forceinline__ void add_to_bin(uint32_t bin, Value value) const {
    const uint32_t word = static_cast<uint32_t>(value);
    const uint32_t before = atomic_add(&shared.low_word[bin], word);
    if constexpr (sizeof(Value) == 8) {
      // Whoever makes the low word overflow carries: the sum is exact in any order.
      const uint32_t carry = before + word < before ? 1u : 0u;
      const uint32_t rest = static_cast<uint32_t>(value >> 32) + carry;
      if (rest != 0) atomic_add(&shared.high_word[bin], rest);
    }
  }

  // The first warp finds the bin and clears all of them; a lane has neighbouring ones. `last` is
  // the boundary as the last histogram left it.
  template <typename LimitOf>
  __device__ __forceinline__ void search_bins(bool whole, const Boundary& last,
                                              const LimitOf& limit_of) const {
    constexpr int kOwn = SamplerShared::kBins / kWarpSize;
    static_assert(kOwn % 4 == 0, "bins are read by 16 bytes");
    uint32_t low[kOwn], high[kOwn];
    uint64_t own = 0;
#pragma unroll
    for (int j = 0; j < kOwn; j += 4) {
      uint32_t* const low_words = shared.low_word + lane_index() * kOwn + j;
      uint32_t* const high_words = shared.high_word + lane_index() * kOwn + j;
      const uint4 lows = load_vector<uint4>(low_words), highs = load_vector<uint4>(high_words);
      low[j] = lows.x, low[j + 1] = lows.y, low[j + 2] = lows.z, low[j + 3] = lows.w;
      high[j] = highs.x, high[j + 1] = highs.y, high[j + 2] = highs.z, high[j + 3] = highs.w;
      store_vector(low_words, uint4{});
      store_vector(high_words, uint4{});
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j) own += uint64_t{high[j]} << 32 | low[j];
    uint64_t up_to = own;
    for (int step = 1; step < kWarpSize; step *= 2) {
      const uint64_t lower = shuffle_up(up_to, step);
      if (lane_index() >= step) up_to += lower;
    }
    const uint64_t total = whole ? shuffle(up_to, kWarpSize - 1) : last.total;
    const uint64_t limit = whole ? limit_of(total) : last.limit;
    uint64_t before = last.below + up_to - own;
    const bool found = before <= limit && limit < before + own;
    uint32_t bin = static_cast<uint32_t>(lane_index() * kOwn);
    uint64_t after = before;
#pragma unroll
    for (int j = 0; j < kOwn - 1; ++j) {
      after += uint64_t{high[j]} << 32 | low[j];
      if (after <= limit) {
        before = after;
        bin = static_cast<uint32_t>(lane_index() * kOwn + j + 1);
      }
    }
    if (found) shared.found = {bin, before, limit, total};
  }

  // Lists the positions of codes whose half keys are at least `bound`, which is above that of
  // masked codes, in no order; returns how many they are. Beyond kList the list is not complete.
  // Half keys that were not kept are computed again.
  template <LogitType kType>
  __device__ __forceinline__ int list_candidates(const Row<kType>& row, bool keeps_keys,
                                                 uint32_t bound) const {
    if (keeps_keys) {
      constexpr int kVector = 8, kVectors = 4;  // half keys of 16 bytes; vectors of 16 words
      for (int begin = 0; begin < row.codes; begin += kVectors * kThreads * kVector) {
        const int own = begin + thread() * kVector;
        HalfKeyFilter filter(bound);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int first = own + v * kThreads * kVector;
          uint4 vector = {};
          if (first < row.codes) vector = load_vector<uint4>(shared.half_keys() + first);
          filter.add(vector.x);
          filter.add(vector.y);
          filter.add(vector.z);
          filter.add(vector.w);
        }
        append(filter.hits, [&](int bit) {
          const int word = bit % 16;
          return own + word / 4 * kThreads * kVector + word % 4 * 2 + bit / 16;
        });
      }
    } else {
      constexpr int kPack = Row<kType>::kPack;
      row.template visit_packs<kThreads, 1>([&](int, int first, const Combined(&code)[kPack]) {
        uint32_t hits = 0;
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          hits |= key_of(code[j]) >> kHalfKeyBits >= bound ? 1u << j : 0u;
        }
        append(hits, [&](int bit) { return first + bit; });
      });
    }
    block_barrier();
    return shared.listed;
  }

  // A position for every set bit.
  template <typename PositionOf>
  __device__ __forceinline__ void append(uint32_t hits, const PositionOf& position_of) const {
    const int own = count_bits(hits);
    int up_to = own;
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int lower = shuffle_up(up_to, step);
      if (lane_index() >= step) up_to += lower;
    }
    const int of_warp = shuffle(up_to, kWarpSize - 1);
    if (of_warp == 0) return;
    const int first = lane_index() == 0 ? atomic_add(&shared.listed, of_warp) : 0;
    int at = shuffle(first, 0) + up_to - own;
    for (; hits != 0 && at < SamplerShared::kList; hits &= hits - 1u) {
      shared.positions[at++] = static_cast<uint32_t>(position_of(lowest_bit(hits)));
    }
  }
};

// The codes that are left: those listed, with their keys, or all of the row. Their keys are then
// computed from memory again, where a half key does not rule them out.
template <LogitType kType, int kThreads>
struct Entries {
  static constexpr int kAtOnce = 4;
  const Row<kType>& row;
  SamplerShared& shared;
  bool keeps_keys;
  bool listed;
  int count;

  // A thread later visits what it loads here, so that no barrier is needed.
  __device__ __forceinline__ void load_keys() const {
    for (int begin = static_cast<int>(threadIdx.x); begin < count; begin += kAtOnce * kThreads) {
      int position[kAtOnce];
      uint32_t key[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = begin + n * kThreads;
        position[n] = i < count ? static_cast<int>(shared.positions[i]) : -1;
      }
      row.keys_at(position, key);
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (position[n] >= 0) shared.keys()[begin + n * kThreads] = key[n];
      }
    }
  }

  // Calls use(key, position) for this thread's share of the codes with keys in `wanted`, where 0 is
  // not, at positions in `where`, a Range or Anywhere.
  template <typename Positions, typename Use>
  __device__ __forceinline__ void visit(Range wanted, Positions where, const Use& use) const {
    if (listed) {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        const uint32_t key = shared.keys()[i], position = shared.positions[i];
        if (wanted.has(key) && where.has(position)) use(key, position);
      }
      return;
    }
    const Range halves = {wanted.low >> kHalfKeyBits, wanted.high >> kHalfKeyBits};
    for (int begin = static_cast<int>(threadIdx.x); begin < count; begin += kAtOnce * kThreads) {
      int position[kAtOnce];
      uint32_t key[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = begin + n * kThreads;
        const bool open = i < count && where.has(static_cast<uint32_t>(i)) &&
                          (!keeps_keys || halves.has(shared.half_keys()[i]));
        position[n] = open ? i : -1;
      }
      row.keys_at(position, key);
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (wanted.has(key[n])) use(key[n], static_cast<uint32_t>(position[n]));
      }
    }
  }
};

}  // namespace tokenflow::cuda
