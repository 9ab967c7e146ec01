// Scalar quantization on CUDA (see common/scalar_args.h), and the transposes of the pyramid's
// resampling: one kernel each. As the quantizer's launches (quantizer.h), they allocate nothing and
// never wait; results are the same bits at every call.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/scalar_args.h"

namespace tokenflow::cuda {

// A sentence for people, or null where planes of `dim` channels are supported.
const char* unsupported_planes(const Pyramid& pyramid, int dim);

cudaError_t launch_scalar_quantize(const ScalarQuantizeArgs<float>& args, cudaStream_t stream);

cudaError_t launch_scalar_rows(const ScalarRowsArgs<float>& args, cudaStream_t stream);

cudaError_t launch_pack_digits(const PackDigitsArgs& args, cudaStream_t stream);

cudaError_t launch_upsample_transpose(const UpsampleTransposeArgs<float>& args,
                                      cudaStream_t stream);

cudaError_t launch_pool_transpose(const PoolTransposeArgs<float>& args, cudaStream_t stream);

}  // namespace tokenflow::cuda
