// Entry points of the residual pyramid: quantize, pyramid_rows and decode.
#include "quantizer.h"
#include "residual_pass.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kErrorThreads = 256;

int64_t total_tokens(const Pyramid& pyramid) { return pyramid.batch * tokens_per_image(pyramid); }

// Grid: a block a scale, which owns that scale's mean over rows and channels (0 where it was
// dropped: its rows' errors are 0). Sums in float64 in a fixed order: every
// thread over rows kErrorThreads apart, then a tree. Shared memory: a double a thread.
// Bytes: 8 a row; bound by latency.
__global__ void __launch_bounds__(kErrorThreads)
    mean_errors_kernel(const __grid_constant__ Pyramid pyramid, int dim, const double* row_error,
                       float* squared_error) {
  const int s = static_cast<int>(blockIdx.x);
  double* partial = shared_memory<double>();
  const TokenMap map = {tokens_per_image(pyramid), pyramid.first_token[s],
                        pyramid.first_token[s + 1] - pyramid.first_token[s]};
  double total = 0;
  for (int64_t n = threadIdx.x; n < pyramid.batch * map.count; n += kErrorThreads) {
    total += row_error[map.token(n)];
  }
  partial[threadIdx.x] = total;
  for (int step = kErrorThreads / 2; step > 0; step /= 2) {
    block_barrier();
    if (static_cast<int>(threadIdx.x) < step) partial[threadIdx.x] += partial[threadIdx.x + step];
  }
  if (threadIdx.x == 0) {
    const double squares = static_cast<double>(pyramid.batch * map.count * dim);
    squared_error[s] = static_cast<float>(partial[0] / squares);
  }
}

int64_t largest_rows(const Pyramid& pyramid) {
  int64_t largest = 0;
  for (int s = 0; s < pyramid.num_scales; ++s) {
    const int64_t rows = pyramid.batch * area(pyramid.extent[s]);
    largest = rows > largest ? rows : largest;
  }
  return largest;
}

struct QuantizeScratch {
  PackedCodes codes;
  double* code_scales;
  PackedRows packed;
  float* tile_max;
  float* rows;
  double* row_error;
  float* residual;
  int* images_done;

  QuantizeScratch(Workspace& workspace, const QuantizeArgs<float>& args)
      : codes(take_packed_codes(workspace, args.layout)),
        code_scales(workspace.take<double>(args.layout.codes * args.layout.groups)),
        packed(take_packed_rows(workspace, args.layout.dim, largest_rows(args.pyramid), codes)),
        tile_max(take_tile_max(workspace, args.layout, largest_rows(args.pyramid))),
        rows(workspace.take<float>(total_tokens(args.pyramid) * args.layout.dim)),
        row_error(workspace.take<double>(total_tokens(args.pyramid))),
        residual(workspace.take<float>(args.pyramid.batch * args.layout.dim * args.pyramid.height *
                                       args.pyramid.width)),
        images_done(workspace.take<int>(args.pyramid.batch)) {}
};

struct RowsScratch {
  double* code_scales;
  int* images_done;

  RowsScratch(Workspace& workspace, const PyramidRowsArgs<float>& args)
      : code_scales(workspace.take<double>(args.layout.codes * args.layout.groups)),
        images_done(workspace.take<int>(args.pyramid.batch)) {}
};

struct DecodeScratch {
  double* code_scales;

  DecodeScratch(Workspace& workspace, const DecodeArgs<float>& args)
      : code_scales(workspace.take<double>(args.layout.codes * args.layout.groups)) {}
};

template <typename Scratch, typename Args>
size_t scratch_bytes(const Args& args) {
  Workspace workspace(nullptr);
  Scratch scratch(workspace, args);
  (void)scratch;
  return workspace.bytes();
}

}  // namespace

size_t quantize_workspace_bytes(const QuantizeArgs<float>& args) {
  return scratch_bytes<QuantizeScratch>(args);
}

