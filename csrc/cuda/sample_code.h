// Drawing codes by their closeness on CUDA (see common/gumbel.h, and quantizer.h for workspaces). A
// row that is not finite takes index 0, and a code that is not is never drawn.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../common/gumbel.h"

namespace tokenflow::cuda {

size_t sample_code_workspace_bytes(const SampleCodeArgs<float>& args);
cudaError_t launch_sample_code(const SampleCodeArgs<float>& args, void* workspace,
                               cudaStream_t stream);

}  // namespace tokenflow::cuda
