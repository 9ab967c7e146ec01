// The operators of scalar quantization, for any back end, in the manner of operators.h.
//
// A Backend has, beside what operators.h says,
//   check_planes(pyramid, dim)                               limits of its kernels, or nothing
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/scalar_args.h"
#include "operators.h"

namespace tokenflow::torch_ops {

template <typename Backend>
struct ScalarOperators {
  static Pyramid check_pyramid(int64_t batch, int64_t dim, int64_t height, int64_t width,
                               const std::vector<int64_t>& sizes, bool bilinear) {
    Pyramid pyramid = make_pyramid(batch, height, width, sizes);
    pyramid.upsampling = bilinear ? Upsampling::kBilinear : Upsampling::kBicubic;
    STD_TORCH_CHECK(dim > 0 && dim <= kMostColumns, "channels must be 1 to ", kMostColumns,
                    ", got ", dim);
    Backend::check_planes(pyramid, static_cast<int>(dim));
    return pyramid;
  }

  static Pyramid check_plane(Tensor& plane, const char* name, const std::vector<int64_t>& sizes,
                             bool bilinear) {
    check_floating(plane, name);
    check_dim(plane, 4, name);
    const Pyramid pyramid =
        check_pyramid(plane.size(0), plane.size(1), plane.size(2), plane.size(3), sizes, bilinear);
    plane = contiguous(plane, name);
    return pyramid;
  }

  static void check_tables(Tensor& thresholds, Tensor& values, const Tensor& like,
                           const char* like_name, int64_t channels) {
    const auto check_table = [&](Tensor& table, const char* name) {
      check_dim(table, 3, name);
      check_like(table, name, like, like_name);
      check_device(table, name, like, like_name);
      STD_TORCH_CHECK(
          table.numel() > 0 && table.size(2) == channels && table.size(1) <= kMostDigits, name,
          " must have shape [rounds, at most ", kMostDigits, ", ", channels, "], got ",
          shape_of(table));
      table = contiguous(table, name);
    };
    check_table(thresholds, "thresholds");
    check_table(values, "values");
    STD_TORCH_CHECK(
        values.size(0) == thresholds.size(0) && values.size(1) == thresholds.size(1) + 1,
        "values must be one more than thresholds, got shapes ", shape_of(values), " and ",
        shape_of(thresholds));
  }

  static std::tuple<Tensor, Tensor, Tensor> scalar_quantize(
      Tensor h, Tensor thresholds, Tensor values, std::optional<Tensor> flips,
      std::vector<int64_t> sizes, std::vector<int64_t> rounds, bool bilinear) {
    const Pyramid pyramid = check_plane(h, "h", sizes, bilinear);
    check_tables(thresholds, values, h, "h", h.size(1));
    ScalarLayout layout = {};
    layout.dim = static_cast<int>(h.size(1));
    layout.thresholds = static_cast<int>(thresholds.size(1));
    STD_TORCH_CHECK(static_cast<int64_t>(rounds.size()) == pyramid.num_scales,
                    "rounds must name one of each of ", pyramid.num_scales, " scales, got ",
                    rounds.size());
    for (size_t s = 0; s < rounds.size(); ++s) {
      STD_TORCH_CHECK(rounds[s] >= 0 && rounds[s] < thresholds.size(0), "rounds must be 0 to ",
                      thresholds.size(0) - 1, ", got ", rounds[s], " at position ", s);
      layout.round[s] = static_cast<int>(rounds[s]);
    }
    const std::vector<int64_t> rows_shape = {pyramid.batch, tokens_per_image(pyramid), layout.dim};
    if (flips) {
      STD_TORCH_CHECK(flips->scalar_type() == ScalarType::Bool, "flips must be bool, got ",
                      torch::headeronly::toString(flips->scalar_type()));
      check_shape(*flips, rows_shape, "flips");
      check_device(*flips, "flips", h, "h");
      STD_TORCH_CHECK(layout.thresholds == 1, "flips are of digits that have two values, got ",
                      layout.thresholds + 1);
      flips = contiguous(*flips, "flips");
    }
    return Operators<Backend>::dispatch(h, "h", [&](auto zero) {
      using T = decltype(zero);
      Tensor quantized = empty(shape(h), h.scalar_type(), h, "quantized");
      Tensor digits = empty(rows_shape, ScalarType::Short, h, "digits");
      Tensor rows = empty(rows_shape, h.scalar_type(), h, "rows");
      Backend::run(
          ScalarQuantizeArgs<T>{pyramid, layout, data<T>(thresholds), data<T>(values), data<T>(h),
                                flips ? data<bool>(*flips) : nullptr, mutable_data<T>(quantized),
                                mutable_data<int16_t>(digits), mutable_data<T>(rows)},
          h);
      return std::make_tuple(quantized, digits, rows);
    });
  }

