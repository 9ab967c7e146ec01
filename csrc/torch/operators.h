// The operators, for any back end: check, allocate, fill the plain struct, run.
//
// A Backend has
//   template <typename T> static constexpr bool supports      (is is float / double supported?)
//   check_codebook<T>(layout, codebook)                      data-dependent checks, or nothing
//   check_indices(indices, codes, lowest)                    likewise
//   check_shape([pyramid, ]layout)                           limits of its kernels, or nothing
//   run(args, like)                                          one overload an args struct
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "../common/gumbel.h"
#include "arguments.h"

namespace tokenflow::torch_ops {

template <typename Backend>
struct Operators {
  // run(T{}) with T the element type of `tensor`.
  template <typename Run>
  static auto dispatch(const Tensor& tensor, const char* name, const Run& run) {
    if (tensor.scalar_type() == ScalarType::Double) {
      STD_TORCH_CHECK(Backend::template supports<double>, name,
                      " must be float32 on this device, got float64");
      if constexpr (Backend::template supports<double>) return run(double{});
    }
    return run(float{});
  }

  // What every operator on features starts from: h and the codebook checked against each other and
  // made contiguous, their shapes as the kernels take them.
  struct Problem {
    CodebookLayout layout;
    Pyramid pyramid;
    std::vector<int64_t> tokens;  // shape of indices: [images, L], or [images, books, L]

    std::vector<int64_t> of_codebooks(const Tensor& codebook, std::vector<int64_t> shape) const {
      return by_book(layout, codebook, std::move(shape));
    }
  };

  static std::vector<int64_t> token_shape(const Tensor& codebook, const CodebookLayout& layout,
                                          const Pyramid& pyramid) {
    return by_book(layout, codebook, {pyramid.batch / layout.books, tokens_per_image(pyramid)}, 1);
  }

  static Problem check_problem(Tensor& h, Tensor& codebook, const std::vector<int64_t>& dims,
                               const std::vector<double>& weights,
                               const std::vector<int64_t>& sizes, bool l2_norm,
                               int64_t metric = 0) {
    CodebookLayout layout = make_layout(codebook, dims, weights, l2_norm, metric);
    compare_weights(layout);
    const Pyramid pyramid = make_pyramid(h, layout, sizes);
    check_like(codebook, "codebook", h, "h");
    check_device(codebook, "codebook", h, "h");
    Backend::check_shape(pyramid, layout);
    h = contiguous(h, "h");
    codebook = contiguous(codebook, "codebook");
    return {layout, pyramid, token_shape(codebook, layout, pyramid)};
  }

  static void check_tokens(Tensor& indices, const std::vector<int64_t>& shape, const Tensor& other,
                           const char* other_name) {
    torch_ops::check_indices(indices, shape);
    check_device(indices, "indices", other, other_name);
    indices = contiguous(indices, "indices");
  }

  // Rows and a codebook, likewise: [N, dim] and [codes, dim], or [books, N, dim] and
  // [books, codes, dim].
  static CodebookLayout check_rows(Tensor& rows, Tensor& codebook, const std::vector<int64_t>& dims,
                                   const std::vector<double>& weights, bool l2_norm,
                                   int64_t metric) {
    check_floating(rows, "rows");
    const int64_t last = codebook.dim() == 3 ? 2 : 1;
    check_dim(rows, last + 1, "rows");
    const CodebookLayout layout = make_layout(codebook, dims, weights, l2_norm, metric);
    STD_TORCH_CHECK(rows.size(last) == layout.dim, "rows must have sum(dims) = ", layout.dim,
                    " columns, got shape ", shape_of(rows));
    STD_TORCH_CHECK(last == 1 || rows.size(0) == layout.books,
                    "rows must have as many entries as codebook, ", layout.books, ", got shape ",
                    shape_of(rows));
    STD_TORCH_CHECK(rows.size(last - 1) > 0, "rows must not be empty, got shape ", shape_of(rows));
    check_like(codebook, "codebook", rows, "rows");
    check_device(codebook, "codebook", rows, "rows");
    Backend::check_shape(layout);
    rows = contiguous(rows, "rows");
    codebook = contiguous(codebook, "codebook");
    return layout;
  }

  static Tensor nearest_code(Tensor rows, Tensor codebook, std::vector<int64_t> dims,
                             std::vector<double> weights, bool l2_norm, int64_t metric) {
    CodebookLayout layout = check_rows(rows, codebook, dims, weights, l2_norm, metric);
    compare_weights(layout);
    const int64_t num_rows = rows.size(rows.dim() - 2);
    return dispatch(rows, "rows", [&](auto zero) {
      using T = decltype(zero);
      Backend::template check_codebook<T>(layout, codebook);
      Tensor indices =
          empty(by_book(layout, codebook, {num_rows}), ScalarType::Long, rows, "indices");
      Backend::run(NearestCodeArgs<T>{layout, data<T>(codebook), num_rows, data<T>(rows),
                                      mutable_data<int64_t>(indices)},
                   rows);
      return indices;
    });
  }

