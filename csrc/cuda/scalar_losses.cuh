// The losses of scalar quantization and the gradients of rows.
#pragma once

#include "../common/scalar_args.h"
#include "device.cuh"
#include "workspace.h"

namespace tokenflow::cuda {

// What the losses of args need of the workspace; `rows` and `digits` are what they are made of.
size_t scalar_losses_workspace_bytes(const ScalarQuantizeArgs<float>& args);
cudaError_t launch_scalar_losses(const ScalarQuantizeArgs<float>& args, const float* rows,
                                 const int16_t* digits, void* workspace, cudaStream_t stream);

// grad_rows [batch, tokens, dim], of what stands in for rows (nothing yet where args has no
// grad_quantized), becomes the gradient of rows, with that of the losses.
cudaError_t launch_scalar_row_gradient(const ScalarQuantizeBackwardArgs<float>& args,
                                       float* grad_rows, cudaStream_t stream);

}  // namespace tokenflow::cuda
