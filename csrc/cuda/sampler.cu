// Top-k, top-p, min-p and the draw, a row a block. Every thread of a block follows the same
// branches.
#include "device.cuh"
#include "sampler.h"

namespace tokenflow::cuda {
namespace {

// Maxima that a thread keeps: k up to 4 times the threads is bounded by them.
constexpr int kGroups = 4;
// Loads that a thread has on their way, for each of the two inputs.
constexpr int kUnroll = 8;
static_assert(kUnroll % kGroups == 0, "a group's codes are those of a remainder");

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
  // Candidates, in order of their places.
  uint32_t keys[kList];
  uint32_t places[kList];
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
  const uint32_t* keys;    // null: from the row
  const uint32_t* places;  // null: entry i is code i
  int count;
  Row<kType> row;

  __device__ __forceinline__ uint32_t key(int i) const {
    return keys ? keys[i] : key_of(row.combined(row.logit(i), row.unconditional(i)));
  }
  __device__ __forceinline__ int place(int i) const {
    return places ? static_cast<int>(places[i]) : i;
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
        shared.places[at] = static_cast<uint32_t>(entries.place(i));
      }
      next += count_bits(kept);
    }
    block_barrier();
    return count;
  }
};

// Grid: a block for every row; it owns the row's draw. Shared memory: 24 bytes a thread, and 4 a
// code for its key where the device has room for all (128 KiB for 32,768 codes); else the logits
// are read again, from the second-level cache as a rule. Bytes: each logit once. Operations: about
// 15 a code for its key, then 2 for a code to see whether it may be among the k largest, and some
// hundred for each of the few that may be. Bound by memory where there are rows for every
// multiprocessor, else by the latency of about 60 barriers.
//
//   1. Keys of all codes; every thread keeps the maxima of four groups of them.
//   2. The k-th largest maximum is a lower bound of the k-th largest key (k groups hold a key that
//   is
//      no smaller). Codes above it, little more than k, are listed in order of their places. Where
//      the list is too short for them, all codes are visited instead.
//   3. Histograms over what is listed find the k-th largest key and top-p's boundary: of counts and
//      of weights. Sums are integers, so the order of the atomics does not show.
//   4. A scan in order of the places finds the code where the running sum passes the random number.
template <LogitType kType, int kThreads>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const __grid_constant__ SampleArgs args, bool keeps_keys) {
  SamplerShared<kThreads>& shared = *shared_memory<SamplerShared<kThreads>>();
  uint32_t* row_keys = reinterpret_cast<uint32_t*>(&shared + 1);
  const Team<kThreads> team = {shared};
  const int64_t row_number = static_cast<int64_t>(blockIdx.x);
  if (team.thread() == 0) shared.settings = row_settings(args, row_number);
  const int codes = static_cast<int>(args.codes);
  const Row<kType> row = {
      args.logits.data, args.uncond.data, first_of_row(args.logits, args.inner, row_number),
      first_of_row(args.uncond, args.inner, row_number), guidance_of(args, row_number)};

  uint32_t group_max[kGroups] = {};
  bool any_nan = false;
  for (int first = team.thread(); first < codes; first += kUnroll * kThreads) {
    float logit[kUnroll], unconditional[kUnroll];
#pragma unroll
    for (int n = 0; n < kUnroll; ++n) {
      const int i = first + n * kThreads;
      logit[n] = i < codes ? row.logit(i) : -INFINITY;
      unconditional[n] = i < codes ? row.unconditional(i) : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kUnroll; ++n) {
      const int i = first + n * kThreads;
      const Combined code = row.combined(logit[n], unconditional[n]);
      any_nan |= is_nan(code) != 0;
      const uint32_t key = i < codes ? key_of(code) : kMaskedKey;
      if (i < codes && keeps_keys) row_keys[i] = key;
      group_max[n % kGroups] = key > group_max[n % kGroups] ? key : group_max[n % kGroups];
    }
  }
  uint32_t largest = group_max[0];
#pragma unroll
  for (int g = 1; g < kGroups; ++g) largest = group_max[g] > largest ? group_max[g] : largest;
  largest = team.maximum(largest, &any_nan);  // and barriers: keys and settings are there

  const RowSettings& settings = shared.settings;
  uint8_t status = settings.status;
  if (any_nan) status |= kLogitsNaN;
  if (largest == kInfinityKey) status |= kLogitsInfinite;
  if (largest <= kMaskedKey) status |= kLogitsMasked;
  if (team.thread() == 0) args.status[row_number] = status;
  if (largest <= kMaskedKey) {
    if (team.thread() == 0) {
      args.indices[row_number] = 0;
      args.probability[row_number] = 0;
    }
    return;
  }

  Entries<kType> entries = {keeps_keys ? row_keys : nullptr, nullptr, codes, row};
  if (settings.top_k == 1) {
    uint32_t first = ~0u;  // the lowest place, as the largest of the complements
    for (int i = codes - 1 - team.thread(); i >= 0; i -= kThreads) {
      if (entries.key(i) == largest) first = static_cast<uint32_t>(i);
    }
    first = ~team.maximum(~first, &any_nan);
    if (team.thread() == 0) {
      args.indices[row_number] = static_cast<int64_t>(first);
      args.probability[row_number] = 1.0f;
    }
    return;
  }

  const float maximum = value_of(largest);
  const float twice_inverse_temperature = settings.twice_inverse_temperature;
  const auto weight = [&](uint32_t key) {
    return fixed_point_weight(value_of(key), maximum, twice_inverse_temperature);
  };
  uint32_t bound = least_weighted_key(maximum, twice_inverse_temperature);
  const uint64_t k = static_cast<uint64_t>(settings.top_k);
  if (settings.top_k < codes) {
    int own = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) own += group_max[g] >= bound ? 1 : 0;
    const uint64_t groups = team.sum(static_cast<uint64_t>(own));
    if (groups > k) {
      bound = team.find_boundary(bound, largest, groups - k, 2,
                                 [&](const auto& add) {
#pragma unroll
                                   for (int g = 0; g < kGroups; ++g) add(group_max[g], 1);
                                 })
                  .key;
    }
  }

  const int count = team.gather(entries, bound);
  if (count <= SamplerShared<kThreads>::kList) {
    entries.keys = shared.keys;
    entries.places = shared.places;
    entries.count = count;
  }
  if (k < static_cast<uint64_t>(count)) {
    bound = team.find_boundary(bound, largest, static_cast<uint64_t>(count) - k, kWarpSize,
                               [&](const auto& add) {
                                 for (int i = team.thread(); i < entries.count; i += kThreads) {
                                   add(entries.key(i), 1);
                                 }
                               })
                .key;
  }

  uint64_t own = 0;
  for (int i = team.thread(); i < entries.count; i += kThreads) {
    const uint32_t key = entries.key(i);
    own += key >= bound ? weight(key) : 0;
  }
  uint64_t total = team.sum(own);

  int first_equal = 0;  // entries at the boundary that come earlier are dropped
  if (settings.droppable_share >= 0) {
    const uint64_t limit = droppable(settings.droppable_share, total);
    const Boundary boundary =
        team.find_boundary(bound, largest, limit, kWarpSize, [&](const auto& add) {
          for (int i = team.thread(); i < entries.count; i += kThreads) {
            const uint32_t key = entries.key(i);
            if (key >= bound) add(key, weight(key));
          }
        });
    bound = boundary.key;
    total -= boundary.below;
    const uint64_t left = limit - boundary.below, each = weight(bound);
    if (left >= each && each > 0) {
      const uint64_t equal = left / each;
      first_equal = team.find_in_running_sum(
          entries.count, equal, [&](int i) { return entries.key(i) == bound ? uint64_t{1} : 0; });
      total -= equal * each;
    }
  }

  const uint64_t least_weight = settings.least_weight;
  const auto kept_weight = [&](int i) {
    const uint32_t key = entries.key(i);
    const uint64_t kept =
        key > bound || (key == bound && i >= first_equal) ? weight(key) : uint64_t{0};
    return kept >= least_weight ? kept : uint64_t{0};
  };
  if (least_weight > 0) {
    own = 0;
    for (int i = team.thread(); i < entries.count; i += kThreads) own += kept_weight(i);
    total = team.sum(own);
  }

  const int chosen =
      team.find_in_running_sum(entries.count, scaled_random(settings.random, total), kept_weight);
  if (team.thread() == 0) {
    args.indices[row_number] = entries.place(chosen);
    args.probability[row_number] = static_cast<float>(
        static_cast<double>(weight(entries.key(chosen))) / static_cast<double>(total));
  }
}