  // rows [N, D] and tables of R rounds: codes and digits [N, R, D].
  static std::tuple<Tensor, Tensor> scalar_rows(Tensor rows, Tensor thresholds, Tensor values) {
    check_floating(rows, "rows");
    check_dim(rows, 2, "rows");
    check_tables(thresholds, values, rows, "rows", rows.size(1));
    rows = contiguous(rows, "rows");
    return Operators<Backend>::dispatch(rows, "rows", [&](auto zero) {
      using T = decltype(zero);
      const std::vector<int64_t> out = {rows.size(0), thresholds.size(0), rows.size(1)};
      Tensor codes = empty(out, rows.scalar_type(), rows, "codes");
      Tensor digits = empty(out, ScalarType::Short, rows, "digits");
      Backend::run(ScalarRowsArgs<T>{rows.size(0), static_cast<int>(rows.size(1)),
                                     static_cast<int>(thresholds.size(1)),
                                     static_cast<int>(thresholds.size(0)), data<T>(thresholds),
                                     data<T>(values), data<T>(rows), mutable_data<T>(codes),
                                     mutable_data<int16_t>(digits)},
                   rows);
      return std::make_tuple(codes, digits);
    });
  }

  // digits [B, L, G * D] and D places: [B, G, L].
  static Tensor pack_digits(Tensor digits, std::vector<int64_t> places) {
    STD_TORCH_CHECK(digits.scalar_type() == ScalarType::Short, "digits must be int16, got ",
                    torch::headeronly::toString(digits.scalar_type()));
    check_dim(digits, 3, "digits");
    const int64_t dim = static_cast<int64_t>(places.size());
    STD_TORCH_CHECK(dim >= 1 && dim <= kMostPlaces, "places must be 1 to ", kMostPlaces, ", got ",
                    dim);
    STD_TORCH_CHECK(
        digits.size(2) > 0 && digits.size(2) % dim == 0 && digits.size(2) < kMostColumns,
        "digits must have whole groups of ", dim, " channels, got shape ", shape_of(digits));
    digits = contiguous(digits, "digits");
    PackDigitsArgs args = {};
    args.batch = digits.size(0);
    args.tokens = digits.size(1);
    args.groups = static_cast<int>(digits.size(2) / dim);
    args.dim = static_cast<int>(dim);
    std::copy(places.begin(), places.end(), args.place);
    Tensor indices =
        empty({args.batch, args.groups, args.tokens}, ScalarType::Long, digits, "indices");
    args.digits = data<int16_t>(digits);
    args.indices = mutable_data<int64_t>(indices);
    Backend::run(args, digits);
    return indices;
  }

  static Tensor upsample_transpose(Tensor plane, std::vector<int64_t> sizes, bool bilinear) {
    const Pyramid pyramid = check_plane(plane, "plane", sizes, bilinear);
    const int dim = static_cast<int>(plane.size(1));
    return Operators<Backend>::dispatch(plane, "plane", [&](auto zero) {
      using T = decltype(zero);
      Tensor rows = empty({pyramid.batch, tokens_per_image(pyramid), dim}, plane.scalar_type(),
                          plane, "rows");
      Backend::run(UpsampleTransposeArgs<T>{pyramid, dim, data<T>(plane), mutable_data<T>(rows)},
                   plane);
      return rows;
    });
  }

  static Tensor pool_transpose(Tensor rows, std::vector<int64_t> sizes, int64_t height,
                               int64_t width) {
    check_floating(rows, "rows");
    check_dim(rows, 3, "rows");
    const Pyramid pyramid = check_pyramid(rows.size(0), rows.size(2), height, width, sizes, false);
    const int dim = static_cast<int>(rows.size(2));
    check_shape(rows, {pyramid.batch, tokens_per_image(pyramid), dim}, "rows");
    rows = contiguous(rows, "rows");
    return Operators<Backend>::dispatch(rows, "rows", [&](auto zero) {
      using T = decltype(zero);
      Tensor plane = empty({pyramid.batch, dim, height, width}, rows.scalar_type(), rows, "plane");
      Backend::run(PoolTransposeArgs<T>{pyramid, dim, data<T>(rows), mutable_data<T>(plane)}, rows);
      return plane;
    });
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("scalar_quantize", TORCH_BOX(&scalar_quantize));
    m.impl("scalar_rows", TORCH_BOX(&scalar_rows));
    m.impl("pack_digits", TORCH_BOX(&pack_digits));
    m.impl("upsample_transpose", TORCH_BOX(&upsample_transpose));
    m.impl("pool_transpose", TORCH_BOX(&pool_transpose));
  }
};

}  // namespace tokenflow::torch_ops
