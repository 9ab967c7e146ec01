// Checks that every operator makes before anything runs, and the conversion of its arguments to
// the plain structs of common/. Messages name the argument and what was got.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "../common/quantizer_args.h"
#include "../common/row_argument.h"

namespace tokenflow::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Columns of a codebook that the kernels' error bounds and counters are made for.
constexpr int64_t kMostColumns = int64_t{1} << 20;

inline std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline std::vector<int64_t> shape(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end()};
}

inline std::string shape_of(const Tensor& tensor) { return text_of(shape(tensor)); }

inline void check_floating(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name,
                  " must be float32 or float64, got ", torch::headeronly::toString(type));
}

inline void check_dim(const Tensor& tensor, int64_t dim, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, got shape ",
                  shape_of(tensor));
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& other,
                       const char* other_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " must have the dtype of ",
                  other_name, " (", torch::headeronly::toString(other.scalar_type()), "), got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

// Tensors are read through raw pointers by one device's kernels.
inline void check_device(const Tensor& tensor, const char* name, const Tensor& other,
                         const char* other_name) {
  STD_TORCH_CHECK(tensor.device() == other.device(), name, " must be on the device of ",
                  other_name);
}

inline void check_indices_type(const Tensor& indices) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, "indices must be int64, got ",
                  torch::headeronly::toString(indices.scalar_type()));
}

// codebook [codes, dim], or several [books, codes, dim].
inline CodebookLayout make_layout(const Tensor& codebook, const std::vector<int64_t>& dims,
                                  const std::vector<double>& weights, bool l2_norm,
                                  int64_t metric = 0) {
  check_floating(codebook, "codebook");
  const int64_t last = codebook.dim() - 1;
  STD_TORCH_CHECK(last == 1 || last == 2, "codebook must have 2 or 3 dimensions, got shape ",
                  shape_of(codebook));
  STD_TORCH_CHECK(codebook.size(0) > 0 && codebook.size(last - 1) > 0,
                  "codebook must have at least one row, got shape ", shape_of(codebook));
  STD_TORCH_CHECK(metric >= 0 && metric <= 2, "metric must be 0 to 2, got ", metric);
  STD_TORCH_CHECK(!dims.empty() && dims.size() <= kMaxGroups, "dims must name 1 to ", kMaxGroups,
                  " groups, got ", dims.size());
  CodebookLayout layout = {};
  layout.books = last == 2 ? codebook.size(0) : 1;
  layout.codes = codebook.size(last - 1);
  layout.metric = static_cast<Metric>(metric);
  layout.groups = static_cast<int>(dims.size());
  layout.l2_norm = l2_norm;
  for (size_t g = 0; g < dims.size(); ++g) {
    STD_TORCH_CHECK(dims[g] > 0, "dims must be positive, got ", dims[g], " at position ", g);
    STD_TORCH_CHECK(dims[g] <= kMostColumns - layout.dim, "dims must sum to at most ", kMostColumns,
                    ", got ", dims[g], " at position ", g, " after ", layout.dim);
    layout.begin[g] = layout.dim;
    layout.dim += static_cast<int>(dims[g]);
    layout.weight[g] = 1.0;
  }
  layout.begin[dims.size()] = layout.dim;
  STD_TORCH_CHECK(codebook.size(last) == layout.dim, "codebook must have sum(dims) = ", layout.dim,
                  " columns, got shape ", shape_of(codebook));
  if (!weights.empty()) {
    STD_TORCH_CHECK(weights.size() == dims.size(), "weights must name one weight a group (",
                    dims.size(), "), got ", weights.size());
    for (size_t g = 0; g < weights.size(); ++g) {
      STD_TORCH_CHECK(weights[g] >= 0 && std::isfinite(weights[g]),
                      "weights must be finite and not negative, got ", weights[g], " at position ",
                      g);
    }
    std::copy(weights.begin(), weights.end(), layout.weight);
  }
  return layout;
}

// Where only the order of distances counts, so does only how weights compare: by a power of two,
// the largest is brought to [1, 2), so that no distance over- or underflows for their sake.
inline void compare_weights(CodebookLayout& layout) {
  int exponent = 0;
  (void)std::frexp(*std::max_element(layout.weight, layout.weight + layout.groups), &exponent);
  for (int g = 0; g < layout.groups; ++g) {
    layout.weight[g] = std::ldexp(layout.weight[g], 1 - exponent);
  }
}

