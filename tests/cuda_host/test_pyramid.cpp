// quantize, pyramid_rows and decode against the residual loop in float64.
#include <algorithm>

#include "support.h"

using namespace test;
using namespace tokenflow;

namespace {

struct Case {
  const char* name;
  Pyramid pyramid;
  CodebookLayout layout;
  int64_t dropped = -1;
  unsigned seed = 1;
};

struct Outputs {
  Floats quantized, squared_error;
  Indices indices, hits;
};

Outputs quantize(const Case& test, const Floats& codebook, const Floats& h, bool pass_dropped) {
  const int64_t tokens = test.pyramid.batch * tokens_per_image(test.pyramid);
  Outputs out = {poisoned<float>(static_cast<int64_t>(h.size())),
                 poisoned<float>(test.pyramid.num_scales), poisoned<int64_t>(tokens),
                 poisoned<int64_t>(test.layout.codes)};
  QuantizeArgs<float> args = {};
  args.pyramid = test.pyramid;
  args.layout = test.layout;
  args.codebook = codebook.data();
  args.h = h.data();
  args.dropped = pass_dropped ? &test.dropped : nullptr;
  args.quantized = out.quantized.data();
  args.indices = out.indices.data();
  args.squared_error = out.squared_error.data();
  args.hits = out.hits.data();
  const int64_t launches = emulation::launches();
  CHECK(run(args, cuda::quantize_workspace_bytes, cuda::launch_quantize) == cudaSuccess, "launch");
  // Packing, search and step are four kernels a scale, whatever the batch.
  CHECK(emulation::launches() - launches == 5 + 4 * test.pyramid.num_scales, "%ld launches",
        static_cast<long>(emulation::launches() - launches));
  return out;
}

Floats pyramid_rows(const Case& test, const Floats& codebook, const Floats& h,
                    const Indices& indices) {
  Floats rows = poisoned<float>(static_cast<int64_t>(indices.size()) * test.layout.dim);
  PyramidRowsArgs<float> args = {};
  args.pyramid = test.pyramid;
  args.layout = test.layout;
  args.codebook = codebook.data();
  args.h = h.data();
  args.indices = indices.data();
  args.rows = rows.data();
  CHECK(run(args, cuda::pyramid_rows_workspace_bytes, cuda::launch_pyramid_rows) == cudaSuccess,
        "launch");
  return rows;
}

Floats decode(const Case& test, const Floats& codebook, const Indices& indices) {
  Floats quantized = poisoned<float>(test.pyramid.batch * test.layout.dim * test.pyramid.height *
                                     test.pyramid.width);
  DecodeArgs<float> args = {};
  args.pyramid = test.pyramid;
  args.layout = test.layout;
  args.codebook = codebook.data();
  args.indices = indices.data();
  args.quantized = quantized.data();
  CHECK(run(args, cuda::decode_workspace_bytes, cuda::launch_decode) == cudaSuccess, "launch");
  return quantized;
}

void check_quantize(const Case& test, const Floats& codebook, const Floats& h, const Outputs& out,
                    const std::string& name) {
  const int64_t tokens = tokens_per_image(test.pyramid);
  const Loop loop = residual_loop(test.pyramid, test.layout, codebook, h, out.indices);
  std::vector<Vector> codes;
  for (int64_t i = 0; i < test.layout.codes; ++i) {
    codes.push_back(normalized(codebook.data() + i * test.layout.dim, test.layout));
  }
  Indices hits(static_cast<size_t>(test.layout.codes));
  Vector squared_error(static_cast<size_t>(test.pyramid.num_scales));
  for (int s = 0; s < test.pyramid.num_scales; ++s) {
    const Extent extent = test.pyramid.extent[s];
    const double squares =
        static_cast<double>(test.pyramid.batch * extent.height * extent.width * test.layout.dim);
    for (int64_t b = 0; b < test.pyramid.batch; ++b) {
      for (int64_t t = test.pyramid.first_token[s]; t < test.pyramid.first_token[s + 1]; ++t) {
        const size_t n = static_cast<size_t>(b * tokens + t);
        const int64_t index = out.indices[n];
        if (s == test.dropped) {
          CHECK(index == -1, "%s: token %zu of the dropped scale is %ld", name.c_str(), n,
                static_cast<long>(index));
          continue;
        }
        CHECK(index >= 0 && index < test.layout.codes, "%s: token %zu is %ld", name.c_str(), n,
              static_cast<long>(index));
        ++hits[index];
        double best = std::numeric_limits<double>::infinity();
        for (const Vector& code : codes) {
          best = std::min(best, test::distance(loop.targets[n], code, test.layout));
        }
        const double chosen = test::distance(loop.targets[n], codes[index], test.layout);
        // The rows of the kernels are float32: two codes may be as close as its rounding.
        CHECK(chosen <= best + 1e-5 * (1 + best), "%s: token %zu: %.9g is not the smallest, %.9g",
              name.c_str(), n, chosen, best);
        for (int d = 0; d < test.layout.dim; ++d) {
          const double difference = codes[index][d] - loop.targets[n][d];
          squared_error[s] += difference * difference / squares;
        }
      }
    }
  }
  check_close(out.quantized, loop.quantized, 1e-5, name + ": quantized");
  check_close(out.squared_error, squared_error, 1e-5, name + ": squared error");
  CHECK(out.hits == hits, "%s: hits", name.c_str());
}

void check_rows_and_decode(const Case& test, const Floats& codebook, const Floats& h,
                           const Indices& indices, const std::string& name) {
  const Loop loop = residual_loop(test.pyramid, test.layout, codebook, h, indices);
  Vector targets;
  for (const Vector& row : loop.targets) targets.insert(targets.end(), row.begin(), row.end());
  check_close(pyramid_rows(test, codebook, h, indices), targets, 3e-5, name + ": rows");
  check_close(decode(test, codebook, indices), loop.quantized, 1e-5, name + ": decode");
}

void check(const Case& test) {
  const int64_t plane =
      static_cast<int64_t>(test.layout.dim) * test.pyramid.height * test.pyramid.width;
  const Floats codebook = random_floats(test.layout.codes * test.layout.dim, test.seed);
  const Floats h = random_floats(test.pyramid.batch * plane, test.seed + 100);
  Outputs first;
  in_every_order([&](const std::string& order) {
    const std::string name = std::string(test.name) + " (" + order + ")";
    const Outputs out = quantize(test, codebook, h, true);
    if (first.indices.empty()) first = out;
    CHECK(same_bits(out.quantized, first.quantized) && out.indices == first.indices &&
              same_bits(out.squared_error, first.squared_error) && out.hits == first.hits,
          "%s: other bits in another order", name.c_str());
    check_quantize(test, codebook, h, out, name);
    check_rows_and_decode(test, codebook, h, out.indices, name);
    // Indices that name no code add nothing.
    Indices indices = out.indices;
    for (size_t i = 0; i < indices.size(); i += 3) indices[i] = i % 2 ? -1 : test.layout.codes;
    indices[indices.size() / 2] = std::numeric_limits<int64_t>::min();
    indices.back() = std::numeric_limits<int64_t>::max();
    check_rows_and_decode(test, codebook, h, indices, name + ", out of range");
  });
  if (test.dropped < 0) {
    CHECK(same_bits(quantize(test, codebook, h, false).quantized, first.quantized),
          "%s: no pointer to a dropped scale", test.name);
  }
}

}  // namespace

