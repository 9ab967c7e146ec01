// Coarse scores with warpgroups, for compute capability 9.0: a product of four warps reads the
// codes from shared memory itself and runs beside them, at the tensor cores' peak. One warpgroup
// makes its records while others multiply.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "coarse_score.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kWarpgroupRows = 64;
constexpr int kWarpgroupWarps = kWarpgroupThreads / kWarpSize;
constexpr int kThreads = kBlockRows / kWarpgroupRows * kWarpgroupThreads;

// Places for tiles of codes in shared memory. A tile is asked for kAhead tiles before it is
// multiplied, when it is the turn of its place: the slowest warpgroup may be kStages - kAhead tiles
// behind the first one before that has to wait.
constexpr int kStages = 8;
constexpr int kAhead = 4;

// What a block has in shared memory.
template <int kSteps>
struct Stages {
  static constexpr int kTile = kSteps * kTileFragments * kWarpSize;

  uint4 codes[kStages][kTile];
  PhaseBarrier filled[kStages];   // a phase ends when a tile has come
  PhaseBarrier emptied[kStages];  // and here when all warps have multiplied with it

  // For blocks of which so many warps multiply; by one thread.
  __device__ __forceinline__ void set_up(unsigned warps) {
    for (int stage = 0; stage < kStages; ++stage) {
      set_up_barrier(&filled[stage], 1);
      set_up_barrier(&emptied[stage], warps);
    }
    publish_barriers();
  }

  // The uses of a place are numbered, and so its barriers' phases.
  static __device__ __forceinline__ unsigned phase(int use) {
    return static_cast<unsigned>(use) & 1u;
  }

  // Brings tile i of those from `from` on; by one thread.
  __device__ __forceinline__ void fetch(const uint4* from, int i) {
    const int stage = i % kStages, use = i / kStages;
    if (use > 0) wait_for_phase(&emptied[stage], phase(use - 1));
    arrive_expecting(&filled[stage], sizeof(codes[stage]));
    copy_bulk(codes[stage], from + static_cast<int64_t>(i) * kTile, sizeof(codes[stage]),
              &filled[stage]);
  }
};

// Writes the warp's records of 16 rows: `to` is that of the first, `stride` further that of the
// next.
__device__ __forceinline__ void store_records(const Records<2>& records, ScoreRecord* to,
                                              int64_t stride) {
  const bool upper = (lane_index() & 1) != 0;
  const ScoreRecord keep = upper ? records.row[1] : records.row[0];
  const ScoreRecord send = upper ? records.row[0] : records.row[1];
  ScoreRecord record = merge_records(keep, shuffle_xor(send, 1));
  record = merge_records(record, shuffle_xor(record, 2));
  if ((lane_index() & 2) == 0) to[((upper ? 8 : 0) + lane_index() / 4) * stride] = record;
}

// Grid: (blocks of 64 rows a warpgroup, runs of tiles of codes, codebooks); a block owns the
// records of its rows over its tiles. A warpgroup holds 64 rows in registers, and sums of them and
// a tile of codes: kSteps products of 64 x 128 x 16, after which 14 instructions a thread and 16
// codes make records of them. The tensor cores take 64 kSteps cycles for that, the records of the
// four warps 224, on lanes of their own: with three steps and more warpgroups than one, both are
// nearly always busy. Shared memory: kStages tiles of 4 kSteps KiB, 96 KiB for TokenFlow's 40
// channels, copied by one thread. Bytes: 32 kSteps (rows * runs + codes * blocks of rows) read,
// from the L2, and 8 rows * records written. Bound by the records up to three steps, then by the
// tensor cores.
//
// Where warpgroups are not compiled, the kernel does nothing and takes blocks of one warp only,
// which the host sees.
template <int kSteps>
__global__ void __launch_bounds__(kHasWarpgroups ? kThreads : kWarpSize, 1)
    warpgroup_score_kernel(const __grid_constant__ SearchArgs args, int64_t first_row,
                           int64_t num_rows, const ScoreRuns runs, int block_rows) {
  if constexpr (kHasWarpgroups) {
    if (is_dropped(args)) return;
    const ScoreBlock block(args, block_rows, runs);
    const int64_t rows_left = num_rows - block.row;
    const int rows_here = rows_left < block_rows ? static_cast<int>(rows_left) : block_rows;
    const int warpgroups = (rows_here + kWarpgroupRows - 1) / kWarpgroupRows;
    Stages<kSteps>& stages = *shared_memory<Stages<kSteps>>();
    if (threadIdx.x == 0) {
      stages.set_up(static_cast<unsigned>(warpgroups * kWarpgroupWarps));
    }
    block_barrier();
    if (warp_index() / kWarpgroupWarps >= warpgroups) return;

    const int64_t warp_row = block.row + warp_index() * kFragmentVectors;
    uint4 rows[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t n = block.packed_row(args) + first_row + warp_row;
      rows[s] = args.packed.fragments[fragment_index(n, s, kSteps) + lane_index()];
    }
    const uint4* codes = args.codes.fragments + block.packed_tile(args) * Stages<kSteps>::kTile;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kAhead && i < block.tiles; ++i) stages.fetch(codes, i);
    }
    Records<2> records;
    records.clear();
    for (int i = 0; i < block.tiles; ++i) {
      if (threadIdx.x == 0 && i + kAhead < block.tiles) stages.fetch(codes, i + kAhead);
      warp_barrier();
      const int stage = i % kStages;
      wait_for_phase(&stages.filled[stage], stages.phase(i / kStages));
      float sums[kTileFragments][2][1][4];
      begin_products();
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        multiply_add_64x128x16(
            sums, rows[s], describe_operand(stages.codes[stage] + s * kTileFragments * kWarpSize),
            s > 0);
      }
      wait_for_products(sums);
      if (lane_index() == 0) arrive(&stages.emptied[stage]);
      const int tag = group_tag(i & (runs.record_tiles - 1), 0, lane_index() % 4);
