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

  static StandIn check_stand_in(int64_t stand_in) {
    STD_TORCH_CHECK(stand_in >= 0 && stand_in <= 3, "stand_in must be 0 to 3, got ", stand_in);
    return static_cast<StandIn>(stand_in);
  }

  // The layout of groups of `group` channels, whose scales have tables of `rounds` and `slopes`.
  static ScalarLayout check_layout(const Pyramid& pyramid, int64_t dim, int64_t group,
                                   const Tensor& thresholds, const std::vector<int64_t>& rounds,
                                   int64_t stand_in, const std::vector<double>& slopes) {
    ScalarLayout layout = {};
    layout.dim = static_cast<int>(dim);
    layout.groups = static_cast<int>(dim / group);
    layout.thresholds = static_cast<int>(thresholds.size(1));
    layout.rounds = static_cast<int>(thresholds.size(0));
    layout.stand_in = check_stand_in(stand_in);
    STD_TORCH_CHECK(static_cast<int64_t>(rounds.size()) == pyramid.num_scales,
                    "rounds must name one of each of ", pyramid.num_scales, " scales, got ",
                    rounds.size());
    for (size_t s = 0; s < rounds.size(); ++s) {
      STD_TORCH_CHECK(rounds[s] >= 0 && rounds[s] < thresholds.size(0), "rounds must be 0 to ",
                      thresholds.size(0) - 1, ", got ", rounds[s], " at position ", s);
      layout.round[s] = static_cast<int>(rounds[s]);
    }
    STD_TORCH_CHECK(slopes.empty() || slopes.size() == rounds.size(),
                    "slopes must be none or one of each of ", pyramid.num_scales, " scales, got ",
                    slopes.size());
    STD_TORCH_CHECK(slopes.empty() || layout.thresholds == 1,
                    "slopes are of digits that have two values, got ", layout.thresholds + 1);
    std::copy(slopes.begin(), slopes.end(), layout.slope);
    return layout;
  }

  static void check_curves(std::optional<Tensor>& curves, const ScalarLayout& layout,
                           const Tensor& like, const char* like_name) {
    const bool bent = layout.stand_in == StandIn::kTanh || layout.stand_in == StandIn::kClamp;
    STD_TORCH_CHECK(curves.has_value() == bent, "curves must be given where stand_in is 2 or 3 (",
                    "got ", static_cast<int>(layout.stand_in), "), and not else");
    if (!curves) return;
    check_like(*curves, "curves", like, like_name);
    check_device(*curves, "curves", like, like_name);
    check_shape(*curves, {layout.rounds, kCurveParts, layout.dim}, "curves");
    curves = contiguous(*curves, "curves");
  }

  static void check_flips(std::optional<Tensor>& flips, const ScalarLayout& layout,
                          const std::vector<int64_t>& rows_shape, const Tensor& like,
                          const char* like_name) {
    if (!flips) return;
    STD_TORCH_CHECK(flips->scalar_type() == ScalarType::Bool, "flips must be bool, got ",
                    torch::headeronly::toString(flips->scalar_type()));
    check_shape(*flips, rows_shape, "flips");
    check_device(*flips, "flips", like, like_name);
    STD_TORCH_CHECK(layout.thresholds == 1, "flips are of digits that have two values, got ",
                    layout.thresholds + 1);
    flips = contiguous(*flips, "flips");
  }

  static int64_t check_places(const std::vector<int64_t>& places, int64_t channels,
                              const char* name) {
    const int64_t dim = static_cast<int64_t>(places.size());
    STD_TORCH_CHECK(dim >= 1 && dim <= kMostPlaces, "places must be 1 to ", kMostPlaces, ", got ",
                    dim);
    STD_TORCH_CHECK(channels > 0 && channels % dim == 0 && channels < kMostColumns, name,
                    " must have whole groups of ", dim, " channels, got ", channels);
    return dim;
  }

  template <typename T>
  static const T* data_or_null(const std::optional<Tensor>& tensor) {
    return tensor ? data<T>(*tensor) : nullptr;
  }

  // quantized, indices, rows, error, entropy and chance; the last four empty where not asked for.
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scalar_quantize(
      Tensor h, Tensor thresholds, Tensor values, std::optional<Tensor> curves,
      std::optional<Tensor> flips, std::vector<int64_t> sizes, std::vector<int64_t> rounds,
      bool bilinear, std::vector<int64_t> places, int64_t stand_in, std::vector<double> slopes,
      bool errors, bool keep_rows) {
    const Pyramid pyramid = check_plane(h, "h", sizes, bilinear);
    check_tables(thresholds, values, h, "h", h.size(1));
    const int64_t group = check_places(places, h.size(1), "h");
    const ScalarLayout layout =
        check_layout(pyramid, h.size(1), group, thresholds, rounds, stand_in, slopes);
    const int64_t tokens = tokens_per_image(pyramid), scales = pyramid.num_scales;
    const std::vector<int64_t> rows_shape = {pyramid.batch, tokens, layout.dim};
    check_curves(curves, layout, h, "h");
    check_flips(flips, layout, rows_shape, h, "h");
    return Operators<Backend>::dispatch(h, "h", [&](auto zero) {
      using T = decltype(zero);
      const auto made = [&](bool wanted, const std::vector<int64_t>& shape, const char* name) {
        return empty(wanted ? shape : std::vector<int64_t>{0}, h.scalar_type(), h, name);
      };
      const bool choices = !slopes.empty();
      Tensor quantized = empty(shape(h), h.scalar_type(), h, "quantized");
      Tensor indices =
          empty({pyramid.batch, layout.groups, tokens}, ScalarType::Long, h, "indices");
      Tensor rows = made(keep_rows, rows_shape, "rows");
      Tensor error = made(errors, {scales}, "error");
      Tensor entropy = made(choices, {scales}, "entropy");
      Tensor chance = made(choices, {scales, layout.dim}, "chance");
      ScalarQuantizeArgs<T> args = {};
      args.pyramid = pyramid;
      args.layout = layout;
      args.tables = {data<T>(thresholds), data<T>(values), data_or_null<T>(curves)};
      args.pack = {pyramid.batch,
                   tokens,
                   layout.groups,
                   static_cast<int>(group),
                   {},
                   nullptr,
                   mutable_data<int64_t>(indices)};
      std::copy(places.begin(), places.end(), args.pack.place);
      args.h = data<T>(h);
      args.flips = data_or_null<bool>(flips);
      args.quantized = mutable_data<T>(quantized);
      args.rows = keep_rows ? mutable_data<T>(rows) : nullptr;
      args.error = errors ? mutable_data<T>(error) : nullptr;
      args.entropy = choices ? mutable_data<T>(entropy) : nullptr;
      args.chance = choices ? mutable_data<T>(chance) : nullptr;
      Backend::run(args, h);
      return std::make_tuple(quantized, indices, rows, error, entropy, chance);
    });
  }

  // The gradient of h, of `group` channels a group, from what scalar_quantize kept in rows and the
  // gradients of its outputs, where they are given.
  static Tensor scalar_quantize_backward(
      Tensor rows, Tensor thresholds, Tensor values, std::optional<Tensor> curves,
      std::optional<Tensor> flips, std::optional<Tensor> grad_quantized,
      std::optional<Tensor> grad_rows, std::optional<Tensor> grad_error,
      std::optional<Tensor> grad_entropy, std::optional<Tensor> grad_chance,
      std::vector<int64_t> sizes, int64_t height, int64_t width, std::vector<int64_t> rounds,
      bool bilinear, int64_t group, int64_t stand_in, std::vector<double> slopes) {
    check_floating(rows, "rows");
    check_dim(rows, 3, "rows");
    const int64_t dim = rows.size(2);
    const Pyramid pyramid = check_pyramid(rows.size(0), dim, height, width, sizes, bilinear);
    const std::vector<int64_t> rows_shape = {pyramid.batch, tokens_per_image(pyramid), dim};
    check_shape(rows, rows_shape, "rows");
    check_tables(thresholds, values, rows, "rows", dim);
    STD_TORCH_CHECK(group >= 1 && dim % group == 0, "group must divide ", dim, ", got ", group);
    const ScalarLayout layout =
        check_layout(pyramid, dim, group, thresholds, rounds, stand_in, slopes);
    check_curves(curves, layout, rows, "rows");
    check_flips(flips, layout, rows_shape, rows, "rows");
    STD_TORCH_CHECK(
        grad_entropy.has_value() == !slopes.empty() && grad_chance.has_value() == !slopes.empty(),
        "grad_entropy and grad_chance must be given where slopes are, and not else");
    const auto check_grad = [&](std::optional<Tensor>& grad, const std::vector<int64_t>& shape,
                                const char* name) {
      if (!grad) return;
      check_like(*grad, name, rows, "rows");
      check_device(*grad, name, rows, "rows");
      check_shape(*grad, shape, name);
      grad = contiguous(*grad, name);
    };
    const std::vector<int64_t> plane_shape = {pyramid.batch, dim, height, width};
    check_grad(grad_quantized, plane_shape, "grad_quantized");
    check_grad(grad_rows, rows_shape, "grad_rows");
    check_grad(grad_error, {pyramid.num_scales}, "grad_error");
    check_grad(grad_entropy, {pyramid.num_scales}, "grad_entropy");
    check_grad(grad_chance, {pyramid.num_scales, dim}, "grad_chance");
    rows = contiguous(rows, "rows");
    return Operators<Backend>::dispatch(rows, "rows", [&](auto zero) {
      using T = decltype(zero);
      Tensor grad_h = empty(plane_shape, rows.scalar_type(), rows, "grad_h");
      Backend::run(ScalarQuantizeBackwardArgs<T>{pyramid,
                                                 layout,
                                                 {data<T>(thresholds), data<T>(values),
                                                  data_or_null<T>(curves)},
                                                 data<T>(rows),
                                                 data_or_null<bool>(flips),
                                                 data_or_null<T>(grad_quantized),
                                                 data_or_null<T>(grad_rows),
                                                 data_or_null<T>(grad_error),
                                                 data_or_null<T>(grad_entropy),
                                                 data_or_null<T>(grad_chance),
                                                 mutable_data<T>(grad_h)},
                   rows);
      return grad_h;
    });
  }

  // The layout of rows [..., D] that all rounds of the tables quantize, one after the other.
  static ScalarLayout check_rows(Tensor& rows, Tensor& thresholds, Tensor& values,
                                 std::optional<Tensor>& curves, int64_t stand_in) {
    check_floating(rows, "rows");
    STD_TORCH_CHECK(rows.dim() >= 1, "rows must have 1 dimension or more, got a scalar");
    const int64_t dim = rows.size(rows.dim() - 1);
    STD_TORCH_CHECK(dim > 0 && dim <= kMostColumns, "channels must be 1 to ", kMostColumns,
                    ", got ", dim);
    check_tables(thresholds, values, rows, "rows", dim);
    ScalarLayout layout = {};
    layout.dim = static_cast<int>(dim);
    layout.groups = 1;
    layout.thresholds = static_cast<int>(thresholds.size(1));
    layout.rounds = static_cast<int>(thresholds.size(0));
    layout.stand_in = check_stand_in(stand_in);
    STD_TORCH_CHECK(layout.stand_in != StandIn::kUnit, "stand_in of rows must be 0, 2 or 3, got ",
                    stand_in);
    check_curves(curves, layout, rows, "rows");
    rows = contiguous(rows, "rows");
    return layout;
  }

  // rows [..., D] and tables of R rounds: the sum of their codes [..., D], indices [..., R], empty
  // without places, and codes [..., R, D], empty unless they are kept.
  static std::tuple<Tensor, Tensor, Tensor> scalar_rows(Tensor rows, Tensor thresholds,
                                                        Tensor values, std::optional<Tensor> curves,
                                                        std::vector<int64_t> places,
                                                        int64_t stand_in, bool keep_codes) {
    const ScalarLayout layout = check_rows(rows, thresholds, values, curves, stand_in);
    PackDigitsArgs pack = {};
    if (!places.empty()) {
      STD_TORCH_CHECK(check_places(places, layout.dim, "rows") == layout.dim,
                      "places must be none or one of each of ", layout.dim, " channels, got ",
                      places.size());
      std::copy(places.begin(), places.end(), pack.place);
    }
    return Operators<Backend>::dispatch(rows, "rows", [&](auto zero) {
      using T = decltype(zero);
      const int64_t count = rows.numel() / layout.dim, rounds = layout.rounds;
      std::vector<int64_t> by_round = shape(rows);
      by_round.back() = rounds;
      std::vector<int64_t> code_shape = by_round;
      code_shape.push_back(layout.dim);
      const auto made = [&](bool wanted, const std::vector<int64_t>& shape, ScalarType type,
                            const char* name) {
        return empty(wanted ? shape : std::vector<int64_t>{0}, type, rows, name);
      };
      Tensor quantized = empty(shape(rows), rows.scalar_type(), rows, "quantized");
      Tensor indices = made(!places.empty(), by_round, ScalarType::Long, "indices");
      Tensor codes = made(keep_codes, code_shape, rows.scalar_type(), "codes");
      pack.batch = pack.groups = 1;
      pack.tokens = count * rounds;
      pack.dim = layout.dim;
      pack.indices = places.empty() ? nullptr : mutable_data<int64_t>(indices);
      Backend::run(
          ScalarRowsArgs<T>{count,
                            layout,
                            {data<T>(thresholds), data<T>(values), data_or_null<T>(curves)},
                            pack,
                            data<T>(rows),
                            mutable_data<T>(quantized),
                            keep_codes ? mutable_data<T>(codes) : nullptr},
          rows);
      return std::make_tuple(quantized, indices, codes);
    });
  }

  static Tensor scalar_rows_backward(Tensor rows, Tensor thresholds, Tensor values,
                                     std::optional<Tensor> curves, Tensor grad_quantized,
                                     int64_t stand_in) {
    const ScalarLayout layout = check_rows(rows, thresholds, values, curves, stand_in);
    check_like(grad_quantized, "grad_quantized", rows, "rows");
    check_device(grad_quantized, "grad_quantized", rows, "rows");
    check_shape(grad_quantized, shape(rows), "grad_quantized");
    grad_quantized = contiguous(grad_quantized, "grad_quantized");
    return Operators<Backend>::dispatch(rows, "rows", [&](auto zero) {
      using T = decltype(zero);
      Tensor grad_rows = empty(shape(rows), rows.scalar_type(), rows, "grad_rows");
      Backend::run(
          ScalarRowsBackwardArgs<T>{rows.numel() / layout.dim,
                                    layout,
                                    {data<T>(thresholds), data<T>(values), data_or_null<T>(curves)},
                                    data<T>(rows),
                                    data<T>(grad_quantized),
                                    mutable_data<T>(grad_rows)},
          rows);
      return grad_rows;
    });
  }

  // digits [B, L, G * D] and D places: [B, G, L].
  static Tensor pack_digits(Tensor digits, std::vector<int64_t> places) {
    STD_TORCH_CHECK(digits.scalar_type() == ScalarType::Short, "digits must be int16, got ",
                    torch::headeronly::toString(digits.scalar_type()));
    check_dim(digits, 3, "digits");
    const int64_t dim = check_places(places, digits.size(2), "digits");
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

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("scalar_quantize", TORCH_BOX(&scalar_quantize));
    m.impl("scalar_quantize_backward", TORCH_BOX(&scalar_quantize_backward));
    m.impl("scalar_rows", TORCH_BOX(&scalar_rows));
    m.impl("scalar_rows_backward", TORCH_BOX(&scalar_rows_backward));
    m.impl("pack_digits", TORCH_BOX(&pack_digits));
  }
};

}  // namespace tokenflow::torch_ops
