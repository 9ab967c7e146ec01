// The sampler's operator, for any back end: check, allocate, fill the plain struct, run. The
// Backend has run(SampleArgs, like) and nothing else that is used here.
#pragma once

#include <torch/csrc/stable/device.h>

#include <tuple>
#include <type_traits>

#include "../common/sampling.h"
#include "arguments.h"

namespace tokenflow::torch_ops {

inline LogitType logit_type(const Tensor& logits) {
  const ScalarType type = logits.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "logits must be float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  return type == ScalarType::Float      ? LogitType::kFloat
         : type == ScalarType::BFloat16 ? LogitType::kBFloat16
                                        : LogitType::kHalf;
}

// [outer, inner, codes], the codes of a row side by side.
inline LogitRows logit_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.size(2) == 1 || tensor.stride(2) == 1, name,
                  " must have the codes of a row side by side, got stride ", tensor.stride(2));
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// Throws for the first row that has something wrong.
inline void check_status(const Tensor& status_tensor) {
  const Tensor status =
      torch::stable::to(status_tensor, std::nullopt, std::nullopt,
                        torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const uint8_t* bits = data<uint8_t>(status);
  for (int64_t row = 0; row < status.numel(); ++row) {
    const auto ok = [&](SampleStatus bit) { return (bits[row] & bit) == 0; };
    STD_TORCH_CHECK(ok(kTopKTooLarge), "top_k must be at most 2**31 - 1, got more in row ", row);
    STD_TORCH_CHECK(ok(kTopPOutOfRange), "top_p must be at most 1, got more or a NaN in row ", row);
    STD_TORCH_CHECK(ok(kMinPOutOfRange), "min_p must be at most 1, got more or a NaN in row ", row);
    STD_TORCH_CHECK(ok(kTemperatureNotPositive),
                    "temperature must be positive and finite, got another in row ", row);
    STD_TORCH_CHECK(ok(kGuidanceNotFinite), "guidance must be finite, got another in row ", row);
    STD_TORCH_CHECK(ok(kLogitsNaN), "logits must not hold a NaN, got one in row ", row);
    STD_TORCH_CHECK(ok(kLogitsInfinite),
                    "logits must not hold +infinity, with guidance, got one in row ", row);
    STD_TORCH_CHECK(ok(kLogitsMasked),
                    "logits must leave a code to draw, got nothing but masked codes in row ", row);
  }
}

template <typename Backend>
struct SamplerOperator {
  static std::tuple<Tensor, Tensor> sample_top_k_top_p(
      Tensor logits, std::optional<Tensor> uncond, int64_t top_k, std::optional<Tensor> top_k_rows,
      double top_p, std::optional<Tensor> top_p_rows, double min_p,
      std::optional<Tensor> min_p_rows, double temperature, std::optional<Tensor> temperature_rows,
      double guidance, std::optional<Tensor> guidance_rows, int64_t seed,
      std::optional<Tensor> seed_rows, int64_t offset, std::optional<Tensor> offset_rows,
      bool check) {
    check_dim(logits, 3, "logits");
    SampleArgs args = {};
    args.type = logit_type(logits);
    args.inner = logits.size(1);
    args.rows = logits.size(0) * args.inner;
    args.codes = logits.size(2);
    STD_TORCH_CHECK(args.codes > 0 && args.codes <= kMostCodes, "logits must have 1 to ",
                    kMostCodes, " codes (is the slice vocab empty?), got shape ", shape_of(logits));
    args.logits = logit_rows(logits, "logits");
    if (uncond) {
      check_like(*uncond, "uncond", logits, "logits");
      check_shape(*uncond, {logits.size(0), logits.size(1), logits.size(2)}, "uncond");
      check_device(*uncond, "uncond", logits, "logits");
      args.uncond = logit_rows(*uncond, "uncond");
    }
    const auto of_rows = [&](auto value, const std::optional<Tensor>& values, const char* name) {
      const ScalarType type =
          std::is_same_v<decltype(value), double> ? ScalarType::Double : ScalarType::Long;
      return row_argument(value, values, name, type, args.rows, logits, "logits");
    };
    args.top_k = of_rows(top_k, top_k_rows, "top_k");
    args.top_p = of_rows(top_p, top_p_rows, "top_p");
    args.min_p = of_rows(min_p, min_p_rows, "min_p");
    args.temperature = of_rows(temperature, temperature_rows, "temperature");
    args.guidance = of_rows(guidance, guidance_rows, "guidance");
    args.seed = of_rows(seed, seed_rows, "seed");
    args.offset = of_rows(offset, offset_rows, "offset");

    Tensor indices = empty({args.rows}, ScalarType::Long, logits, "indices");
    Tensor probability = empty({args.rows}, ScalarType::Float, logits, "probability");
    const Tensor status = empty({args.rows}, ScalarType::Byte, logits, "status");
    if (args.rows == 0) return {indices, probability};
    args.indices = mutable_data<int64_t>(indices);
    args.probability = mutable_data<float>(probability);
    args.status = mutable_data<uint8_t>(status);
    Backend::run(args, logits);
    if (check) check_status(status);
    return {indices, probability};
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("sample_top_k_top_p", TORCH_BOX(&sample_top_k_top_p));
  }
};

}  // namespace tokenflow::torch_ops
