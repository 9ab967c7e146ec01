// Top-k, top-p, min-p and the draw, a row a block. Every thread of a block follows the same
// branches.
#include "sampler_team.cuh"

namespace tokenflow::cuda {
namespace {

// Registers for as many threads of a multiprocessor: two large blocks or four small ones.
constexpr int kThreadsResident = 1024;
// Maxima that a thread keeps: k up to 8 times the threads is bounded by them.
constexpr int kGroups = 8;
// Packs that a thread has on their way, for each of the two inputs.
constexpr int kUnroll = 2;

// Half keys are read by 16 bytes. Those behind the last code are masked codes'.
TOKENFLOW_HOST_DEVICE int padded_to_vectors(int codes) { return (codes + 7) / 8 * 8; }

// Grid: a block for every row; it owns the row's draw. Shared memory: 10.5 KiB, and 2 bytes a code
// for its half key where the device has room for all (64 KiB for 32,768 codes), 8 KiB at least;
// else half keys are computed from memory again. Bytes: each logit once, and 32 again for a
// candidate and input, from the L2 as a rule. Operations: about 20 instructions a code for its key,
// 4 to see whether it may be among the k largest, and some hundred for each of the few that may be.
// Bound by memory in float32 and by instructions in half precision where there are rows for every
// multiprocessor, else by the latency of about 18 barriers.
//
// A multiprocessor holds two blocks for 32,768 codes: one loads its row while the other passes its
// barriers. On an H100 a float32 row with guidance is 11.7 us of a multiprocessor's share of the
// bus, and about 47,000 warp instructions, 9.4 us at the rate of the first design, 27,000 of them
// after loading. Blocks out of step leave the bus no pause. Persistent blocks, in which some warps
// load the next row while others finish, would need 128 KiB for two rows, named barriers and rows
// of even length for the same overlap.
//
//   1. Half keys of all codes. Every thread keeps the maxima of eight groups of keys.
//   2. The k-th largest maximum is a lower bound of the k-th largest key (k groups hold a key that
//      is no smaller), and so is its half key with zeros below. Codes whose half keys reach it,
//      little more than k, are listed, and their keys computed again. Where the list is too short
//      for them, all codes are visited instead.
//   3. Histograms find the k-th largest key, top-p's boundary and the position of the code that is
//      drawn: the boundaries of running sums of counts or weights. Sums are integers, so neither
//      the order of the atomics nor that of the list shows.
template <LogitType kType, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreadsResident / kThreads)
    sample_kernel(const __grid_constant__ SampleArgs args, bool keeps_keys) {
  constexpr int kPack = Row<kType>::kPack;
  static_assert(kUnroll * kPack % kGroups == 0, "a group's codes are those of a remainder");
  SamplerShared& shared = *shared_memory<SamplerShared>();
  const Team<kThreads> team = {shared};
  const int64_t row_number = static_cast<int64_t>(blockIdx.x);
  const Row<kType> row(args, row_number);
  team.clear();
  if (team.thread() == 0) shared.settings = row_settings(args, row_number);

  const int padded_codes = padded_to_vectors(row.codes);
  uint32_t group_max[kGroups] = {};
  uint32_t any_nan = 0;
  row.template visit_packs<kThreads, kUnroll>([&](int n, int first, const Combined(&code)[kPack]) {
    uint32_t halves[4] = {};
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const uint32_t key = opaque(key_of(code[j]));  // else the compiler computes it twice
      any_nan |= is_nan(code[j]);
      uint32_t& group = group_max[(n * kPack + j) % kGroups];
      group = key > group ? key : group;
      halves[j / 2] |= key >> kHalfKeyBits << j % 2 * kHalfKeyBits;
    }
    if (keeps_keys && first < padded_codes) {
      if constexpr (kPack == 4) {
        store_vector(shared.half_keys() + first, uint2{halves[0], halves[1]});
      } else {
        store_vector(shared.half_keys() + first, uint4{halves[0], halves[1], halves[2], halves[3]});
      }
    }
  });
  uint32_t largest = 0, smallest = ~0u;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    largest = group_max[g] > largest ? group_max[g] : largest;
    smallest = group_max[g] < smallest ? group_max[g] : smallest;
  }
  const Extremes extremes = team.extremes({largest, smallest, any_nan});  // and a barrier
  largest = extremes.largest;

  const RowSettings& settings = shared.settings;
  uint8_t status = settings.status;
  if (extremes.any_nan) status |= kLogitsNaN;
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

  const bool greedy = settings.top_k == 1;
  const uint64_t k = static_cast<uint64_t>(settings.top_k);
  const float maximum = value_of(largest);
  const float twice_inverse_temperature = settings.twice_inverse_temperature;
  const auto weight = [&](uint32_t key) {
    return fixed_point_weight(value_of(key), maximum, twice_inverse_temperature);
  };
  // Of a running sum of counts: the k-th from the end.
  const auto all_but_k = [&](uint64_t total) { return total > k ? total - k : 0; };

  uint32_t bound = greedy ? largest : least_weighted_key(maximum, twice_inverse_temperature);
  if (!greedy && settings.top_k < row.codes) {
    const uint32_t low = bound > extremes.smallest ? bound : extremes.smallest;
    const Boundary groups =
        team.template find_boundary<false>({low >> kHalfKeyBits, largest >> kHalfKeyBits},
                                           all_but_k, [&](Range open, const auto& add) {
#pragma unroll
                                             for (int g = 0; g < kGroups; ++g) {
                                               const uint32_t half = group_max[g] >> kHalfKeyBits;
                                               if (open.has(half)) add(half, 1u);
                                             }
                                           });
    const uint32_t kth = groups.key << kHalfKeyBits;
    if (groups.total >= k && kth > bound) bound = kth;
  }

  const int found = team.list_candidates(row, keeps_keys, bound >> kHalfKeyBits);
  const bool listed = found <= SamplerShared::kList;
  const Entries<kType, kThreads> entries = {row, shared, keeps_keys, listed,
                                            listed ? found : row.codes};
  if (listed) entries.load_keys();
  const Range row_positions = {0, static_cast<uint32_t>(row.codes - 1)};

  if (greedy) {
    const Boundary lowest = team.template find_boundary<true>(
        row_positions, [](uint64_t) { return uint64_t{0}; },
        [&](Range open, const auto& add) {
          entries.visit({largest, largest}, open,
                        [&](uint32_t, uint32_t position) { add(position, 1u); });
        });
    if (team.thread() == 0) {
      args.indices[row_number] = static_cast<int64_t>(lowest.key);
      args.probability[row_number] = 1.0f;
    }
    return;
  }

  if (settings.top_k < entries.count) {
    bound =
        team.template find_boundary<false>(
                {bound, largest}, all_but_k,
                [&](Range open, const auto& add) {
                  entries.visit(open, Anywhere{}, [&](uint32_t key, uint32_t) { add(key, 1u); });
                })
            .key;
  }

  uint32_t first_equal = 0;  // entries at the boundary that come earlier are dropped
  if (settings.droppable_share >= 0) {
    const Boundary boundary = team.template find_boundary<false>(
        {bound, largest},
        [&](uint64_t total) { return droppable(settings.droppable_share, total); },
        [&](Range open, const auto& add) {
          entries.visit(open, Anywhere{}, [&](uint32_t key, uint32_t) { add(key, weight(key)); });
        });
    bound = boundary.key;
    const uint64_t left = boundary.limit - boundary.below, each = weight(bound);
    if (left >= each && each > 0) {
      const uint64_t equal = left / each;
      first_equal = team.template find_boundary<false>(
                            row_positions, [&](uint64_t) { return equal; },
                            [&](Range open, const auto& add) {
                              entries.visit({bound, bound}, open, [&](uint32_t, uint32_t position) {
                                add(position, 1u);
                              });
                            })
                        .key;
    }
  }

  const Boundary drawn = team.template find_boundary<true>(
      row_positions, [&](uint64_t total) { return scaled_random(settings.random, total); },
      [&](Range open, const auto& add) {
        entries.visit({bound, largest}, open, [&](uint32_t key, uint32_t position) {
          const uint64_t own = weight(key);
          const bool kept = key != bound || position >= first_equal;
          if (kept && own >= settings.least_weight) add(position, own);
        });
      });
  if (team.thread() == 0) {
    const int chosen[1] = {static_cast<int>(drawn.key)};
    uint32_t key[1];
    row.keys_at(chosen, key);
    args.indices[row_number] = chosen[0];
    args.probability[row_number] =
        static_cast<float>(static_cast<double>(weight(key[0])) / static_cast<double>(drawn.total));
  }
}