int main() {
  check({"TokenFlow's groups", make_pyramid(2, 4, 4, {{1, 1}, {2, 2}, {3, 3}, {4, 4}}),
         make_layout(37, {32, 8}, true)});
  check({"not square", make_pyramid(2, 3, 5, {{1, 2}, {3, 2}, {2, 4}, {3, 5}}),
         make_layout(140, {3, 2}, true, {1.0, 0.5}), -1, 2});
  check({"no normalisation", make_pyramid(1, 4, 3, {{2, 3}, {4, 1}, {4, 3}}),
         make_layout(20, {6}, false), -1, 3});
  check({"one scale", make_pyramid(3, 3, 3, {{3, 3}}), make_layout(11, {2, 1, 3}, true), -1, 4});
  check({"scales as large as the plane", make_pyramid(1, 3, 3, {{3, 3}, {3, 3}, {3, 3}}),
         make_layout(50, {4, 2}, true), -1, 5});
  check({"scales that shrink and exceed the plane", make_pyramid(1, 3, 4, {{5, 2}, {1, 1}, {2, 6}}),
         make_layout(9, {3}, true), -1, 6});
  check({"dropped scale", make_pyramid(2, 4, 4, {{1, 1}, {2, 2}, {4, 4}}),
         make_layout(16, {4, 2}, true), 1, 7});
  check({"first scale dropped", make_pyramid(1, 2, 2, {{1, 1}, {2, 2}}),
         make_layout(16, {4, 2}, true), 0, 8});
  check({"last scale dropped", make_pyramid(1, 2, 2, {{1, 1}, {2, 2}}),
         make_layout(16, {4, 2}, true), 1, 9});
  // Enough images for blocks of several channels, the last of them not full.
  check({"blocks of channels", make_pyramid(100, 2, 2, {{1, 1}, {2, 2}}),
         make_layout(5, {3, 2}, true), -1, 10});
  // More rows than a warp's lanes, whose errors are summed, in more maps than a block has warps.
  check({"many rows", make_pyramid(11, 7, 9, {{1, 1}, {5, 8}, {7, 9}}),
         make_layout(6, {2, 1}, true), -1, 12});
  // More shared memory than a kernel has without asking.
  check({"large plane", make_pyramid(1, 70, 70, {{3, 2}}), make_layout(4, {1}, false), -1, 11});

  {  // Rows are finished by an image's last block: in no order before another block's warps are
     // done.
    const Case test = {"", make_pyramid(6, 6, 11, {{6, 11}}), make_layout(2, {3, 1}, true)};
    const Floats codebook = random_floats(2 * 4, 40), h = random_floats(6 * 4 * 66, 41);
    const Indices indices(6 * 66, 0);
    const Floats wanted = pyramid_rows(test, codebook, h, indices);
    for (unsigned seed = 0; seed < 60; ++seed) {
      emulation::set_order(emulation::Order::kShuffled, seed);
      CHECK(same_bits(pyramid_rows(test, codebook, h, indices), wanted), "seed %u", seed);
    }
    emulation::set_order(emulation::Order::kForward);
  }
  {  // An image with a NaN leaves the others alone.
    const Case test = {"NaN", make_pyramid(3, 3, 3, {{1, 1}, {3, 3}}),
                       make_layout(12, {3, 2}, true)};
    const Floats codebook = random_floats(12 * 5, 30);
    Floats h = random_floats(3 * 5 * 9, 31);
    const Outputs clean = quantize(test, codebook, h, true);
    h[5 * 9 + 4] = std::numeric_limits<float>::quiet_NaN();  // channel 0, centre, of image 1
    const Outputs out = quantize(test, codebook, h, true);
    CHECK(out.indices[10] == 0 && out.indices[10 + 1 + 4] == 0, "rows with a NaN take index 0");
    for (const int image : {0, 2}) {
      CHECK(std::equal(out.indices.begin() + image * 10, out.indices.begin() + (image + 1) * 10,
                       clean.indices.begin() + image * 10),
            "indices of image %d", image);
      CHECK(std::equal(out.quantized.begin() + image * 45, out.quantized.begin() + (image + 1) * 45,
                       clean.quantized.begin() + image * 45),
            "values of image %d", image);
    }
  }
  {  // Scratch at the largest published size with the largest codebook: what is kept a code and a
     // token, and no more of the scores than kRowsAtOnce rows' maxima.
    std::vector<std::pair<int, int>> scales;
    for (const int s : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27})
      scales.push_back({s, s});
    QuantizeArgs<float> args = {};
    args.pyramid = make_pyramid(32, 27, 27, scales);
    args.layout = make_layout(131072, {32, 8}, true);
    const size_t bytes = cuda::quantize_workspace_bytes(args);
    CHECK(bytes < size_t{72} << 20, "%zu", bytes);
    std::printf("workspace of preset XL, batch 32, 131,072 codes: %zu bytes\n", bytes);
  }
  {  // Shapes that are not supported launch nothing.
    const Case test = {"", make_pyramid(1, 300, 300, {{1, 1}}), make_layout(4, {1}, true)};
    CHECK(cuda::unsupported_reason(test.pyramid, test.layout) != nullptr, "300 x 300");
    QuantizeArgs<float> args = {};
    args.pyramid = test.pyramid;
    args.layout = test.layout;
    const int64_t launches = emulation::launches();
    CHECK(cuda::launch_quantize(args, nullptr, nullptr) == cudaErrorInvalidValue, "300 x 300");
    CHECK(emulation::launches() == launches, "launched");
    CHECK(cuda::unsupported_reason(make_pyramid(256, 64, 64, {{1, 1}, {64, 64}}),
                                   make_layout(131072, {32, 8}, true)) == nullptr,
          "64 x 64");
  }
  return 0;
}
