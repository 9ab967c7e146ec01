// The quantizer on CUDA: entry points over device memory (see common/quantizer_args.h).
//
// A launch allocates nothing, never waits for the device and never reads its memory from the host,
// so it can be captured in a CUDA graph. `workspace` is device memory of X_workspace_bytes(args)
// bytes, aligned to 256, used until the launch's work on `stream` is done; it does not grow with
// the number of rows times the number of codes. Results are the same bits at every call, but for a
// gradient that is asked for with atomic_codebook_gradient.
//
// The kernels are defined for any data: a row that holds a NaN or an infinity takes index 0, an
// index outside [0, codes) counts as -1 (it adds nothing), and nothing is read or written out of
// bounds. Shapes that the kernels do not support give cudaErrorInvalidValue before any launch;
// `unsupported_reason` says why.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../common/quantizer_args.h"

namespace tokenflow::cuda {

// A sentence for people, or null where pyramid and layout (or a layout without one) are supported.
const char* unsupported_reason(const Pyramid& pyramid, const CodebookLayout& layout);
const char* unsupported_reason(const CodebookLayout& layout);

size_t nearest_code_workspace_bytes(const NearestCodeArgs<float>& args);
cudaError_t launch_nearest_code(const NearestCodeArgs<float>& args, void* workspace,
                                cudaStream_t stream);

size_t quantize_workspace_bytes(const QuantizeArgs<float>& args);
cudaError_t launch_quantize(const QuantizeArgs<float>& args, void* workspace, cudaStream_t stream);

size_t quantize_backward_workspace_bytes(const QuantizeBackwardArgs<float>& args);
cudaError_t launch_quantize_backward(const QuantizeBackwardArgs<float>& args, void* workspace,
                                     cudaStream_t stream);

size_t pyramid_rows_workspace_bytes(const PyramidRowsArgs<float>& args);
cudaError_t launch_pyramid_rows(const PyramidRowsArgs<float>& args, void* workspace,
                                cudaStream_t stream);

size_t decode_workspace_bytes(const DecodeArgs<float>& args);
cudaError_t launch_decode(const DecodeArgs<float>& args, void* workspace, cudaStream_t stream);

size_t segment_sum_workspace_bytes(const SegmentSumArgs<float>& args);
cudaError_t launch_segment_sum(const SegmentSumArgs<float>& args, void* workspace,
                               cudaStream_t stream);

}  // namespace tokenflow::cuda
