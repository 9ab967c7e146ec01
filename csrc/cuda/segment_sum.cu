// Sums of rows by index without atomics on floats: a stable radix sort of (index, row number), then
// every code adds its own rows in row order.
#include <climits>

#include "quantizer.h"
#include "segment_sum.cuh"
#include "sort_pairs.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kSumThreads = 256;
constexpr int kSumWarps = kSumThreads / kWarpSize;
// Sorted pairs of a chunk. A code with more rows than this is summed by the blocks of the chunks
// that hold them, any other by a warp.
constexpr int64_t kChunk = 256;

// Sorted positions [begin, end) that hold a code.
struct Segment {
  int64_t begin;
  int64_t end;

  __device__ __forceinline__ bool is_long() const { return end - begin > kChunk; }
};

// The first position in [low, high) whose key is not below `key`, or high. The warp looks at 32
// positions at a time: three times for 32,768 pairs.
__device__ __forceinline__ int64_t lower_bound_by_warp(const uint32_t* keys, int64_t low,
                                                       int64_t high, uint32_t key) {
  while (low < high) {
    const int64_t step = (high - low + kWarpSize - 1) / kWarpSize;
    const int64_t probe = low + (lane_index() + 1) * step - 1;
    const int below = count_bits(ballot(probe < high && keys[probe] < key));
    low += below * step;
    if (low + step - 1 < high) high = low + step - 1;
  }
  return low;
}

__device__ __forceinline__ Segment find_segment(const uint32_t* keys, int64_t count,
                                                uint32_t code) {
  const int64_t begin = lower_bound_by_warp(keys, 0, count, code);
  const int64_t mine = begin + lane_index();
  const int held = count_bits(ballot(mine < count && keys[mine] == code));
  if (held < kWarpSize) return {begin, begin + held};  // nearly always
  return {begin, lower_bound_by_warp(keys, begin + kWarpSize, count, code + 1)};
}

struct SumArgs {
  SegmentSumArgs<float> segments;  // counts may be null
  CodebookLayout layout;           // used with `codebook`
  const float*
      codebook;  // sums are gradients of its normalised rows; null: they are left as they are
  const uint32_t* keys;   // sorted
  const uint32_t* order;  // the pairs' rows
  const int* num_pairs;
  int64_t chunks;
  double* partials;  // [chunks][2][dim]: of the long codes at the chunk's first and last pair
  int* chunks_done;  // [chunks] zeros: how many have added to the long code that begins in a chunk

  __device__ __forceinline__ double row_channel(int64_t position, int64_t d) const {
    return static_cast<double>(
        segments.rows[static_cast<int64_t>(order[position]) * segments.dim + d]);
  }
  // Warp-wide, lane l having written channels l, l + 32, ... of the code's sum.
  __device__ __forceinline__ void finish(int64_t code) const {
    if (!codebook) return;
    code_gradient_by_warp(layout, codebook + code * segments.dim,
                          segments.sums + code * segments.dim);
  }
};

template <typename Value>
__device__ __forceinline__ double sum_range(int64_t begin, int64_t end, const Value& value) {
  double sum = 0;
#pragma unroll 4
  for (int64_t k = begin; k < end; ++k) sum += value(k);
  return sum;
}

struct SumShared {
  int earlier;
  double partial[kSumWarps][kWarpSize];
};

// Adds value(k, d) over [begin, end) in parts of equal length, a warp each; the lane of warp 0 that
// keeps channel d adds the parts in order and hands over store(d, sum).
template <typename Value, typename Store>
__device__ __forceinline__ void sum_by_block(SumShared& shared, int64_t begin, int64_t end,
                                             int64_t dim, const Value& value, const Store& store) {
  const int warp = warp_index(), lane = lane_index();
  const int64_t part = (end - begin + kSumWarps - 1) / kSumWarps;
  const int64_t part_begin = begin + warp * part;
  const int64_t part_end = part_begin + part < end ? part_begin + part : end;
  for (int64_t first = 0; first < dim; first += kWarpSize) {
    const int64_t d = first + lane;
    if (d < dim) {
      shared.partial[warp][lane] =
          sum_range(part_begin, part_end, [&](int64_t k) { return value(k, d); });
    }
    block_barrier();
    if (warp == 0 && d < dim) {
      double total = 0;
      for (int w = 0; w < kSumWarps; ++w) total += shared.partial[w][lane];
      store(d, total);
    }
    block_barrier();
  }
}

// A block's share of the long codes: at most two reach into a chunk, one over its first pair and
// one over its last, for a code inside is not long. The block that is the last to add to a code
// adds the chunks in order; which block that is does not show in the result.
__device__ __forceinline__ void sum_chunk(const SumArgs& args, SumShared& shared, int64_t chunk,
                                          int64_t num_pairs) {
  const SegmentSumArgs<float>& segments = args.segments;
  const int64_t begin = chunk * kChunk;
  const int64_t end = begin + kChunk < num_pairs ? begin + kChunk : num_pairs;
  if (begin >= end) return;
  for (int side = 0; side < 2; ++side) {
    const uint32_t code = args.keys[side == 0 ? begin : end - 1];
    if (side == 1 && code == args.keys[begin]) return;
    const Segment segment = find_segment(args.keys, num_pairs, code);
    if (!segment.is_long()) continue;
    sum_by_block(
        shared, begin > segment.begin ? begin : segment.begin,
        end < segment.end ? end : segment.end, segments.dim,
        [&](int64_t position, int64_t d) { return args.row_channel(position, d); },
        [&](int64_t d, double sum) { args.partials[(2 * chunk + side) * segments.dim + d] = sum; });
    const int64_t first_chunk = segment.begin / kChunk, last_chunk = (segment.end - 1) / kChunk;
    if (threadIdx.x == 0) {  // after the barrier at the end of sum_by_block
      device_fence();
      shared.earlier = atomic_add(args.chunks_done + first_chunk, 1);
      device_fence();
    }
    block_barrier();
    if (shared.earlier != last_chunk - first_chunk) continue;
    sum_by_block(
        shared, first_chunk, last_chunk + 1, segments.dim,
        [&](int64_t c, int64_t d) {
          const int at = c * kChunk < segment.begin ? 1 : 0;
          return args.partials[(2 * c + at) * segments.dim + d];
        },
        [&](int64_t d, double sum) {
          segments.sums[code * segments.dim + d] = static_cast<float>(sum);
        });
    if (warp_index() == 0) args.finish(code);
  }
}