#pragma unroll
      for (int c = 0; c < kTileFragments; ++c) {
        update_records(sums[c], tag + group_tag(0, c, 0), records);
      }
      if (ends_record(runs, block, i)) {
        store_records(records,
                      records_of(args, runs, num_rows, block.book) +
                          record_index(runs, block, warp_row - block.row, i),
                      runs.num_records);
        records.clear();
      }
    }
  }
}

using WarpgroupKernel = void (*)(SearchArgs, int64_t, int64_t, ScoreRuns, int);

struct WarpgroupLaunch {
  WarpgroupKernel kernel;
  size_t shared_bytes;
};

template <int kSteps>
WarpgroupLaunch launch_of_steps() {
  return {warpgroup_score_kernel<kSteps>, sizeof(Stages<kSteps>)};
}

WarpgroupLaunch launch_of_steps(int steps) {
  switch (steps) {
    case 1:
      return launch_of_steps<1>();
    case 2:
      return launch_of_steps<2>();
    case 3:
      return launch_of_steps<3>();
    case 4:
      return launch_of_steps<4>();
    default:
      static_assert(kMostSteps == 5, "a kernel for every number of steps");
      return launch_of_steps<5>();
  }
}

}  // namespace

cudaError_t choose_order(const CodebookLayout& layout, FragmentOrder* order) {
  *order = FragmentOrder::kByLane;
  const char* wanted = std::getenv("TOKENFLOW_CUDA_SEARCH");
  if (!wanted || *wanted == 0 || std::strcmp(wanted, "mma") == 0) return cudaSuccess;
  if (std::strcmp(wanted, "wgmma") != 0) {
    std::fprintf(stderr, "TOKENFLOW_CUDA_SEARCH is mma or wgmma, not %s\n", wanted);
    return cudaErrorInvalidValue;
  }
  const int steps = operand_steps(layout.dim);
  if (steps > kMostSteps) return cudaSuccess;
  const WarpgroupLaunch launch = launch_of_steps(steps);
  cudaFuncAttributes attributes = {};
  int most = 0;
  TOKENFLOW_CUDA_TRY(
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(launch.kernel)));
  TOKENFLOW_CUDA_TRY(largest_shared_memory(&most));
  if (attributes.maxThreadsPerBlock < kThreads || launch.shared_bytes > static_cast<size_t>(most)) {
    std::fprintf(
        stderr,
        "TOKENFLOW_CUDA_SEARCH=wgmma needs a device of compute capability 9.0, and a build "
        "whose TORCH_CUDA_ARCH_LIST has 9.0a\n");
    return cudaErrorNotSupported;
  }
  *order = FragmentOrder::kByWord;
  return cudaSuccess;
}

cudaError_t launch_warpgroup_score(const SearchArgs& args, int64_t first_row, int64_t num_rows,
                                   const ScoreRuns& runs, cudaStream_t stream) {
  const int steps = operand_steps(args.layout.dim);
  const WarpgroupLaunch chosen = launch_of_steps(steps);
  const int rows = score_block_rows(steps, num_rows);
  const dim3 grid(static_cast<unsigned>(ceil_div(num_rows, rows)),
                  static_cast<unsigned>(ceil_div(num_tiles(args.layout), runs.tiles_per_block)),
                  static_cast<unsigned>(args.layout.books));
  return launch(chosen.kernel, grid, rows / kWarpgroupRows * kWarpgroupThreads, chosen.shared_bytes,
                stream, args, first_row, num_rows, runs, rows);
}

}  // namespace tokenflow::cuda
