// Operators on CUDA: csrc/cuda on the current stream of the inputs' device. Nothing here waits for
// the device, so what would need its data (NaN, index range) is not checked: the kernels are
// defined for any data (see csrc/cuda/quantizer.h).
#if defined(TOKENFLOW_WITH_CUDA)

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/quantizer.h"
#include "../cuda/sample_code.h"
#include "../cuda/sampler.h"
#include "../cuda/scalar.h"
#include "operators.h"
#include "sampler_operator.h"
#include "scalar_operators.h"

namespace tokenflow::torch_ops {
namespace {

struct CudaBackend {
  template <typename T>
  static constexpr bool supports = std::is_same_v<T, float>;

  template <typename T>
  static void check_codebook(const CodebookLayout&, const Tensor&) {}

  static void check_indices(const Tensor&, int64_t, int64_t) {}

  template <typename... Shape>
  static void check_shape(const Shape&... shape) {
    const char* reason = cuda::unsupported_reason(shape...);
    STD_TORCH_CHECK(reason == nullptr, reason ? reason : "");
  }

  // launcher(stream) on the current stream of the device of `like`.
  template <typename Launcher>
  static void launch_on(const Tensor& like, const Launcher& launcher) {
    const torch::stable::accelerator::DeviceGuard guard(like.get_device());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device(), &stream));
    const cudaError_t error = launcher(static_cast<cudaStream_t>(stream));
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA kernel launch failed: ", cudaGetErrorString(error));
  }

  // With the workspace that the launch asks for.
  template <typename Args>
  static void launch(const Args& args, const Tensor& like, size_t (*workspace_bytes)(const Args&),
                     cudaError_t (*launcher)(const Args&, void*, cudaStream_t)) {
    launch_on(like, [&](cudaStream_t stream) {
      const size_t bytes = workspace_bytes(args);
      const Tensor workspace =
          empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, like, "the workspace");
      return launcher(args, workspace.mutable_data_ptr(), stream);
    });
  }

  static void run(const NearestCodeArgs<float>& args, const Tensor& like) {
    launch(args, like, cuda::nearest_code_workspace_bytes, cuda::launch_nearest_code);
  }
  static void run(const SampleCodeArgs<float>& args, const Tensor& like) {
    launch(args, like, cuda::sample_code_workspace_bytes, cuda::launch_sample_code);
  }
  static void run(const QuantizeArgs<float>& args, const Tensor& like) {
    launch(args, like, cuda::quantize_workspace_bytes, cuda::launch_quantize);
  }
  static void run(const QuantizeBackwardArgs<float>& args, const Tensor& like) {
    launch(args, like, cuda::quantize_backward_workspace_bytes, cuda::launch_quantize_backward);
  }
  static void run(const PyramidRowsArgs<float>& args, const Tensor& like) {
    launch(args, like, cuda::pyramid_rows_workspace_bytes, cuda::launch_pyramid_rows);
  }
  static void run(const DecodeArgs<float>& args, const Tensor& like) {
    launch(args, like, cuda::decode_workspace_bytes, cuda::launch_decode);
  }
  static void run(const SegmentSumArgs<float>& args, const Tensor& like) {
    launch(args, like, cuda::segment_sum_workspace_bytes, cuda::launch_segment_sum);
  }
  static void check_planes(const Pyramid& pyramid, int dim) {
    const char* reason = cuda::unsupported_planes(pyramid, dim);
    STD_TORCH_CHECK(reason == nullptr, reason ? reason : "");
  }

  static void run(const ScalarQuantizeArgs<float>& args, const Tensor& like) {
    launch(args, like, cuda::scalar_quantize_workspace_bytes, cuda::launch_scalar_quantize);
  }
  static void run(const ScalarQuantizeBackwardArgs<float>& args, const Tensor& like) {
    launch(args, like, cuda::scalar_quantize_backward_workspace_bytes,
           cuda::launch_scalar_quantize_backward);
  }
  static void run(const ScalarRowsArgs<float>& args, const Tensor& like) {
    launch(args, like, cuda::scalar_rows_workspace_bytes, cuda::launch_scalar_rows);
  }
  static void run(const ScalarRowsBackwardArgs<float>& args, const Tensor& like) {
    launch_on(like,
              [&](cudaStream_t stream) { return cuda::launch_scalar_rows_backward(args, stream); });
  }
  static void run(const PackDigitsArgs& args, const Tensor& like) {
    launch_on(like, [&](cudaStream_t stream) { return cuda::launch_pack_digits(args, stream); });
  }
  static void run(const SampleArgs& args, const Tensor& like) {
    launch_on(like, [&](cudaStream_t stream) { return cuda::launch_sample(args, stream); });
  }
};

}  // namespace
}  // namespace tokenflow::torch_ops

STABLE_TORCH_LIBRARY_IMPL(tokenflow_ext, CUDA, m) {
  tokenflow::torch_ops::Operators<tokenflow::torch_ops::CudaBackend>::register_all(m);
  tokenflow::torch_ops::ScalarOperators<tokenflow::torch_ops::CudaBackend>::register_all(m);
  tokenflow::torch_ops::SamplerOperator<tokenflow::torch_ops::CudaBackend>::register_all(m);
}

#endif  // TOKENFLOW_WITH_CUDA
