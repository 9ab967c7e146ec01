// What the tests share: checks, poisoned device memory, random cases, and the algorithm once more
// in float64, written with dense matrices so that it has nothing in common with the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../cpp/check.h"
#include "cuda/quantizer.h"
#include "emulation.h"

namespace test {

using tokenflow::CodebookLayout;
using tokenflow::Pyramid;
using Vector = std::vector<double>;
using Floats = std::vector<float>;
using Indices = std::vector<int64_t>;

// Memory of exactly `count` elements with all bits set: NaN as a float, -1 as an integer.
template <typename T>
std::vector<T> poisoned(int64_t count) {
  std::vector<T> memory(static_cast<size_t>(count));
  if (count > 0) std::memset(memory.data(), 0xff, static_cast<size_t>(count) * sizeof(T));
  return memory;
}

// Launches with a workspace of exactly the size asked for, every byte of it `poison`.
template <typename Args>
cudaError_t run(const Args& args, size_t (*workspace_bytes)(const Args&),
                cudaError_t (*launch)(const Args&, void*, cudaStream_t), int poison = 0xff) {
  const size_t bytes = workspace_bytes(args);
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes) != 0) std::abort();
  std::memset(memory, poison, bytes);
  const cudaError_t error = launch(args, memory, nullptr);
  std::free(memory);
  return error;
}

// Calls body(order's name) with threads and blocks taking turns in several orders.
template <typename Body>
void in_every_order(const Body& body) {
  emulation::set_order(emulation::Order::kForward);
  body("forward");
  emulation::set_order(emulation::Order::kReverse);
  body("reverse");
#if defined(__SANITIZE_ADDRESS__)
  constexpr unsigned kSeeds = 1;  // four times as slow
#else
  constexpr unsigned kSeeds = 2;
#endif
  for (unsigned seed = 1; seed <= kSeeds; ++seed) {
    emulation::set_order(emulation::Order::kShuffled, seed);
    body("shuffled");
  }
  emulation::set_order(emulation::Order::kForward);
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

inline void check_close(const Floats& got, const Vector& wanted, double tolerance,
                        const std::string& what) {
  CHECK(got.size() == wanted.size(), "%s: %zu and %zu elements", what.c_str(), got.size(),
        wanted.size());
  double largest = 0;
  for (const double value : wanted) largest = std::max(largest, std::fabs(value));
  for (size_t i = 0; i < got.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(got[i]) - wanted[i]);
    CHECK(difference <= tolerance * (1 + largest), "%s: element %zu is %.9g, not %.9g",
          what.c_str(), i, static_cast<double>(got[i]), wanted[i]);
  }
}

// --- Cases --------------------------------------------------------------------------------------

inline Pyramid make_pyramid(int64_t batch, int height, int width,
                            const std::vector<std::pair<int, int>>& scales) {
  Pyramid pyramid = {};
  pyramid.batch = batch;
  pyramid.height = height;
  pyramid.width = width;
  pyramid.num_scales = static_cast<int>(scales.size());
  for (size_t s = 0; s < scales.size(); ++s) {
    pyramid.extent[s] = {scales[s].first, scales[s].second};
    pyramid.first_token[s + 1] =
        pyramid.first_token[s] + static_cast<int64_t>(scales[s].first) * scales[s].second;
  }
  return pyramid;
}

inline Floats random_floats(int64_t count, unsigned seed, float scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, scale);
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// --- The algorithm in float64 --------------------------------------------------------------------

// A linear map as a dense matrix [outputs][inputs].
struct Matrix {
  int outputs, inputs;
  Vector entries;
  Matrix(int outputs, int inputs)
      : outputs(outputs), inputs(inputs), entries(static_cast<size_t>(outputs) * inputs) {}
  double& at(int o, int i) { return entries[static_cast<size_t>(o) * inputs + i]; }
  double at(int o, int i) const { return entries[static_cast<size_t>(o) * inputs + i]; }
  Matrix transposed() const {
    Matrix result(inputs, outputs);
    for (int o = 0; o < outputs; ++o) {
      for (int i = 0; i < inputs; ++i) result.at(i, o) = at(o, i);
    }
    return result;
  }
};

inline Matrix average(int inputs, int outputs) {
  Matrix matrix(outputs, inputs);
  for (int o = 0; o < outputs; ++o) {
    const int begin = o * inputs / outputs;
    const int end = ((o + 1) * inputs + outputs - 1) / outputs;
    for (int i = begin; i < end; ++i) matrix.at(o, i) = 1.0 / (end - begin);
  }
  return matrix;
}

inline double cubic(double x) {  // Keys' kernel, A = -0.75
  const double a = -0.75;
  x = std::fabs(x);
  if (x <= 1) return (a + 2) * x * x * x - (a + 3) * x * x + 1;
  if (x < 2) return a * x * x * x - 5 * a * x * x + 8 * a * x - 4 * a;
  return 0;
}

inline Matrix bicubic(int inputs, int outputs) {
  Matrix matrix(outputs, inputs);
  for (int o = 0; o < outputs; ++o) {
    const double position = (o + 0.5) * inputs / outputs - 0.5;
    const int floor = static_cast<int>(std::floor(position + 1e-12));
    for (int k = floor - 1; k <= floor + 2; ++k) {
      matrix.at(o, std::min(std::max(k, 0), inputs - 1)) += cubic(position - k);
    }
  }
  return matrix;
}

