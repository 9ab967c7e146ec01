// Operators on the CPU: csrc/cpu over torch's thread pool.
#include <algorithm>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>

#include "../cpu/quantizer.h"
#include "../cpu/sample_code.h"
#include "../cpu/sampler.h"
#include "../cpu/scalar.h"
#include "operators.h"
#include "sampler_operator.h"
#include "scalar_operators.h"

namespace tokenflow::torch_ops {
namespace {

cpu::Executor executor() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int workers, void (*body)(void*, int), void* context) {
            // torch's C interface would make an error code of an exception.
            std::exception_ptr thrown;
            std::mutex lock;
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              try {
                for (int64_t i = begin; i < end; ++i) body(context, static_cast<int>(i));
              } catch (...) {
                const std::lock_guard<std::mutex> guard(lock);
                thrown = std::current_exception();
              }
            });
            if (thrown) std::rethrow_exception(thrown);
          }};
}

// kernel(args, executor), whose own memory may not be there.
template <typename Args>
void launch(void (*kernel)(const Args&, const cpu::Executor&), const Args& args) {
  try {
    kernel(args, executor());
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, "not enough memory to work on arguments of these shapes");
  } catch (const std::length_error&) {
    STD_TORCH_CHECK(false, "arguments of these shapes are beyond what memory can hold");
  }
}

struct CpuBackend {
  template <typename T>
  static constexpr bool supports = true;

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
    launch(cpu::nearest_code<T>, args);
  }
  template <typename T>
  static void run(const SampleCodeArgs<T>& args, const Tensor&) {
    launch(cpu::sample_code<T>, args);
  }
  template <typename T>
  static void run(const QuantizeArgs<T>& args, const Tensor&) {
    launch(cpu::quantize<T>, args);
  }
  template <typename T>
  static void run(const QuantizeBackwardArgs<T>& args, const Tensor&) {
    launch(cpu::quantize_backward<T>, args);
  }
  template <typename T>
  static void run(const PyramidRowsArgs<T>& args, const Tensor&) {
    launch(cpu::pyramid_rows<T>, args);
  }
  template <typename T>
  static void run(const DecodeArgs<T>& args, const Tensor&) {
    launch(cpu::decode<T>, args);
  }
  template <typename T>
  static void run(const SegmentSumArgs<T>& args, const Tensor&) {
    launch(cpu::segment_sum<T>, args);
  }
  static void check_planes(const Pyramid&, int) {}

  template <typename T>
  static void run(const ScalarQuantizeArgs<T>& args, const Tensor&) {
    launch(cpu::scalar_quantize<T>, args);
  }
  template <typename T>
  static void run(const ScalarQuantizeBackwardArgs<T>& args, const Tensor&) {
    launch(cpu::scalar_quantize_backward<T>, args);
  }
  template <typename T>
  static void run(const ScalarRowsArgs<T>& args, const Tensor&) {
    launch(cpu::scalar_rows<T>, args);
  }
  template <typename T>
  static void run(const ScalarRowsBackwardArgs<T>& args, const Tensor&) {
    launch(cpu::scalar_rows_backward<T>, args);
  }
  static void run(const PackDigitsArgs& args, const Tensor&) { launch(cpu::pack_digits, args); }
  static void run(const SampleArgs& args, const Tensor&) { launch(cpu::sample, args); }
};

}  // namespace
}  // namespace tokenflow::torch_ops

STABLE_TORCH_LIBRARY_IMPL(tokenflow_ext, CPU, m) {
  tokenflow::torch_ops::Operators<tokenflow::torch_ops::CpuBackend>::register_all(m);
  tokenflow::torch_ops::ScalarOperators<tokenflow::torch_ops::CpuBackend>::register_all(m);
  tokenflow::torch_ops::SamplerOperator<tokenflow::torch_ops::CpuBackend>::register_all(m);
}