template <LogitType kType, int kThreads>
cudaError_t launch_rows(const SampleArgs& args, int shared_limit, cudaStream_t stream) {
  const size_t list_bytes = SamplerShared::kList * sizeof(uint32_t);
  const size_t key_bytes =
      static_cast<size_t>(padded_to_vectors(static_cast<int>(args.codes))) * sizeof(uint16_t);
  const bool keeps_keys = sizeof(SamplerShared) + key_bytes <= static_cast<size_t>(shared_limit);
  const size_t rest = keeps_keys && key_bytes > list_bytes ? key_bytes : list_bytes;
  return launch(sample_kernel<kType, kThreads>, dim3(static_cast<unsigned>(args.rows)), kThreads,
                sizeof(SamplerShared) + rest, stream, args, keeps_keys);
}

template <LogitType kType>
cudaError_t launch_type(const SampleArgs& args, cudaStream_t stream) {
  // Few codes: smaller blocks, more of them on a multiprocessor.
  constexpr int64_t kFewCodes = 4096;
  int shared_limit = 0;
  TOKENFLOW_CUDA_TRY(largest_shared_memory(&shared_limit));
  return args.codes <= kFewCodes ? launch_rows<kType, 256>(args, shared_limit, stream)
                                 : launch_rows<kType, 512>(args, shared_limit, stream);
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