  static Tensor sample_code(Tensor rows, Tensor codebook, std::vector<int64_t> dims,
                            std::vector<double> weights, bool l2_norm, int64_t metric,
                            double temperature, int64_t seed, std::optional<Tensor> seed_rows,
                            int64_t offset, std::optional<Tensor> offset_rows) {
    const CodebookLayout layout = check_rows(rows, codebook, dims, weights, l2_norm, metric);
    check_dim(codebook, 2, "codebook");
    STD_TORCH_CHECK(temperature >= 0 && std::isfinite(temperature),
                    "temperature must be finite and not negative, got ", temperature);
    const int64_t num_rows = rows.size(0);
    const auto of_rows = [&](int64_t value, const std::optional<Tensor>& values, const char* name) {
      return row_argument(value, values, name, ScalarType::Long, num_rows, rows, "rows");
    };
    return dispatch(rows, "rows", [&](auto zero) {
      using T = decltype(zero);
      Backend::template check_codebook<T>(layout, codebook);
      Tensor indices = empty({num_rows}, ScalarType::Long, rows, "indices");
      Backend::run(
          SampleCodeArgs<T>{layout, data<T>(codebook), num_rows, data<T>(rows), temperature,
                            of_rows(seed, seed_rows, "seed"),
                            of_rows(offset, offset_rows, "offset"), mutable_data<int64_t>(indices)},
          rows);
      return indices;
    });
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> multiscale_quantize(
      Tensor h, Tensor codebook, std::optional<Tensor> dropped, std::vector<int64_t> dims,
      std::vector<double> weights, std::vector<int64_t> sizes, bool l2_norm,
      bool /*atomic_codebook_gradient*/, int64_t metric) {
    const Problem problem = check_problem(h, codebook, dims, weights, sizes, l2_norm, metric);
    const CodebookLayout& layout = problem.layout;
    const Pyramid& pyramid = problem.pyramid;
    if (dropped) {
      check_device(*dropped, "dropped", h, "h");
      STD_TORCH_CHECK(dropped->scalar_type() == ScalarType::Long && dropped->numel() == 1,
                      "dropped must be one int64, got ",
                      torch::headeronly::toString(dropped->scalar_type()), " of shape ",
                      shape_of(*dropped));
    }
    return dispatch(h, "h", [&](auto zero) {
      using T = decltype(zero);
      Backend::template check_codebook<T>(layout, codebook);
      const ScalarType type = h.scalar_type();
      Tensor quantized = empty(shape(h), type, h, "quantized");
      Tensor indices = empty(problem.tokens, ScalarType::Long, h, "indices");
      Tensor code_error =
          empty(problem.of_codebooks(codebook, {pyramid.num_scales}), type, h, "code_error");
      Tensor hits =
          empty(problem.of_codebooks(codebook, {layout.codes}), ScalarType::Long, h, "hits");
      Backend::run(QuantizeArgs<T>{pyramid, layout, data<T>(codebook), data<T>(h),
                                   dropped ? data<int64_t>(*dropped) : nullptr,
                                   mutable_data<T>(quantized), mutable_data<int64_t>(indices),
                                   mutable_data<T>(code_error), mutable_data<int64_t>(hits)},
                   h);
      // The same numbers twice: the first carries gradient to the codebook, the second to h.
      Tensor row_error = torch::stable::clone(code_error);
      return std::make_tuple(quantized, indices, code_error, row_error, hits);
    });
  }

  static std::tuple<Tensor, Tensor> multiscale_quantize_backward(
      Tensor h, Tensor codebook, Tensor indices, Tensor grad_quantized,
      std::optional<Tensor> grad_code_error, Tensor grad_row_error, std::vector<int64_t> dims,
      std::vector<int64_t> sizes, bool l2_norm, bool atomic_codebook_gradient) {
    const Problem problem = check_problem(h, codebook, dims, {}, sizes, l2_norm);
    const CodebookLayout& layout = problem.layout;
    const Pyramid& pyramid = problem.pyramid;
    check_tokens(indices, problem.tokens, h, "h");
    const auto check_grad = [&](Tensor& grad, const char* name, const std::vector<int64_t>& shape) {
      check_shape(grad, shape, name);
      check_like(grad, name, h, "h");
      check_device(grad, name, h, "h");
      grad = contiguous(grad, name);
    };
    check_grad(grad_quantized, "grad_quantized", shape(h));
    const std::vector<int64_t> errors = problem.of_codebooks(codebook, {pyramid.num_scales});
    if (grad_code_error) check_grad(*grad_code_error, "grad_code_error", errors);
    check_grad(grad_row_error, "grad_row_error", errors);
    return dispatch(h, "h", [&](auto zero) {
      using T = decltype(zero);
      Backend::check_indices(indices, layout.codes, -1);
      const ScalarType type = h.scalar_type();
      Tensor grad_h = empty(shape(h), type, h, "grad_h");
      Tensor grad_codebook = empty(shape(codebook), type, h, "grad_codebook");
      Backend::run(
          QuantizeBackwardArgs<T>{pyramid, layout, data<T>(codebook), data<T>(h),
                                  data<int64_t>(indices), data<T>(grad_quantized),
                                  grad_code_error ? data<T>(*grad_code_error) : nullptr,
                                  data<T>(grad_row_error), mutable_data<T>(grad_h),
                                  mutable_data<T>(grad_codebook), atomic_codebook_gradient},
          h);
      return std::make_tuple(grad_h, grad_codebook);
    });
  }

  static Tensor multiscale_rows(Tensor h, Tensor codebook, Tensor indices,
                                std::vector<int64_t> dims, std::vector<int64_t> sizes,
                                bool l2_norm) {
    const Problem problem = check_problem(h, codebook, dims, {}, sizes, l2_norm);
    const CodebookLayout& layout = problem.layout;
    const Pyramid& pyramid = problem.pyramid;
    check_tokens(indices, problem.tokens, h, "h");
    std::vector<int64_t> row_shape = problem.tokens;
    row_shape.push_back(layout.dim);
    return dispatch(h, "h", [&](auto zero) {
      using T = decltype(zero);
      Backend::check_indices(indices, layout.codes, -1);
      Tensor rows = empty(row_shape, h.scalar_type(), h, "rows");
      Backend::run(PyramidRowsArgs<T>{pyramid, layout, data<T>(codebook), data<T>(h),
                                      data<int64_t>(indices), mutable_data<T>(rows)},
                   h);
      return rows;
    });
  }

  static Tensor multiscale_decode(Tensor indices, Tensor codebook, std::vector<int64_t> dims,
                                  std::vector<int64_t> sizes, int64_t height, int64_t width,
                                  bool l2_norm) {
    const CodebookLayout layout = make_layout(codebook, dims, {}, l2_norm);
    check_dim(indices, codebook.dim(), "indices");
    const int64_t images = indices.size(0);
    const Pyramid pyramid = make_pyramid(images * layout.books, height, width, sizes);
    check_tokens(indices, token_shape(codebook, layout, pyramid), codebook, "codebook");
    Backend::check_shape(pyramid, layout);
    codebook = contiguous(codebook, "codebook");
    return dispatch(codebook, "codebook", [&](auto zero) {
      using T = decltype(zero);
      Backend::check_indices(indices, layout.codes, 0);
      Backend::template check_codebook<T>(layout, codebook);
      Tensor quantized = empty({images, layout.books * layout.dim, height, width},
                               codebook.scalar_type(), codebook, "quantized");
      Backend::run(DecodeArgs<T>{pyramid, layout, data<T>(codebook), data<int64_t>(indices),
                                 mutable_data<T>(quantized)},
                   codebook);
      return quantized;
    });
  }

  static std::tuple<Tensor, Tensor> segment_sum(Tensor rows, Tensor indices, int64_t num_segments) {
    check_floating(rows, "rows");
    check_dim(rows, 2, "rows");
    check_indices_type(indices);
    check_shape(indices, {rows.size(0)}, "indices");
    check_device(indices, "indices", rows, "rows");
    STD_TORCH_CHECK(num_segments > 0, "num_segments must be positive, got ", num_segments);
    STD_TORCH_CHECK(rows.numel() > 0, "rows must not be empty, got shape ", shape_of(rows));
    rows = contiguous(rows, "rows");
    indices = contiguous(indices, "indices");
    return dispatch(rows, "rows", [&](auto zero) {
      using T = decltype(zero);
      Backend::check_indices(indices, num_segments, -1);
      Tensor sums = empty({num_segments, rows.size(1)}, rows.scalar_type(), rows, "sums");
      Tensor counts = empty({num_segments}, ScalarType::Long, rows, "counts");
      Backend::run(SegmentSumArgs<T>{num_segments, rows.size(1), rows.size(0), data<T>(rows),
                                     data<int64_t>(indices), mutable_data<T>(sums),
                                     mutable_data<int64_t>(counts)},
                   rows);
      return std::make_tuple(sums, counts);
    });
  }

  static void register_all(torch::stable::detail::StableLibrary& m) {
    m.impl("nearest_code", TORCH_BOX(&nearest_code));
    m.impl("sample_code", TORCH_BOX(&sample_code));
    m.impl("multiscale_quantize", TORCH_BOX(&multiscale_quantize));
    m.impl("multiscale_quantize_backward", TORCH_BOX(&multiscale_quantize_backward));
    m.impl("multiscale_rows", TORCH_BOX(&multiscale_rows));
    m.impl("multiscale_decode", TORCH_BOX(&multiscale_decode));
    m.impl("segment_sum", TORCH_BOX(&segment_sum));
  }
};

}  // namespace tokenflow::torch_ops
