// Operators on the CPU: csrc/cpu over torch's thread pool.
#include <algorithm>

#include "../cpu/quantizer.h"
#include "../cpu/sampler.h"
#include "operators.h"
#include "sampler_operator.h"

namespace tokenflow::torch_ops {
namespace {

cpu::Executor executor() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int workers, void (*body)(void*, int), void* context) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, static_cast<int>(i));
            });
          }};
}

struct CpuBackend {
  template <typename T>
  static constexpr bool serves = true;

  template <typename T>
  static void check_codebook(const CodebookLayout& layout, const Tensor& codebook) {
    const int64_t row = cpu::first_nonfinite_code(layout, data<T>(codebook), executor());
    STD_TORCH_CHECK(row < 0, "codebook must be finite, got a NaN or an infinity in row ", row);
  }

  static void check_indices(const Tensor& indices, int64_t codes, int64_t lowest) {
    const int64_t* begin = data<int64_t>(indices);
    const int64_t* end = begin + indices.numel();
    const int64_t* bad =
        std::find_if(begin, end, [&](int64_t index) { return index < lowest || index >= codes; });
    STD_TORCH_CHECK(bad == end, "indices must be in [", lowest, ", ", codes, "), got ",
                    bad == end ? 0 : *bad, " at position ", bad - begin);
  }

  static void check_shape(const CodebookLayout&) {}
  static void check_shape(const Pyramid&, const CodebookLayout&) {}

  template <typename T>
  static void run(const NearestCodeArgs<T>& args, const Tensor&) {
    cpu::nearest_code(args, executor());
  }
  template <typename T>
  static void run(const QuantizeArgs<T>& args, const Tensor&) {
    cpu::quantize(args, executor());
  }
  template <typename T>
  static void run(const QuantizeBackwardArgs<T>& args, const Tensor&) {
    cpu::quantize_backward(args, executor());
  }
  template <typename T>
  static void run(const PyramidRowsArgs<T>& args, const Tensor&) {
    cpu::pyramid_rows(args, executor());
  }
  template <typename T>
  static void run(const DecodeArgs<T>& args, const Tensor&) {
    cpu::decode(args, executor());
  }
  template <typename T>
  static void run(const SegmentSumArgs<T>& args, const Tensor&) {
    cpu::segment_sum(args, executor());
  }
  static void run(const SampleArgs& args, const Tensor&) { cpu::sample(args, executor()); }
};

}  // namespace
}  // namespace tokenflow::torch_ops

STABLE_TORCH_LIBRARY_IMPL(tokenflow_ext, CPU, m) {
  tokenflow::torch_ops::Operators<tokenflow::torch_ops::CpuBackend>::register_all(m);
  tokenflow::torch_ops::SamplerOperator<tokenflow::torch_ops::CpuBackend>::register_all(m);
}
