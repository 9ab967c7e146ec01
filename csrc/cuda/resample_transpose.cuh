// Transposes of the pyramid's resampling, for backward passes (see common/scalar_args.h).
#pragma once

#include "../common/scalar_args.h"
#include "pyramid.cuh"

namespace tokenflow::cuda {

cudaError_t launch_upsample_transpose(const UpsampleTransposeArgs<float>& args,
                                      cudaStream_t stream);

// What of a row comes to each position of its bin.
enum class BinShare {
  kMean,  // the row over the number of positions: the transpose of pooling
  kWhole  // the row, which has been divided already
};

cudaError_t launch_pool_transpose(const PoolTransposeArgs<float>& args, BinShare share,
                                  cudaStream_t stream);

}  // namespace tokenflow::cuda