// Grid: a block for every chunk of sorted pairs, which owns the chunk's part of the codes with more
// than kChunk rows; then a warp for every code, kSumWarps a block, which owns the code's sum and
// count if it has fewer. Shared memory: 2.1 KiB, of the chunks' blocks alone.
// Bytes: 4 dim + 4 a row read, 4 dim a code written (and, with a codebook, 4 dim read and 8 dim
// moved in the cache for each code that has rows); bound by memory.
__global__ void __launch_bounds__(kSumThreads)
    sum_segments_kernel(const __grid_constant__ SumArgs args) {
  const SegmentSumArgs<float>& segments = args.segments;
  const int64_t num_pairs = *args.num_pairs;
  if (blockIdx.x < args.chunks) {
    sum_chunk(args, *shared_memory<SumShared>(), blockIdx.x, num_pairs);
    return;
  }
  const int64_t code = (blockIdx.x - args.chunks) * kSumWarps + warp_index();
  if (code >= segments.codes) return;
  const Segment segment = find_segment(args.keys, num_pairs, static_cast<uint32_t>(code));
  if (segments.counts && lane_index() == 0) segments.counts[code] = segment.end - segment.begin;
  if (segment.is_long()) return;
  for (int64_t d = lane_index(); d < segments.dim; d += kWarpSize) {
    segments.sums[code * segments.dim + d] =
        static_cast<float>(sum_range(segment.begin, segment.end, [&](int64_t position) {
          return args.row_channel(position, d);
        }));
  }
  if (segment.begin < segment.end) args.finish(code);
}

struct SumScratch {
  PairSort sort;
  int64_t chunks;
  double* partials;
  int* chunks_done;

  SumScratch(Workspace& workspace, const SegmentSumArgs<float>& args)
      : sort(workspace, args.num_rows),
        chunks(ceil_div(args.num_rows, kChunk)),
        partials(workspace.take<double>(chunks * 2 * args.dim)),
        chunks_done(workspace.take<int>(chunks)) {}
};

// `codebook` may be null: the sums are left as they are.
cudaError_t sort_and_sum(const SegmentSumArgs<float>& args, const CodebookLayout& layout,
                         const float* codebook, void* workspace_memory, cudaStream_t stream) {
  if (args.codes < 1 || args.codes > (int64_t{1} << 30) || args.num_rows < 0 ||
      args.num_rows > INT_MAX) {
    return cudaErrorInvalidValue;
  }
  if (args.num_rows == 0) {
    if (args.counts) {
      TOKENFLOW_CUDA_TRY(cudaMemsetAsync(
          args.counts, 0, static_cast<size_t>(args.codes) * sizeof(int64_t), stream));
    }
    return cudaMemsetAsync(args.sums, 0, static_cast<size_t>(args.codes * args.dim) * sizeof(float),
                           stream);
  }
  Workspace workspace(workspace_memory);
  const SumScratch scratch(workspace, args);
  SortedPairs pairs = {};
  TOKENFLOW_CUDA_TRY(launch_sort_pairs(scratch.sort, args.indices, args.codes, args.num_rows,
                                       scratch.chunks_done, scratch.chunks, &pairs, stream));
  SumArgs sum = {};
  sum.segments = args;
  sum.layout = layout;
  sum.codebook = codebook;
  sum.keys = pairs.keys;
  sum.order = pairs.rows;
  sum.num_pairs = pairs.num_pairs;
  sum.chunks = scratch.chunks;
  sum.partials = scratch.partials;
  sum.chunks_done = scratch.chunks_done;
  return launch(sum_segments_kernel,
                dim3(static_cast<unsigned>(scratch.chunks + ceil_div(args.codes, kSumWarps))),
                kSumThreads, sizeof(SumShared), stream, sum);
}

}  // namespace

size_t segment_sum_workspace_bytes(const SegmentSumArgs<float>& args) {
  Workspace workspace(nullptr);
  const SumScratch scratch(workspace, args);
  (void)scratch;
  return workspace.bytes();
}

cudaError_t launch_segment_sum(const SegmentSumArgs<float>& args, void* workspace,
                               cudaStream_t stream) {
  return sort_and_sum(args, {}, nullptr, workspace, stream);
}

cudaError_t launch_codebook_gradient(const SegmentSumArgs<float>& args,
                                     const CodebookLayout& layout, const float* codebook,
                                     void* workspace, cudaStream_t stream) {
  return sort_and_sum(args, layout, layout.l2_norm ? codebook : nullptr, workspace, stream);
}

}  // namespace tokenflow::cuda
