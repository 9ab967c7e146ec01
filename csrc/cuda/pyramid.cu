// Entry points of the residual pyramid: quantize, pyramid_rows and decode.
#include "quantizer.h"
#include "residual_pass.cuh"

namespace tokenflow::cuda {
namespace {

int64_t total_tokens(const Pyramid& pyramid) { return pyramid.batch * tokens_per_image(pyramid); }

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
  double* map_error;  // [scales, batch]
  float* residual;

  QuantizeScratch(Workspace& workspace, const QuantizeArgs<float>& args)
      : codes(take_packed_codes(workspace, args.layout)),
        packed(take_packed_rows(workspace, args.layout, largest_rows(args.pyramid, args.layout),
                                codes)),
        records(take_records(workspace, args.layout, largest_rows(args.pyramid, args.layout))),
        rows(workspace.take<float>(total_tokens(args.pyramid) * args.layout.dim)),
        row_error(workspace.take<double>(total_tokens(args.pyramid))),
        map_error(workspace.take<double>(args.pyramid.num_scales * args.pyramid.batch)),
        residual(workspace.take<float>(args.pyramid.batch * args.layout.dim * args.pyramid.height *
                                       args.pyramid.width)) {}
};

template <typename Args>
struct NormsScratch {
  double* code_inverse_norms;

  NormsScratch(Workspace& workspace, const Args& args)
      : code_inverse_norms(workspace.take<double>(all_codes(args.layout) * args.layout.groups)) {}
};

using RowsScratch = NormsScratch<PyramidRowsArgs<float>>;
using DecodeScratch = NormsScratch<DecodeArgs<float>>;

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
  QuantizeScratch scratch(workspace, args);
  TOKENFLOW_CUDA_TRY(cudaMemsetAsync(
      args.hits, 0, static_cast<size_t>(all_codes(layout)) * sizeof(int64_t), stream));
  if (pyramid.batch == 0 || pyramid.num_scales == 0) {
    return cudaMemsetAsync(args.squared_error, 0,
                           static_cast<size_t>(layout.books * pyramid.num_scales) * sizeof(float),
                           stream);
  }
  int multiprocessors = 0;
  TOKENFLOW_CUDA_TRY(num_multiprocessors(&multiprocessors));
  TOKENFLOW_CUDA_TRY(choose_order(layout, &scratch.codes.order));
  TOKENFLOW_CUDA_TRY(
      launch_pack(layout, args.codebook, scratch.codes, nullptr, {}, 0, scratch.packed, stream));

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

  const NamedCodes codes = {layout, args.codebook, scratch.codes.inverse_norms, args.indices};
  TOKENFLOW_CUDA_TRY(launch_first_rows(pyramid, layout.dim, {args.h, scratch.rows}, stream));
  for (int s = 0; s < pyramid.num_scales; ++s) {
    search.scale_id = s;
    search.map = {tokens_per_image(pyramid), pyramid.first_token[s], area(pyramid.extent[s]),
                  layout.books};
    search.num_rows = pyramid.batch / layout.books * search.map.count;
    TOKENFLOW_CUDA_TRY(launch_pack_rows(layout, scratch.rows, search.map, search.num_rows,
                                        scratch.packed, stream));
    TOKENFLOW_CUDA_TRY(launch_search(search, stream));
    const ErrorSums errors = {static_cast<unsigned>(pyramid.batch), scratch.row_error,
                              scratch.map_error + s * pyramid.batch};
    if (s + 1 < pyramid.num_scales) {
      const float* residual = s == 0 ? args.h : scratch.residual;
      TOKENFLOW_CUDA_TRY(launch_step(
          pyramid, s, {codes, residual, scratch.residual, args.quantized, scratch.rows, errors},
          stream));
    } else {
      TOKENFLOW_CUDA_TRY(launch_last_step(pyramid, {codes, args.quantized, errors}, stream));
    }
  }
  return launch_mean_errors(pyramid, layout, scratch.map_error, args.squared_error, stream);
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
  const NamedCodes codes = {args.layout, args.codebook, scratch.code_inverse_norms, args.indices};
  TOKENFLOW_CUDA_TRY(launch_all_rows(pyramid, {codes, args.h, args.rows}, stream));
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
  const NamedCodes codes = {args.layout, args.codebook, scratch.code_inverse_norms, args.indices};
  return launch_sum_of_codes(pyramid, {codes, args.quantized}, stream);
}

}  // namespace tokenflow::cuda
