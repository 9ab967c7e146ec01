// The residual pyramid's steps: gather, bicubic upsampling, accumulation, residual update and
// pooling to the next scale. Between scales a search needs all channels of a row, so that each step
// is a launch; where the indices are known one launch goes through all of them.
#include <climits>

#include "../common/normalize.h"
#include "planes.cuh"
#include "quantizer.h"
#include "residual_pass.cuh"
#include "scalar.h"

namespace tokenflow::cuda {
namespace {

constexpr int kErrorMaps = kPlaneThreads / kWarpSize;  // of a block

// The normalised code of a channel at place p of a map's scale, or 0.
struct CodeOfToken {
  const NamedCodes& codes;
  const int64_t* indices;  // of the scale
  int first_code;          // of the map's codebook
  int channel;
  int group;

  __device__ __forceinline__ CodeOfToken(const NamedCodes& codes, const ChannelBlock& block,
                                         const RowShare& share, int tokens)
      : codes(codes),
        indices(codes.indices + static_cast<int64_t>(block.map) * tokens),
        first_code(tokenflow::cuda::first_code(codes.layout, block.map)),
        channel(block.first + share.channel),
        group(group_of(channel, codes.layout)) {}

  __device__ __forceinline__ CodeOfToken at(const Scale& scale) const {
    CodeOfToken code = *this;
    code.indices += scale.first_token;
    return code;
  }

