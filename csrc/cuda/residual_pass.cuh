// The steps of the residual pyramid.
#pragma once

#include "pyramid.cuh"
#include "search.cuh"

namespace tokenflow::cuda {

// The codes that known indices name.
struct NamedCodes {
  CodebookLayout layout;
  const float* codebook;             // [books, codes, dim]
  const double* code_inverse_norms;  // [books, codes, groups]
  const int64_t* indices;            // [batch, tokens]
};

// A scale's row errors, summed up for each map.
struct ErrorSums {
  unsigned maps;
  const double* row_error;  // [batch, tokens]
  double* map_error;        // out [batch], of the scale
};

// The rows that scale 0 is searched with: h pooled.
struct FirstRowsArgs {
  const float* h;  // [batch, dim, height, width]
  float* rows;     // out [batch, tokens, dim]: the scale's, not normalised
};

// A scale's codes are added to f^ and taken from the residual, which is pooled to the next scale.
struct StepArgs {
  NamedCodes codes;
  const float* residual_in;  // [batch, dim, height, width]: h at the first scale
  float* residual_out;       // the same; may be residual_in
  float* quantized;          // [batch, dim, height, width]: f^, empty at the first scale
  float* rows;               // out [batch, tokens, dim]: the next scale's
  ErrorSums errors;
};

// After the last scale there is no residual left to keep.
struct LastStepArgs {
  NamedCodes codes;
  float* quantized;
  ErrorSums errors;
};

cudaError_t launch_first_rows(const Pyramid& pyramid, int dim, const FirstRowsArgs& args,
                              cudaStream_t stream);
cudaError_t launch_step(const Pyramid& pyramid, int s, const StepArgs& args, cudaStream_t stream);
cudaError_t launch_last_step(const Pyramid& pyramid, const LastStepArgs& args, cudaStream_t stream);

// squared_error [books, scales]: means over rows and channels, from the steps' sums [scales,
// batch].
cudaError_t launch_mean_errors(const Pyramid& pyramid, const CodebookLayout& layout,
                               const double* map_error, float* squared_error, cudaStream_t stream);

// The rows of every scale, not normalised, from h and the indices of all scales (but the last,
// whose are not read).
struct AllRowsArgs {
  NamedCodes codes;
  const float* h;
  float* rows;  // out [batch, tokens, dim]
};

cudaError_t launch_all_rows(const Pyramid& pyramid, const AllRowsArgs& args, cudaStream_t stream);

// The sum of all scales' upsampled codes.
struct SumOfCodesArgs {
  NamedCodes codes;
  float* quantized;  // out [batch, dim, height, width]
};

cudaError_t launch_sum_of_codes(const Pyramid& pyramid, const SumOfCodesArgs& args,
                                cudaStream_t stream);

// Normalises `rows` [num_rows, dim] by groups, in place.
cudaError_t launch_normalize_rows(const CodebookLayout& layout, float* rows, int64_t num_rows,
                                  cudaStream_t stream);

}  // namespace tokenflow::cuda
