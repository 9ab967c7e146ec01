// The sampler on CUDA: see common/sampling.h. One launch that allocates nothing, never waits for
// the device and reads seeds, offsets and other arguments of rows from device memory, so that a
// captured graph draws anew when they change. Defined for any data: an index is always in [0,
// codes).
#pragma once

#include <cuda_runtime_api.h>

#include "../common/sampling.h"

namespace tokenflow::cuda {

cudaError_t launch_sample(const SampleArgs& args, cudaStream_t stream);

}  // namespace tokenflow::cuda