template <LogitType kType, int kThreads>
cudaError_t launch_rows(const SampleArgs& args, int shared_limit, cudaStream_t stream) {
  const size_t fixed = sizeof(SamplerShared<kThreads>);
  const size_t with_keys = fixed + static_cast<size_t>(args.codes) * sizeof(uint32_t);
  const bool keeps_keys = with_keys <= static_cast<size_t>(shared_limit);
  return launch(sample_kernel<kType, kThreads>, dim3(static_cast<unsigned>(args.rows)), kThreads,
                keeps_keys ? with_keys : fixed, stream, args, keeps_keys);
}

template <LogitType kType>
cudaError_t launch_type(const SampleArgs& args, cudaStream_t stream) {
  // Few codes: smaller blocks, several on a multiprocessor.
  constexpr int64_t kFewCodes = 4096;
  int shared_limit = 0;
  TF_CUDA_TRY(largest_shared_memory(&shared_limit));
  return args.codes <= kFewCodes ? launch_rows<kType, 256>(args, shared_limit, stream)
                                 : launch_rows<kType, 1024>(args, shared_limit, stream);
}

}  // namespace

cudaError_t launch_sample(const SampleArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.codes < 1 || args.codes > kMostCodes || args.rows > 0x7fffffff) {
    return cudaErrorInvalidValue;
  }
  switch (args.type) {
    case LogitType::kBFloat16:
      return launch_type<LogitType::kBFloat16>(args, stream);
    case LogitType::kHalf:
      return launch_type<LogitType::kHalf>(args, stream);
    default:
      return launch_type<LogitType::kFloat>(args, stream);
  }
}

}  // namespace tokenflow::cuda