// y [rows.outputs, columns.outputs] = rows x columns^T for one plane.
inline Vector apply(const Matrix& rows, const Matrix& columns, const double* plane) {
  Vector result(static_cast<size_t>(rows.outputs) * columns.outputs);
  for (int y = 0; y < rows.outputs; ++y) {
    for (int x = 0; x < columns.outputs; ++x) {
      double total = 0;
      for (int i = 0; i < rows.inputs; ++i) {
        for (int j = 0; j < columns.inputs; ++j) {
          total += rows.at(y, i) * columns.at(x, j) * plane[i * columns.inputs + j];
        }
      }
      result[static_cast<size_t>(y) * columns.outputs + x] = total;
    }
  }
  return result;
}

// A row scaled to unit length group by group.
template <typename T>
Vector normalized(const T* row, const CodebookLayout& layout) {
  Vector unit(row, row + layout.dim);
  if (!layout.l2_norm) return unit;
  for (int g = 0; g < layout.groups; ++g) {
    double length = 0;
    for (int d = layout.begin[g]; d < layout.begin[g + 1]; ++d) length += unit[d] * unit[d];
    length = std::max(std::sqrt(length), 1e-12);
    for (int d = layout.begin[g]; d < layout.begin[g + 1]; ++d) unit[d] /= length;
  }
  return unit;
}

inline double distance(const Vector& a, const Vector& b, const CodebookLayout& layout) {
  double total = 0;
  for (int g = 0; g < layout.groups; ++g) {
    for (int d = layout.begin[g]; d < layout.begin[g + 1]; ++d) {
      total +=
          layout.weight[g] *
          (layout.metric == tokenflow::Metric::kDot ? -a[d] * b[d] : (a[d] - b[d]) * (a[d] - b[d]));
    }
  }
  return total;
}

// Gradient of a function of normalized(row), by finite differences of the definition: J^T grad.
inline Vector normalized_backward(const double* row, const Vector& grad,
                                  const CodebookLayout& layout) {
  Vector result(grad);
  if (!layout.l2_norm) return result;
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    double length = 0;
    for (int d = begin; d < end; ++d) length += row[d] * row[d];
    length = std::sqrt(length);
    for (int d = begin; d < end; ++d) {
      double total = 0;
      for (int e = begin; e < end; ++e) {
        // d unit_e / d row_d
        const double jacobian = length > 1e-12 ? (d == e ? 1 / length : 0) -
                                                     row[d] * row[e] / (length * length * length)
                                               : (d == e ? 1e12 : 0);
        total += jacobian * grad[e];
      }
      result[d] = total;
    }
  }
  return result;
}

// The residual loop for given indices. An index that names no code adds nothing.
struct Loop {
  Vector quantized;             // [batch, dim, height, width]
  std::vector<Vector> rows;     // of each token, not normalised
  std::vector<Vector> targets;  // normalised
  std::vector<Vector> codes;    // normalised; empty for a token that adds nothing
};

inline Loop residual_loop(const Pyramid& pyramid, const CodebookLayout& layout,
                          const Floats& codebook, const Floats& h, const Indices& indices) {
  const int64_t tokens = tokens_per_image(pyramid);
  const int full = pyramid.height * pyramid.width, dim = layout.dim;
  Vector residual(h.begin(), h.end());
  residual.resize(static_cast<size_t>(pyramid.batch) * dim * full);  // no h: zeros
  Loop loop;
  loop.quantized.assign(residual.size(), 0.0);
  loop.rows.resize(static_cast<size_t>(pyramid.batch * tokens));
  loop.targets.resize(loop.rows.size());
  loop.codes.resize(loop.rows.size());
  for (int s = 0; s < pyramid.num_scales; ++s) {
    const int height = pyramid.extent[s].height, width = pyramid.extent[s].width;
    const Matrix down_y = average(pyramid.height, height), down_x = average(pyramid.width, width);
    const Matrix up_y = bicubic(height, pyramid.height), up_x = bicubic(width, pyramid.width);
    for (int64_t b = 0; b < pyramid.batch; ++b) {
      const size_t first = static_cast<size_t>(b * tokens + pyramid.first_token[s]);
      for (int p = 0; p < height * width; ++p) {
        loop.rows[first + p].resize(dim);
        const int64_t index = indices[first + p];
        if (index >= 0 && index < layout.codes) {
          loop.codes[first + p] = normalized(codebook.data() + index * dim, layout);
        }
      }
      for (int d = 0; d < dim; ++d) {
        double* plane = residual.data() + (b * dim + d) * full;
        const Vector pooled = apply(down_y, down_x, plane);
        Vector code(pooled.size());
        for (int p = 0; p < height * width; ++p) {
          loop.rows[first + p][d] = pooled[p];
          code[p] = loop.codes[first + p].empty() ? 0.0 : loop.codes[first + p][d];
        }
        const Vector u = apply(up_y, up_x, code.data());
        for (int i = 0; i < full; ++i) {
          plane[i] -= u[i];
          loop.quantized[(b * dim + d) * full + i] += u[i];
        }
      }
      for (int p = 0; p < height * width; ++p) {
        loop.targets[first + p] = normalized(loop.rows[first + p].data(), layout);
      }
    }
  }
  return loop;
}

}  // namespace test
