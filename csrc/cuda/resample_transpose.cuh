// Transposes of the pyramid's resampling, for backward passes.
#pragma once

#include "pyramid.cuh"

namespace tokenflow::cuda {

// rows [batch, tokens, dim] = the transpose of every scale's upsampling, applied to a plane
// [batch, dim, height, width].
struct UpsampleTransposeArgs {
  Pyramid pyramid;
  int dim;
  const float* plane;
  float* rows;
};

// plane [batch, dim, height, width] = the transpose of the pooling to every scale, summed over
// scales, applied to rows [batch, tokens, dim].
struct PoolTransposeArgs {
  Pyramid pyramid;
  int dim;
  const float* rows;
  float* plane;
};

cudaError_t launch_upsample_transpose(const UpsampleTransposeArgs& args, cudaStream_t stream);

// What of a row comes to each position of its bin.
enum class BinShare {
  kMean,  // the row over the number of positions: the transpose of pooling
  kWhole  // the row, which has been divided already
};

cudaError_t launch_pool_transpose(const PoolTransposeArgs& args, BinShare share,
                                  cudaStream_t stream);

}  // namespace tokenflow::cuda
