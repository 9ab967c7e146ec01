// Top-k, top-p, min-p and the draw, a row a block. Every thread of a block follows the same
// branches.
#include "sampler_team.cuh"

namespace tokenflow::cuda {
namespace {

// Maxima that a thread keeps: k up to 4 times the threads is bounded by them.
constexpr int kGroups = 4;
// Loads that a thread has on their way, for each of the two inputs.
constexpr int kUnroll = 8;
static_assert(kUnroll % kGroups == 0, "a group's codes are those of a remainder");

// Grid: a block for every row; it owns the row's draw. Shared memory: 24 bytes a thread, and 4 a
// code for its key where the device has room for all (128 KiB for 32,768 codes); else the logits
// are read again, from the L2 as a rule. Bytes: each logit once. Operations: about
// 15 a code for its key, then 2 for a code to see whether it may be among the k largest, and some
// hundred for each of the few that may be. Bound by memory where there are rows for every
// multiprocessor, else by the latency of about 60 barriers.
//
//   1. Keys of all codes; every thread keeps the maxima of four groups of them.
//   2. The k-th largest maximum is a lower bound of the k-th largest key (k groups hold a key that
//   is
//      no smaller). Codes above it, little more than k, are listed in order of their positions.
//      Where the list is too short for them, all codes are visited instead.
//   3. Histograms over what is listed find the k-th largest key and top-p's boundary: of counts and
//      of weights. Sums are integers, so the order of the atomics does not show.
//   4. A scan in order of the positions finds the code where the running sum passes the random
//   number.
template <LogitType kType, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == 256 ? 4 : 1)
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
    uint32_t first = ~0u;  // the lowest position, as the largest of the complements
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
    entries.positions = shared.positions;
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
    args.indices[row_number] = entries.position(chosen);
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
  TOKENFLOW_CUDA_TRY(largest_shared_memory(&shared_limit));
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
