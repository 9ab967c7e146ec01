// The residual pyramid's step, one kernel: gather, bicubic upsampling, accumulation, residual
// update and pooling to the next scale.
#include <climits>

#include "../common/normalize.h"
#include "planes.cuh"
#include "quantizer.h"
#include "residual_pass.cuh"
#include "scalar.h"

namespace tokenflow::cuda {
namespace {

// The normalised code of channel block.first + c at place p of a map's scale, or 0.
struct CodeOfToken {
  const ResidualPassArgs& args;
  const ChannelBlock& block;
  const int64_t* indices;  // of the scale

  __device__ __forceinline__ float operator()(int p, int c) const {
    const CodebookLayout& layout = args.layout;
    const int64_t index = indices[p];
    const int d = block.first + c;
    return names_code(index, layout)
               ? unit_code(args.codebook, args.code_inverse_norms, layout,
                           code_number(layout, block.map, index), d, group_of(d, layout))
               : 0.0f;
  }
};

// Grid: a thread a row, which it owns. Bytes: 8 dim a row. Bound by latency.
__global__ void __launch_bounds__(kPlaneThreads)
    normalize_rows_kernel(const __grid_constant__ CodebookLayout layout, float* rows,
                          int64_t num_rows) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kPlaneThreads + threadIdx.x;
  if (n < num_rows) normalize_row(rows + n * layout.dim, layout, rows + n * layout.dim);
}

// Grid: a block for every map and `channels` channels; the block owns their planes from the
// first scale to the last, so nothing but sums and pooled rows leaves it between scales.
// Shared memory: the plane, a scale's codes, and one axis of the resampling for every channel, plus
// tables of taps and bins: for 16 x 16 planes 3 KiB a channel and 1.3 KiB of tables.
// Bytes a scale: 4 dim (rows + height width) read, the same written; 2 reads and 1 write more of
// the plane where the pass is cut at every scale by a search. Operations: 16 a scale and element of
// the plane. Bound by latency for the small planes of TokenFlow, by memory for large ones.
__global__ void __launch_bounds__(kPlaneThreads, 3)
    residual_pass_kernel(const __grid_constant__ ResidualPassArgs args,
                         const __grid_constant__ PlaneSizes sizes) {
  const Pyramid& pyramid = args.pyramid;
  const ChannelBlock block = channel_block(blockIdx.x, args.layout.dim, args.channels);
  const Planes shared(pyramid, args.channels, sizes);
  const int elements = block.count * pyramid.height * pyramid.width;
  const int64_t offset =
      (block.map * args.layout.dim + block.first) * pyramid.height * pyramid.width;
  for (int i = threadIdx.x; i < elements; i += kPlaneThreads) {
    shared.plane[i] = args.plane_in ? args.plane_in[offset + i] : 0.0f;
  }  // whatever reads it comes after a barrier
  for (int s = args.first; s <= args.last; ++s) {
    if (s >= 0) {
      float* sum = args.sum ? args.sum + offset : nullptr;
      const int64_t first = block.map * tokens_per_image(pyramid) + pyramid.first_token[s];
      add_codes(pyramid, block.count, s, shared, args.sign, sum,
                args.sum_is_empty && s == args.first,
                CodeOfToken{args, block, args.indices + first});
    }
    if (args.rows && s + 1 < pyramid.num_scales) {
      pool(pyramid, block, s + 1, shared, args.layout.dim, args.rows);
    }
  }
  if (args.plane_out) {
    for (int i = threadIdx.x; i < elements; i += kPlaneThreads) {
      args.plane_out[offset + i] = shared.plane[i];
    }
  }
}

}  // namespace

cudaError_t launch_residual_pass(ResidualPassArgs args, cudaStream_t stream) {
  const PlaneSizes sizes(args.pyramid, args.first, args.last, args.rows != nullptr);
  const size_t channel_bytes = sizes.channel_bytes(args.pyramid);
  args.channels = choose_channels(args.pyramid.batch, args.layout.dim, channel_bytes);
  const int64_t blocks = args.pyramid.batch * ceil_div(args.layout.dim, args.channels);
  return launch(
      residual_pass_kernel, dim3(static_cast<unsigned>(blocks)), kPlaneThreads,
      sizes.table_bytes(args.pyramid) + static_cast<size_t>(args.channels) * channel_bytes, stream,
      args, sizes);
}

cudaError_t launch_normalize_rows(const CodebookLayout& layout, float* rows, int64_t num_rows,
                                  cudaStream_t stream) {
  return launch(normalize_rows_kernel,
                dim3(static_cast<unsigned>(ceil_div(num_rows, kPlaneThreads))), kPlaneThreads, 0,
                stream, layout, rows, num_rows);
}

const char* unsupported_reason(const CodebookLayout& layout) {
  if (layout.books < 1 || layout.books > 65535 || layout.codes < 1 ||
      layout.codes > (int64_t{1} << 30) / layout.books) {
    return "the CUDA kernels support up to 65,535 codebooks of 1 to 2^30 rows in all";
  }
  if (layout.dim > (1 << 20)) return "the CUDA kernels support at most 2^20 channels";
  return nullptr;
}

const char* unsupported_reason(const Pyramid& pyramid, const CodebookLayout& layout) {
  const char* reason = unsupported_reason(layout);
  return reason ? reason : unsupported_planes(pyramid, layout.dim);
}

const char* unsupported_planes(const Pyramid& pyramid, int dim) {
  if (pyramid.batch * tokens_per_image(pyramid) > INT_MAX || pyramid.batch * dim > INT_MAX ||
      pyramid.batch * pyramid.height > INT_MAX) {
    return "the CUDA kernels support at most 2^31 - 1 tokens, and maps times channels or lines, "
           "in a call";
  }
  // int64 before the sizes are multiplied as int: no side is above 2^15 (checked by the caller).
  const int64_t largest = static_cast<int64_t>(kPlaneSharedLimit / sizeof(float));
  const auto exceeds = [&](int64_t height, int64_t width) { return height * width > largest; };
  bool too_large = exceeds(pyramid.height, pyramid.width);
  for (int s = 0; s < pyramid.num_scales && !too_large; ++s) {
    const Extent e = pyramid.extent[s];
    too_large = exceeds(e.height, e.width) || exceeds(e.height, pyramid.width) ||
                exceeds(pyramid.height, e.width);
  }
  if (!too_large) {
    const PlaneSizes sizes(pyramid, -1, pyramid.num_scales - 1, true);
    too_large = sizes.table_bytes(pyramid) + sizes.channel_bytes(pyramid) > kPlaneSharedLimit;
  }
  return too_large
             ? "the CUDA kernels keep a channel's plane, a scale's codes and the half-resampled "
               "plane in 96 KiB of shared memory: height x width and the scales are too large"
             : nullptr;
}

}  // namespace tokenflow::cuda
