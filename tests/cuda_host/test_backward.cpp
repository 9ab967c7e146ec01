// quantize_backward against the transposed dense matrices in float64.
#include <algorithm>

#include "support.h"

using namespace test;
using namespace tokenflow;

namespace {

struct Wants {
  bool grad_quantized = true, code_error = true, row_error = true;
  bool grad_h = true, grad_codebook = true;
};

// Which code a token takes: a random one, except that
struct Tokens {
  int missing = 5;    // every so many-th names none,
  int dropped = -1;   // nor does any of this scale,
  int hot_share = 0;  // and of a hundred tokens this many take one code.
  int64_t hot = 0;
};

struct Gradients {
  Vector h, codebook;
};

Gradients definition(const Pyramid& pyramid, const CodebookLayout& layout, const Floats& codebook,
                     const Floats& h, const Indices& indices, const Floats& grad_quantized,
                     const Floats& grad_code_error, const Floats& grad_row_error,
                     const Wants& wants) {
  const int64_t tokens = tokens_per_image(pyramid);
  const int full = pyramid.height * pyramid.width, dim = layout.dim;
  const Loop loop = residual_loop(pyramid, layout, codebook, h, indices);
  Gradients grad = {Vector(h.size()), Vector(codebook.size())};
  Vector code_sums(codebook.size());
  for (int s = 0; s < pyramid.num_scales; ++s) {
    const int height = pyramid.extent[s].height, width = pyramid.extent[s].width;
    const double squares = static_cast<double>(pyramid.batch * height * width * dim);
    const Matrix from_y = average(pyramid.height, height).transposed();
    const Matrix from_x = average(pyramid.width, width).transposed();
    const Matrix to_y = bicubic(height, pyramid.height).transposed();
    const Matrix to_x = bicubic(width, pyramid.width).transposed();
    for (int64_t b = 0; b < pyramid.batch; ++b) {
      const size_t first = static_cast<size_t>(b * tokens + pyramid.first_token[s]);
      std::vector<Vector> row_grads(static_cast<size_t>(height * width), Vector(dim));
      if (wants.grad_quantized) {
        for (int d = 0; d < dim; ++d) {
          const Vector plane(grad_quantized.begin() + (b * dim + d) * full,
                             grad_quantized.begin() + (b * dim + d + 1) * full);
          const Vector rows = apply(to_y, to_x, plane.data());
          for (int p = 0; p < height * width; ++p) row_grads[p][d] = rows[p];
        }
      }
      for (int p = 0; p < height * width; ++p) {
        const Vector &code = loop.codes[first + p], &target = loop.targets[first + p];
        if (code.empty()) {
          row_grads[p].assign(dim, 0.0);
          continue;
        }
        for (int d = 0; d < dim; ++d) {
          const double difference = target[d] - code[d];
          if (wants.row_error) row_grads[p][d] += 2 * grad_row_error[s] * difference / squares;
          if (wants.code_error) {
            code_sums[indices[first + p] * dim + d] -=
                2 * grad_code_error[s] * difference / squares;
          }
        }
        row_grads[p] = normalized_backward(loop.rows[first + p].data(), row_grads[p], layout);
      }
      for (int d = 0; d < dim; ++d) {
        Vector plane(static_cast<size_t>(height * width));
        for (int p = 0; p < height * width; ++p) plane[p] = row_grads[p][d];
        const Vector spread = apply(from_y, from_x, plane.data());
        for (int i = 0; i < full; ++i) grad.h[(b * dim + d) * full + i] += spread[i];
      }
    }
  }
  for (int64_t i = 0; i < layout.codes; ++i) {
    const Vector row(codebook.begin() + i * dim, codebook.begin() + (i + 1) * dim);
    const Vector sum(code_sums.begin() + i * dim, code_sums.begin() + (i + 1) * dim);
    const Vector result = normalized_backward(row.data(), sum, layout);
    std::copy(result.begin(), result.end(), grad.codebook.begin() + i * dim);
  }
  return grad;
}

Indices choose(const Pyramid& pyramid, int64_t codes, const Tokens& choice) {
  const int64_t tokens = tokens_per_image(pyramid);
  Indices indices(static_cast<size_t>(pyramid.batch * tokens));
  std::mt19937 generator(6);
  for (size_t n = 0; n < indices.size(); ++n) {
    indices[n] = static_cast<int64_t>(generator() % static_cast<unsigned>(codes));
    if (static_cast<int>(generator() % 100) < choice.hot_share) indices[n] = choice.hot;
    if (static_cast<int>(n) % choice.missing == choice.missing - 1) {
      indices[n] = n % 2 ? -1 : codes + 3;
    }
    const int64_t t = static_cast<int64_t>(n) % tokens;
    if (choice.dropped >= 0 && t >= pyramid.first_token[choice.dropped] &&
        t < pyramid.first_token[choice.dropped + 1]) {
      indices[n] = -1;
    }
  }
  return indices;
}

void check(const char* name, const Pyramid& pyramid, const CodebookLayout& layout,
           const Wants& wants = {}, const Tokens& choice = {}) {
  const int64_t dim = layout.dim;
  const Floats codebook = random_floats(layout.codes * dim, 1);
  const Floats h = random_floats(pyramid.batch * dim * pyramid.height * pyramid.width, 2);
  const Floats grad_quantized = random_floats(static_cast<int64_t>(h.size()), 3);
  Floats grad_code_error = random_floats(pyramid.num_scales, 4);
  Floats grad_row_error = random_floats(pyramid.num_scales, 5);
  for (int s = 0; s < pyramid.num_scales; ++s) {  // as large as the rest, whatever the mean is over
    const Extent extent = pyramid.extent[s];
    const float squares =
        static_cast<float>(pyramid.batch * extent.height * extent.width * layout.dim);
    grad_code_error[s] *= squares;
    grad_row_error[s] *= squares;
  }
  const Indices indices = choose(pyramid, layout.codes, choice);
  const Gradients wanted = definition(pyramid, layout, codebook, h, indices, grad_quantized,
                                      grad_code_error, grad_row_error, wants);
  for (const bool atomic : {false, true}) {
    Floats first_h, first_codebook;
    in_every_order([&](const std::string& order) {
      const std::string label = std::string(name) + " (" + order + (atomic ? ", atomic)" : ")");
      Floats grad_h = poisoned<float>(static_cast<int64_t>(h.size()));
      Floats grad_codebook = poisoned<float>(layout.codes * dim);
      QuantizeBackwardArgs<float> args = {};
      args.pyramid = pyramid;
      args.layout = layout;
      args.codebook = codebook.data();
      args.h = h.data();
      args.indices = indices.data();
      args.grad_quantized = wants.grad_quantized ? grad_quantized.data() : nullptr;
      args.grad_code_error = wants.code_error ? grad_code_error.data() : nullptr;
      args.grad_row_error = wants.row_error ? grad_row_error.data() : nullptr;
      args.grad_h = wants.grad_h ? grad_h.data() : nullptr;
      args.grad_codebook = wants.grad_codebook ? grad_codebook.data() : nullptr;
      args.atomic_codebook_gradient = atomic;
      CHECK(run(args, cuda::quantize_backward_workspace_bytes, cuda::launch_quantize_backward) ==
                cudaSuccess,
            "launch");
      if (first_h.empty()) {
        first_h = grad_h;
        first_codebook = grad_codebook;
      }
      CHECK(same_bits(grad_h, first_h), "%s: other bits in another order", label.c_str());
      if (!atomic) {
        CHECK(same_bits(grad_codebook, first_codebook), "%s: other bits in another order",
              label.c_str());
      }
      if (wants.grad_h) check_close(grad_h, wanted.h, 3e-5, label + ": grad_h");
      if (wants.grad_codebook) {
        check_close(grad_codebook, wanted.codebook, 1e-5, label + ": grad_codebook");
      }
    });
  }
}

// One token, row and code shorter than epsilon in the first group: there they are only scaled by
// 1 / epsilon. Nothing comes of codes that no token has, whatever they hold.
void check_short_rows(int64_t codes) {
  const Pyramid pyramid = make_pyramid(1, 1, 1, {{1, 1}});
  const CodebookLayout layout = make_layout(codes, {2, 1}, true);
  Floats codebook = poisoned<float>(codes * 3);
  const Floats code = {0, 4e-13f, 2}, h = {3e-13f, 0, 3}, grad_quantized = {1e-12f, -2e-12f, 5};
  std::copy(code.begin(), code.end(), codebook.begin());
  const Floats grad_code_error = {1.5e-12f}, grad_row_error = {0.0f};
  const Indices indices = {0};
  Vector wanted(codebook.size());
  wanted[0] = -0.3;  // q - z, times 2 grad_code_error / 3, over epsilon
  wanted[1] = 0.4;
  for (const bool atomic : {false, true}) {
    Floats grad_h = poisoned<float>(3), grad_codebook = poisoned<float>(codes * 3);
    const QuantizeBackwardArgs<float> args = {pyramid,
                                              layout,
                                              codebook.data(),
                                              h.data(),
                                              indices.data(),
                                              grad_quantized.data(),
                                              grad_code_error.data(),
                                              grad_row_error.data(),
                                              grad_h.data(),
                                              grad_codebook.data(),
                                              atomic};
    CHECK(run(args, cuda::quantize_backward_workspace_bytes, cuda::launch_quantize_backward) ==
              cudaSuccess,
          "launch");
    check_close(grad_h, {1, -2, 0}, 1e-6, "short row");
    check_close(grad_codebook, wanted, 1e-6, "short code");
  }
}

int64_t launches_of(int64_t codes, bool atomic) {
  const Pyramid pyramid = make_pyramid(1, 2, 2, {{1, 1}, {2, 2}});
  const CodebookLayout layout = make_layout(codes, {2}, true);
  const Floats codebook = random_floats(codes * 2, 1), h = random_floats(8, 2);
  const Floats errors = {1.0f, 1.0f};
  const Indices indices = {0, 1, -1, codes - 1, 0};
  Floats grad_h(8), grad_codebook(static_cast<size_t>(codes) * 2);
  const QuantizeBackwardArgs<float> args = {
      pyramid,  layout,        codebook.data(), h.data(),      indices.data(),
      h.data(), errors.data(), errors.data(),   grad_h.data(), grad_codebook.data(),
      atomic};
  const int64_t before = emulation::launches();
  CHECK(run(args, cuda::quantize_backward_workspace_bytes, cuda::launch_quantize_backward) ==
            cudaSuccess,
        "launch");
  return emulation::launches() - before;
}

}  // namespace