cudaError_t launch_quantize(const QuantizeArgs<float>& args, void* workspace_memory,
                            cudaStream_t stream) {
  const Pyramid& pyramid = args.pyramid;
  const CodebookLayout& layout = args.layout;
  if (unsupported_reason(pyramid, layout)) return cudaErrorInvalidValue;
  Workspace workspace(workspace_memory);
  const QuantizeScratch scratch(workspace, args);
  TF_CUDA_TRY(
      cudaMemsetAsync(args.hits, 0, static_cast<size_t>(layout.codes) * sizeof(int64_t), stream));
  if (pyramid.batch == 0 || pyramid.num_scales == 0) {
    return cudaMemsetAsync(args.squared_error, 0,
                           static_cast<size_t>(pyramid.num_scales) * sizeof(float), stream);
  }
  TF_CUDA_TRY(cudaMemsetAsync(scratch.images_done, 0,
                              static_cast<size_t>(pyramid.batch) * sizeof(int), stream));
  TF_CUDA_TRY(launch_pack(layout, args.codebook, scratch.codes, scratch.code_scales, nullptr, 0,
                          scratch.packed, stream));

  WalkArgs walk = {};
  walk.pyramid = pyramid;
  walk.layout = layout;
  walk.codebook = args.codebook;
  walk.code_scales = scratch.code_scales;
  walk.indices = args.indices;
  walk.sign = -1;
  walk.rows = scratch.rows;
  walk.images_done = scratch.images_done;
  walk.packed = scratch.packed;

  SearchArgs search = {};
  search.layout = layout;
  search.codebook = args.codebook;
  search.codes = scratch.codes;
  search.rows = scratch.rows;
  search.packed = scratch.packed;
  search.dropped = args.dropped;
  search.code_scales = scratch.code_scales;
  search.tile_max = scratch.tile_max;
  search.indices = args.indices;
  search.hits = args.hits;
  search.row_error = scratch.row_error;

  // Pool h to the first scale, then search a scale and step to the next. The last step only adds.
  for (int s = -1; s < pyramid.num_scales; ++s) {
    const bool last = s + 1 == pyramid.num_scales;
    if (s >= 0) {
      search.scale = s;
      search.map = {tokens_per_image(pyramid), pyramid.first_token[s], area(pyramid.extent[s])};
      search.num_rows = pyramid.batch * search.map.count;
      TF_CUDA_TRY(launch_search(search, stream));
    }
    walk.first = walk.last = s;
    walk.plane_in = s <= 0 ? args.h : scratch.residual;
    walk.plane_out = s < 0 || last ? nullptr : scratch.residual;
    walk.sum = s < 0 ? nullptr : args.quantized;
    walk.sum_is_empty = s == 0;
    walk.finish = last ? Finish::kNothing : Finish::kPack;
    TF_CUDA_TRY(launch_walk(walk, stream));
  }
  return launch(mean_errors_kernel, dim3(static_cast<unsigned>(pyramid.num_scales)), kErrorThreads,
                kErrorThreads * sizeof(double), stream, pyramid, layout.dim, scratch.row_error,
                args.squared_error);
}

size_t pyramid_rows_workspace_bytes(const PyramidRowsArgs<float>& args) {
  return scratch_bytes<RowsScratch>(args);
}

cudaError_t launch_pyramid_rows(const PyramidRowsArgs<float>& args, void* workspace_memory,
                                cudaStream_t stream) {
  const Pyramid& pyramid = args.pyramid;
  if (unsupported_reason(pyramid, args.layout)) return cudaErrorInvalidValue;
  if (total_tokens(pyramid) == 0) return cudaSuccess;
  Workspace workspace(workspace_memory);
  const RowsScratch scratch(workspace, args);
  TF_CUDA_TRY(cudaMemsetAsync(scratch.images_done, 0,
                              static_cast<size_t>(pyramid.batch) * sizeof(int), stream));
  TF_CUDA_TRY(launch_scale_codes(args.layout, args.codebook, scratch.code_scales, stream));
  WalkArgs walk = recompute_rows(args, scratch.code_scales, args.rows);
  walk.finish = Finish::kNormalize;
  walk.images_done = scratch.images_done;
  return launch_walk(walk, stream);
}

size_t decode_workspace_bytes(const DecodeArgs<float>& args) {
  return scratch_bytes<DecodeScratch>(args);
}

cudaError_t launch_decode(const DecodeArgs<float>& args, void* workspace_memory,
                          cudaStream_t stream) {
  const Pyramid& pyramid = args.pyramid;
  if (unsupported_reason(pyramid, args.layout)) return cudaErrorInvalidValue;
  if (pyramid.batch == 0) return cudaSuccess;
  Workspace workspace(workspace_memory);
  const DecodeScratch scratch(workspace, args);
  TF_CUDA_TRY(launch_scale_codes(args.layout, args.codebook, scratch.code_scales, stream));
  WalkArgs walk = {};
  walk.pyramid = pyramid;
  walk.layout = args.layout;
  walk.first = 0;
  walk.last = pyramid.num_scales - 1;
  walk.codebook = args.codebook;
  walk.code_scales = scratch.code_scales;
  walk.indices = args.indices;
  walk.plane_out = args.quantized;
  walk.sign = 1;
  return launch_walk(walk, stream);
}

}  // namespace tokenflow::cuda
