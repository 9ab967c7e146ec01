// One pass along the residual pyramid.
#pragma once

#include "pyramid.cuh"
#include "search.cuh"

namespace tokenflow::cuda {

// One pass along the residual pyramid for known indices: adds the codes of scales
// [first, last] one after the other, and pools the plane to scale s + 1 after scale s.
// first = -1 begins with pooling to scale 0.
struct ResidualPassArgs {
  Pyramid pyramid;
  CodebookLayout layout;
  int first;
  int last;
  int channels;                      // a block owns this many
  const float* codebook;             // [books, codes, dim]
  const double* code_inverse_norms;  // [books, codes, groups]
  const int64_t* indices;            // [batch, tokens]
  const float* plane_in;             // [batch, dim, height, width] or null: zeros
  float* plane_out;                  // the same or null; may be plane_in
  float sign;                        // the plane gains sign * u at every scale
  float* sum;                        // [batch, dim, height, width] gains u at every scale, or null
  bool sum_is_empty;                 // `sum` holds nothing yet
  float* rows;                       // out [batch, tokens, dim]: pooled rows; null: no pooling
};

// The pass that recomputes the rows of every scale from h and known indices, not normalised.
template <typename Args>
ResidualPassArgs recompute_rows(const Args& args, const double* code_inverse_norms, float* rows) {
  ResidualPassArgs pass = {};
  pass.pyramid = args.pyramid;
  pass.layout = args.layout;
  pass.first = -1;
  pass.last = args.pyramid.num_scales - 2;
  pass.codebook = args.codebook;
  pass.code_inverse_norms = code_inverse_norms;
  pass.indices = args.indices;
  pass.plane_in = args.h;
  pass.sign = -1;
  pass.rows = rows;
  return pass;
}

// `args.channels` is chosen here.
cudaError_t launch_residual_pass(ResidualPassArgs args, cudaStream_t stream);

// Normalises `rows` [num_rows, dim] by groups, in place.
cudaError_t launch_normalize_rows(const CodebookLayout& layout, float* rows, int64_t num_rows,
                                  cudaStream_t stream);

}  // namespace tokenflow::cuda