int main() {
  const Pyramid square = make_pyramid(2, 4, 4, {{1, 1}, {2, 2}, {3, 3}, {4, 4}});
  const CodebookLayout groups = make_layout(23, {6, 3}, true, {1.0, 0.5});
  check("TokenFlow's groups", square, make_layout(37, {32, 8}, true));
  check("not square", make_pyramid(2, 3, 5, {{1, 2}, {3, 2}, {2, 4}, {3, 5}}),
        make_layout(14, {3, 2, 1}, true));
  check("no normalisation", make_pyramid(1, 5, 3, {{2, 3}, {4, 1}, {5, 3}}),
        make_layout(20, {6}, false));
  check("one scale", make_pyramid(2, 3, 3, {{3, 3}}), groups);
  check("one code", make_pyramid(2, 3, 3, {{1, 1}, {3, 3}}), make_layout(1, {4}, true));
  check("scales that shrink and exceed the plane", make_pyramid(1, 3, 4, {{5, 2}, {1, 1}, {2, 6}}),
        groups);
  check("dropped scale", square, groups, {}, {1000, 2});
  check("no index names a code", make_pyramid(1, 2, 2, {{1, 1}, {2, 2}}), groups, {}, {1});
  check("wider than a tile", make_pyramid(1, 2, 35, {{1, 3}, {2, 20}}), make_layout(6, {34}, true));
  check("blocks of channels", make_pyramid(100, 2, 2, {{1, 1}, {2, 2}}),
        make_layout(5, {3, 2}, true));
  check("grad_quantized alone", square, groups, {true, false, false, true, true});
  check("row error alone", square, groups, {false, false, true, true, false});
  check("code error alone", square, groups, {false, true, false, true, true});
  check("only the codebook's", square, groups, {true, true, true, false, true});
  check("only h's", square, groups, {true, true, true, true, false});

  check("hot code", make_pyramid(5, 16, 16, {{1, 1}, {4, 4}, {16, 16}}),
        make_layout(30, {5, 2}, true), {}, {9, -1, 85, 17});
  check("hot code of many channels, not normalised", make_pyramid(3, 12, 12, {{12, 12}}),
        make_layout(3, {45}, false), {}, {7, -1, 90, 2});
  check("wider than a warp", square, make_layout(9, {35, 70, 1}, true));
  std::vector<int> many(kMaxGroups);
  for (int g = 0; g < kMaxGroups; ++g) many[g] = 1 + g % 3;
  check("as many groups as there can be", make_pyramid(2, 3, 3, {{1, 1}, {3, 3}}),
        make_layout(7, many, true));

  check_short_rows(1);
  check_short_rows(9);
  check("codes of three digits", square, make_layout(65537, {3, 2}, true), {}, {5, -1, 20, 65536});

  CHECK(launches_of(256, false) == 8, "a digit");
  CHECK(launches_of(257, false) == 10, "two digits");
  CHECK(launches_of(65536, false) == 10, "two digits");
  CHECK(launches_of(65537, false) == 12, "three digits");
  CHECK(launches_of(257, true) == 6, "atomic");
  return 0;
}
