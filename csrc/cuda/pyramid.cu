// Entry points of the residual pyramid: quantize, pyramid_rows and decode.
#include "quantizer.h"
#include "residual_pass.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kErrorThreads = 1024;

int64_t total_tokens(const Pyramid& pyramid) { return pyramid.batch * tokens_per_image(pyramid); }

// Grid: (scales, codebooks); a block owns the scale's mean over the rows and channels of a codebook
// (0 where it was dropped: its rows' errors are 0). Sums in float64 in a fixed order: every
// thread over rows kErrorThreads apart, then a tree. Shared memory: a double a thread.
// Bytes: 8 a row; bound by latency.
__global__ void __launch_bounds__(kErrorThreads)
    mean_errors_kernel(const __grid_constant__ Pyramid pyramid,
                       const __grid_constant__ CodebookLayout layout, const double* row_error,
                       float* squared_error) {
  const int s = static_cast<int>(blockIdx.x);
  const int64_t book = blockIdx.y;
  double* partial = shared_memory<double>();
  const TokenMap map = {tokens_per_image(pyramid), pyramid.first_token[s],
                        pyramid.first_token[s + 1] - pyramid.first_token[s], layout.books};
  const int64_t rows = pyramid.batch / layout.books * map.count;
  double total = 0;
#pragma unroll 4  // so that several loads are on their way
  for (int64_t n = threadIdx.x; n < rows; n += kErrorThreads) {
    total += row_error[map.token(n, book)];
  }
  partial[threadIdx.x] = total;
  for (int step = kErrorThreads / 2; step > 0; step /= 2) {
    block_barrier();
    if (static_cast<int>(threadIdx.x) < step) partial[threadIdx.x] += partial[threadIdx.x + step];
  }
  if (threadIdx.x == 0) {
    squared_error[book * pyramid.num_scales + s] =
        static_cast<float>(partial[0] / static_cast<double>(rows * layout.dim));
  }
}

// Of a codebook at a scale.
int64_t largest_rows(const Pyramid& pyramid, const CodebookLayout& layout) {
  int64_t largest = 0;
  for (int s = 0; s < pyramid.num_scales; ++s) {
    const int64_t rows = pyramid.batch / layout.books * area(pyramid.extent[s]);
    largest = rows > largest ? rows : largest;
  }
  return largest;
}

struct QuantizeScratch {
  PackedCodes codes;
  PackedRows packed;
  ScoreRecord* records;
  float* rows;
  double* row_error;
  float* residual;

  QuantizeScratch(Workspace& workspace, const QuantizeArgs<float>& args)
      : codes(take_packed_codes(workspace, args.layout)),
        packed(take_packed_rows(workspace, args.layout, largest_rows(args.pyramid, args.layout),
                                codes)),
        records(take_records(workspace, args.layout, largest_rows(args.pyramid, args.layout))),
        rows(workspace.take<float>(total_tokens(args.pyramid) * args.layout.dim)),
        row_error(workspace.take<double>(total_tokens(args.pyramid))),
        residual(workspace.take<float>(args.pyramid.batch * args.layout.dim * args.pyramid.height *
                                       args.pyramid.width)) {}
};

struct RowsScratch {
  double* code_inverse_norms;

  RowsScratch(Workspace& workspace, const PyramidRowsArgs<float>& args)
      : code_inverse_norms(workspace.take<double>(all_codes(args.layout) * args.layout.groups)) {}
};

struct DecodeScratch {
  double* code_inverse_norms;

  DecodeScratch(Workspace& workspace, const DecodeArgs<float>& args)
      : code_inverse_norms(workspace.take<double>(all_codes(args.layout) * args.layout.groups)) {}
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
  TOKENFLOW_CUDA_TRY(cudaMemsetAsync(
      args.hits, 0, static_cast<size_t>(all_codes(layout)) * sizeof(int64_t), stream));
  if (pyramid.batch == 0 || pyramid.num_scales == 0) {
    return cudaMemsetAsync(args.squared_error, 0,
                           static_cast<size_t>(layout.books * pyramid.num_scales) * sizeof(float),
                           stream);
  }
  int multiprocessors = 0;
  TOKENFLOW_CUDA_TRY(num_multiprocessors(&multiprocessors));
  TOKENFLOW_CUDA_TRY(
      launch_pack(layout, args.codebook, scratch.codes, nullptr, {}, 0, scratch.packed, stream));

  ResidualPassArgs pass = {};
  pass.pyramid = pyramid;
  pass.layout = layout;
  pass.codebook = args.codebook;
  pass.code_inverse_norms = scratch.codes.inverse_norms;
  pass.indices = args.indices;
  pass.sign = -1;
  pass.rows = scratch.rows;

  SearchArgs search = {};
  search.layout = layout;
  search.codebook = args.codebook;
  search.codes = scratch.codes;
  search.rows = scratch.rows;
  search.packed = scratch.packed;
  search.dropped = args.dropped;
  search.multiprocessors = multiprocessors;
  search.records = scratch.records;
  search.indices = args.indices;
  search.hits = args.hits;
  search.row_error = scratch.row_error;

  // Pool h to the first scale, then search a scale and step to the next. The last step only adds.
  for (int s = -1; s < pyramid.num_scales; ++s) {
    const bool last = s + 1 == pyramid.num_scales;
    if (s >= 0) {
      search.scale_id = s;
      search.map = {tokens_per_image(pyramid), pyramid.first_token[s], area(pyramid.extent[s]),
                    layout.books};
      search.num_rows = pyramid.batch / layout.books * search.map.count;
      TOKENFLOW_CUDA_TRY(launch_pack_rows(layout, scratch.rows, search.map, search.num_rows,
                                          scratch.packed, stream));
      TOKENFLOW_CUDA_TRY(launch_search(search, stream));
    }
    pass.first = pass.last = s;
    pass.plane_in = s <= 0 ? args.h : scratch.residual;
    pass.plane_out = s < 0 || last ? nullptr : scratch.residual;
    pass.sum = s < 0 ? nullptr : args.quantized;
    pass.sum_is_empty = s == 0;
    TOKENFLOW_CUDA_TRY(launch_residual_pass(pass, stream));
  }
  return launch(
      mean_errors_kernel,
      dim3(static_cast<unsigned>(pyramid.num_scales), static_cast<unsigned>(layout.books)),
      kErrorThreads, kErrorThreads * sizeof(double), stream, pyramid, layout, scratch.row_error,
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
  TOKENFLOW_CUDA_TRY(
      launch_inverse_norms(args.layout, args.codebook, scratch.code_inverse_norms, stream));
  ResidualPassArgs pass = recompute_rows(args, scratch.code_inverse_norms, args.rows);
  TOKENFLOW_CUDA_TRY(launch_residual_pass(pass, stream));
  return launch_normalize_rows(args.layout, args.rows, total_tokens(pyramid), stream);
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
  TOKENFLOW_CUDA_TRY(
      launch_inverse_norms(args.layout, args.codebook, scratch.code_inverse_norms, stream));
  ResidualPassArgs pass = {};
  pass.pyramid = pyramid;
  pass.layout = args.layout;
  pass.first = 0;
  pass.last = pyramid.num_scales - 1;
  pass.codebook = args.codebook;
  pass.code_inverse_norms = scratch.code_inverse_norms;
  pass.indices = args.indices;
  pass.plane_out = args.quantized;
  pass.sign = 1;
  return launch_residual_pass(pass, stream);
}

}  // namespace tokenflow::cuda