  __device__ __forceinline__ float operator()(int p) const {
    const int64_t index = indices[p];
    return names_code(index, codes.layout)
               ? unit_code(codes.codebook, codes.code_inverse_norms, codes.layout,
                           first_code + static_cast<int>(index), channel, group)
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

// The kernels below have a block for every map and `channels` channels, which owns their planes, so
// that nothing but sums and pooled rows leaves it between scales. Shared memory: the plane, a
// scale's codes, and one axis of the resampling for every channel, plus tables of taps and bins:
// for 16 x 16 planes 3 KiB a channel and 1.3 KiB of tables. Operations: 16 a scale and element of
// the plane. Bound by latency for the small planes of TokenFlow, by memory for large ones.

// Bytes: 4 dim height width read, 4 dim a row of scale 0 written.
__global__ void __launch_bounds__(kPlaneThreads, 6)
    first_rows_kernel(const __grid_constant__ FirstRowsArgs args,
                      const __grid_constant__ PlaneBlocks blocks,
                      const __grid_constant__ PlaneShape shape,
                      const __grid_constant__ Scale scale) {
  const ChannelBlock block = channel_block(blockIdx.x, blocks.dim, blocks.channels);
  const RowShare share(block, blocks.channels);
  const Planes shared(blocks);
  load_planes(args.h + plane_offset(block, blocks.dim, shape), block, shape, shared);
  pool(shape, scale.extent, block, share, shared, blocks.dim,
       args.rows + row_offset(block, share, blocks.dim, shape, scale));
}

// What a scale's row errors sum up to for each map. By blocks of their own, which the others do not
// wait for: a warp a map. Sums in a fixed order. Bytes: 8 a row.
__device__ __forceinline__ void sum_row_errors(unsigned block, const ErrorSums& sums,
                                               const PlaneShape& shape, const Scale& scale) {
  const unsigned map = block * kErrorMaps + static_cast<unsigned>(warp_index());
  if (map >= sums.maps) return;
  const double* errors =
      sums.row_error + map * static_cast<unsigned>(shape.tokens) + scale.first_token;
  double total = 0;
#pragma unroll 4  // so that several loads are on their way
  for (int n = lane_index(); n < area(scale.extent); n += kWarpSize) total += errors[n];
  total = sum_over_lanes<kWarpSize>(total);
  if (lane_index() == 0) sums.map_error[map] = total;
}

unsigned error_blocks(const ErrorSums& sums) {
  return static_cast<unsigned>(ceil_div(sums.maps, kErrorMaps));
}

// What a scale does to f^.
enum class Sum { kBegins, kGoesOn };

template <Sum kSum>
__device__ __forceinline__ void add_to(float* sum, float value) {
  *sum = kSum == Sum::kBegins ? value : *sum + value;
}

// Grid: further blocks sum the row errors. Bytes: 4 dim (rows + height width) and the codes read,
// and as much written; 4 dim height width more of f^ read where it goes on.
template <Sum kSum>
__global__ void __launch_bounds__(kPlaneThreads, 5)
    step_kernel(const __grid_constant__ StepArgs args, const __grid_constant__ PlaneBlocks blocks,
                const __grid_constant__ PlaneShape shape, const __grid_constant__ Scale scale,
                const __grid_constant__ Scale next) {
  if (blockIdx.x >= blocks.count) {
    sum_row_errors(blockIdx.x - blocks.count, args.errors, shape, scale);
    return;
  }
  const ChannelBlock block = channel_block(blockIdx.x, blocks.dim, blocks.channels);
  const RowShare share(block, blocks.channels);
  const Planes shared(blocks);
  const int64_t offset = plane_offset(block, blocks.dim, shape);
  load_planes(args.residual_in + offset, block, shape, shared);
  float* quantized = args.quantized + offset;
  // Of all that is in global memory the loop touches f^ alone: loads of an array that may be
  // another would wait for the stores before them.
  upsample_codes(shape, scale.extent, block, share, shared,
                 CodeOfToken(args.codes, block, share, shape.tokens).at(scale),
                 [&](int i, float u) {
                   shared.plane[i] -= u;
                   add_to<kSum>(quantized + i, u);
                 });
  store_planes(args.residual_out + offset, block, shape, shared);
  pool(shape, next.extent, block, share, shared, blocks.dim,
       args.rows + row_offset(block, share, blocks.dim, shape, next));
}

// Grid: as step_kernel's. Shared memory: no plane. Bytes: the codes read, 4 dim height width
// written, and as much read where f^ goes on.
template <Sum kSum>
__global__ void __launch_bounds__(kPlaneThreads, 6)
    last_step_kernel(const __grid_constant__ LastStepArgs args,
                     const __grid_constant__ PlaneBlocks blocks,
                     const __grid_constant__ PlaneShape shape,
                     const __grid_constant__ Scale scale) {
  if (blockIdx.x >= blocks.count) {
    sum_row_errors(blockIdx.x - blocks.count, args.errors, shape, scale);
    return;
  }
  const ChannelBlock block = channel_block(blockIdx.x, blocks.dim, blocks.channels);
  const RowShare share(block, blocks.channels);
  float* quantized = args.quantized + plane_offset(block, blocks.dim, shape);
  upsample_codes(shape, scale.extent, block, share, Planes(blocks),
                 CodeOfToken(args.codes, block, share, shape.tokens).at(scale),
                 [&](int i, float u) { add_to<kSum>(quantized + i, u); });
}

// Bytes: 4 dim height width read, and a scale's codes read and rows written.
__global__ void __launch_bounds__(kPlaneThreads, 5)
    all_rows_kernel(const __grid_constant__ AllRowsArgs args,
                    const __grid_constant__ PlaneBlocks blocks,
                    const __grid_constant__ Pyramid pyramid) {
  const PlaneShape shape = plane_shape(pyramid);
  const ChannelBlock block = channel_block(blockIdx.x, blocks.dim, blocks.channels);
  const RowShare share(block, blocks.channels);
  const Planes shared(blocks);
  load_planes(args.h + plane_offset(block, blocks.dim, shape), block, shape, shared);
  const CodeOfToken code(args.codes, block, share, shape.tokens);
  for (int s = 0; s < pyramid.num_scales; ++s) {
    const Scale scale = scale_of(pyramid, s);
    pool(shape, scale.extent, block, share, shared, blocks.dim,
         args.rows + row_offset(block, share, blocks.dim, shape, scale));
    if (s + 1 == pyramid.num_scales) return;
    upsample_codes(shape, scale.extent, block, share, shared, code.at(scale),
                   [&](int i, float u) { shared.plane[i] -= u; });
  }
}

// Bytes: the codes read, 4 dim height width written.
__global__ void __launch_bounds__(kPlaneThreads, 6)
    sum_of_codes_kernel(const __grid_constant__ SumOfCodesArgs args,
                        const __grid_constant__ PlaneBlocks blocks,
                        const __grid_constant__ Pyramid pyramid) {
  const PlaneShape shape = plane_shape(pyramid);
  const ChannelBlock block = channel_block(blockIdx.x, blocks.dim, blocks.channels);
  const RowShare share(block, blocks.channels);
  const Planes shared(blocks);
  for (int i = threadIdx.x; i < block.count * shape.height * shape.width; i += kPlaneThreads) {
    shared.plane[i] = 0;
  }
  const CodeOfToken code(args.codes, block, share, shape.tokens);
  for (int s = 0; s < pyramid.num_scales; ++s) {
    const Scale scale = scale_of(pyramid, s);
    upsample_codes(shape, scale.extent, block, share, shared, code.at(scale),
                   [&](int i, float u) { shared.plane[i] += u; });
  }
  store_planes(args.quantized + plane_offset(block, blocks.dim, shape), block, shape, shared);
}

// Grid: a warp for each of a codebook's scales, which owns its mean over rows and channels (0 where
// the scale was dropped: its rows' errors are 0). Sums in a fixed order. Bytes: 8 a map and scale;
// bound by latency.
__global__ void __launch_bounds__(kPlaneThreads)
    mean_errors_kernel(const __grid_constant__ Pyramid pyramid,
                       const __grid_constant__ CodebookLayout layout, const double* map_error,
                       float* squared_error) {
  const int64_t mean = static_cast<int64_t>(blockIdx.x) * kErrorMaps + warp_index();
  const int64_t book = mean / pyramid.num_scales;
  if (book >= layout.books) return;
  const int s = static_cast<int>(mean - book * pyramid.num_scales);
  const int64_t images = pyramid.batch / layout.books;
  double total = 0;
#pragma unroll 4  // so that several loads are on their way
  for (int64_t i = lane_index(); i < images; i += kWarpSize) {
    total += map_error[s * pyramid.batch + i * layout.books + book];
  }
  total = sum_over_lanes<kWarpSize>(total);
  if (lane_index() == 0) {
    const int64_t squares = images * area(pyramid.extent[s]) * layout.dim;
    squared_error[mean] = static_cast<float>(total / static_cast<double>(squares));
  }
}

}  // namespace

cudaError_t launch_first_rows(const Pyramid& pyramid, int dim, const FirstRowsArgs& args,
                              cudaStream_t stream) {
  PlaneSizes sizes = sizes_with_plane(pyramid);
  sizes.pools(pyramid, 0);
  const PlaneBlocks blocks(pyramid.batch, dim, sizes);
  return launch(first_rows_kernel, dim3(blocks.count), kPlaneThreads, blocks.shared_bytes(), stream,
                args, blocks, plane_shape(pyramid), scale_of(pyramid, 0));
}

cudaError_t launch_step(const Pyramid& pyramid, int s, const StepArgs& args, cudaStream_t stream) {
  PlaneSizes sizes = sizes_with_plane(pyramid);
  sizes.adds(pyramid, s);
  sizes.pools(pyramid, s + 1);
  const PlaneBlocks blocks(pyramid.batch, args.codes.layout.dim, sizes);
  return launch(s == 0 ? step_kernel<Sum::kBegins> : step_kernel<Sum::kGoesOn>,
                dim3(blocks.count + error_blocks(args.errors)), kPlaneThreads,
                blocks.shared_bytes(), stream, args, blocks, plane_shape(pyramid),
                scale_of(pyramid, s), scale_of(pyramid, s + 1));
}

cudaError_t launch_last_step(const Pyramid& pyramid, const LastStepArgs& args,
                             cudaStream_t stream) {
  const int s = pyramid.num_scales - 1;
  PlaneSizes sizes = {};
  sizes.adds(pyramid, s);
  const PlaneBlocks blocks(pyramid.batch, args.codes.layout.dim, sizes);
  return launch(s == 0 ? last_step_kernel<Sum::kBegins> : last_step_kernel<Sum::kGoesOn>,
                dim3(blocks.count + error_blocks(args.errors)), kPlaneThreads,
                blocks.shared_bytes(), stream, args, blocks, plane_shape(pyramid),
                scale_of(pyramid, s));
}

cudaError_t launch_all_rows(const Pyramid& pyramid, const AllRowsArgs& args, cudaStream_t stream) {
  const PlaneBlocks blocks(pyramid.batch, args.codes.layout.dim, sizes_of_all_scales(pyramid));
  return launch(all_rows_kernel, dim3(blocks.count), kPlaneThreads, blocks.shared_bytes(), stream,
                args, blocks, pyramid);
}

cudaError_t launch_sum_of_codes(const Pyramid& pyramid, const SumOfCodesArgs& args,
                                cudaStream_t stream) {
  PlaneSizes sizes = sizes_with_plane(pyramid);
  for (int s = 0; s < pyramid.num_scales; ++s) sizes.adds(pyramid, s);
  const PlaneBlocks blocks(pyramid.batch, args.codes.layout.dim, sizes);
  return launch(sum_of_codes_kernel, dim3(blocks.count), kPlaneThreads, blocks.shared_bytes(),
                stream, args, blocks, pyramid);
}

cudaError_t launch_mean_errors(const Pyramid& pyramid, const CodebookLayout& layout,
                               const double* map_error, float* squared_error, cudaStream_t stream) {
  const int64_t means = layout.books * pyramid.num_scales;
  return launch(mean_errors_kernel, dim3(static_cast<unsigned>(ceil_div(means, kErrorMaps))),
                kPlaneThreads, 0, stream, pyramid, layout, map_error, squared_error);
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
  // int64 before the sizes are multiplied as int.
  const int64_t largest = static_cast<int64_t>(kPlaneSharedLimit / sizeof(float));
  const auto exceeds = [&](int64_t height, int64_t width) { return height * width > largest; };
  bool too_large = exceeds(pyramid.height, pyramid.width);
  for (int s = 0; s < pyramid.num_scales && !too_large; ++s) {
    const Extent e = pyramid.extent[s];
    too_large = exceeds(e.height, e.width) || exceeds(e.height, pyramid.width) ||
                exceeds(pyramid.height, e.width);
  }
  if (!too_large) {
    const PlaneSizes sizes = sizes_of_all_scales(pyramid);
    too_large = sizes.table_bytes() + sizes.channel_bytes() > kPlaneSharedLimit;
  }
  return too_large
             ? "the CUDA kernels keep a channel's plane, a scale's codes and the half-resampled "
               "plane in 96 KiB of shared memory: height x width and the scales are too large"
             : nullptr;
}

}  // namespace tokenflow::cuda
