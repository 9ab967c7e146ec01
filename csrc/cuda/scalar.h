// Scalar quantization on CUDA (see common/scalar_args.h). As the quantizer's launches
// (quantizer.h), they allocate nothing and never wait; results are the same bits at every call.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/scalar_args.h"

namespace tokenflow::cuda {

// A sentence for people, or null where planes of `dim` channels are supported.
const char* unsupported_planes(const Pyramid& pyramid, int dim);

size_t scalar_quantize_workspace_bytes(const ScalarQuantizeArgs<float>& args);
cudaError_t launch_scalar_quantize(const ScalarQuantizeArgs<float>& args, void* workspace,
                                   cudaStream_t stream);

size_t scalar_quantize_backward_workspace_bytes(const ScalarQuantizeBackwardArgs<float>& args);
cudaError_t launch_scalar_quantize_backward(const ScalarQuantizeBackwardArgs<float>& args,
                                            void* workspace, cudaStream_t stream);

size_t scalar_rows_workspace_bytes(const ScalarRowsArgs<float>& args);
cudaError_t launch_scalar_rows(const ScalarRowsArgs<float>& args, void* workspace,
                               cudaStream_t stream);

// Not kUnit.
cudaError_t launch_scalar_rows_backward(const ScalarRowsBackwardArgs<float>& args,
                                        cudaStream_t stream);

cudaError_t launch_pack_digits(const PackDigitsArgs& args, cudaStream_t stream);

}  // namespace tokenflow::cuda
