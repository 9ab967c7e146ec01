// Transposes of the pyramid's resampling, for the backward pass.
#pragma once

#include "pyramid.cuh"

namespace tokenflow::cuda {

// grad_rows [batch, tokens, dim] = the transpose of every scale's bicubic upsampling, applied to
// grad_plane [batch, dim, height, width].
cudaError_t launch_upsample_transpose(const Pyramid& pyramid, int dim, const float* grad_plane,
                                      float* grad_rows, cudaStream_t stream);

// grad_plane [batch, dim, height, width] = for every position, the sum of grad_rows
// [batch, tokens, dim] over the bins of all scales that hold it.
cudaError_t launch_pool_transpose(const Pyramid& pyramid, int dim, const float* grad_rows,
                                  float* grad_plane, cudaStream_t stream);

}  // namespace tokenflow::cuda