inline Pyramid make_pyramid(int64_t batch, int64_t height, int64_t width,
                            const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(batch > 0, "batch must not be empty, got ", batch);
  STD_TORCH_CHECK(height > 0 && width > 0 && height <= kLargestSide && width <= kLargestSide,
                  "height and width must be 1 to ", kLargestSide, ", got ", height, " x ", width);
  STD_TORCH_CHECK(!sizes.empty() && sizes.size() % 2 == 0 && sizes.size() <= 2 * kMaxScales,
                  "sizes must hold (height, width) of 1 to ", kMaxScales, " scales, got ",
                  sizes.size(), " numbers");
  Pyramid pyramid = {};
  pyramid.batch = batch;
  pyramid.height = static_cast<int>(height);
  pyramid.width = static_cast<int>(width);
  pyramid.num_scales = static_cast<int>(sizes.size() / 2);
  for (int s = 0; s < pyramid.num_scales; ++s) {
    const int64_t h = sizes[2 * s], w = sizes[2 * s + 1];
    STD_TORCH_CHECK(h > 0 && w > 0 && h <= kLargestSide && w <= kLargestSide, "sizes must be 1 to ",
                    kLargestSide, ", got ", h, " x ", w, " at scale ", s);
    pyramid.extent[s] = {static_cast<int>(h), static_cast<int>(w)};
    pyramid.first_token[s + 1] = pyramid.first_token[s] + h * w;
  }
  return pyramid;
}

// What has an entry for each codebook where there are several.
inline std::vector<int64_t> by_book(const CodebookLayout& layout, const Tensor& codebook,
                                    std::vector<int64_t> shape, size_t position = 0) {
  if (codebook.dim() == 3) {
    shape.insert(shape.begin() + static_cast<std::ptrdiff_t>(position), layout.books);
  }
  return shape;
}

// h [images, books * dim, height, width] for a codebook layout.
inline Pyramid make_pyramid(const Tensor& h, const CodebookLayout& layout,
                            const std::vector<int64_t>& sizes) {
  check_floating(h, "h");
  check_dim(h, 4, "h");
  STD_TORCH_CHECK(h.size(1) == layout.books * layout.dim, "h must have ",
                  layout.books == 1 ? "" : "as many times as there are codebooks ",
                  "sum(dims) = ", layout.dim, " channels, got shape ", shape_of(h));
  return make_pyramid(h.size(0) * layout.books, h.size(2), h.size(3), sizes);
}

inline void check_shape(const Tensor& tensor, const std::vector<int64_t>& shape, const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) {
    same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  }
  STD_TORCH_CHECK(same, name, " must have shape ", text_of(shape), ", got ", shape_of(tensor));
}

inline void check_indices(const Tensor& indices, const std::vector<int64_t>& shape) {
  check_indices_type(indices);
  check_shape(indices, shape, "indices");
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A number for all rows, or a tensor of one (no dimension) or of one a row. The tensor is kept by
// the caller until the launch.
template <typename T>
RowArgument<T> row_argument(T value, const std::optional<Tensor>& values, const char* name,
                            ScalarType type, int64_t rows, const Tensor& like,
                            const char* like_name) {
  if (!values) return {nullptr, 0, value};
  STD_TORCH_CHECK(values->scalar_type() == type, name, " must be ",
                  torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(values->scalar_type()));
  STD_TORCH_CHECK(values->dim() == 0 || (values->dim() == 1 && values->size(0) == rows &&
                                         (rows == 1 || values->stride(0) == 1)),
                  name, " must be one number or one for each of ", rows, " rows, got shape ",
                  shape_of(*values));
  check_device(*values, name, like, like_name);
  return {data<T>(*values), values->dim() == 0 ? 0 : 1, T{}};
}

// make(), which fails for lack of memory alone.
template <typename Make>
Tensor allocate(const char* name, const std::vector<int64_t>& shape, const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    STD_TORCH_CHECK(false, "not enough memory for ", name, " of shape ", text_of(shape));
  }
}

inline Tensor empty(const std::vector<int64_t>& shape, ScalarType type, const Tensor& like,
                    const char* name) {
  return allocate(name, shape,
                  [&] { return torch::stable::empty(shape, type, std::nullopt, like.device()); });
}

inline Tensor contiguous(const Tensor& tensor, const char* name) {
  return allocate(name, shape(tensor), [&] { return torch::stable::contiguous(tensor); });
}

}  // namespace tokenflow::torch_ops
