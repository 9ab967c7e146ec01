// Drawing codes on CUDA against the CPU: the same codes for the same seed. What the CPU draws is
// held against float64's probabilities in tests/quantizer.
#include "cpu/sample_code.h"
#include "cuda/sample_code.h"
#include "support.h"

using namespace test;
using namespace tokenflow;

namespace {

struct Case {
  CodebookLayout layout;
  Floats codebook, rows;
  Metric metric;
  double temperature;
  Indices seeds = {7}, offsets = {0};  // one for all rows, or one for each

  SampleCodeArgs<float> args(Indices* indices) const {
    const int64_t num_rows = static_cast<int64_t>(rows.size()) / layout.dim;
    *indices = poisoned<int64_t>(num_rows);
    const auto argument = [](const Indices& values) {
      return RowArgument<int64_t>{values.data(), values.size() > 1 ? 1 : 0, 0};
    };
    return {layout,      codebook.data(), num_rows,          rows.data(),
            temperature, argument(seeds), argument(offsets), indices->data()};
  }
};

Indices on_cpu(const Case& draw) {
  Indices indices;
  cpu::sample_code(draw.args(&indices), cpu::Executor{1, nullptr});
  return indices;
}

Indices on_cuda(const Case& draw) {
  Indices indices;
  const SampleCodeArgs<float> args = draw.args(&indices);
  CHECK(run(args, cuda::sample_code_workspace_bytes, cuda::launch_sample_code) == cudaSuccess,
        "launch");
  return indices;
}

void compare(const char* name, const Case& draw) {
  const Indices wanted = on_cpu(draw);
  in_every_order(
      [&](const char* order) { CHECK(on_cuda(draw) == wanted, "%s (%s)", name, order); });
}

}  // namespace

int main() {
  for (const Metric metric : {Metric::kL2, Metric::kSquaredL2, Metric::kDot}) {
    for (const double temperature : {0.0, 0.05, 1.0, 1e300}) {
      for (const bool l2_norm : {true, false}) {
        compare("groups",
                {make_layout(700, {5, 3}, l2_norm, {1.0, 0.25}), random_floats(700 * 8, 1),
                 random_floats(9 * 8, 2), metric, temperature});
        compare("few codes", {make_layout(5, {3}, l2_norm), random_floats(5 * 3, 3),
                              random_floats(11 * 3, 4), metric, temperature});
        compare("one code", {make_layout(1, {2}, l2_norm), random_floats(2, 5),
                             random_floats(3 * 2, 6), metric, temperature});
        for (const float size : {1e-30f, 1e-20f, 1e20f, 1e30f}) {
          compare("any magnitude", {make_layout(130, {4}, l2_norm), random_floats(130 * 4, 7, size),
                                    random_floats(5 * 4, 8, size), metric, temperature});
        }
      }
    }
  }
  {  // Seeds and offsets, for all rows and for each.
    const CodebookLayout layout = make_layout(300, {6}, true);
    Case draw = {layout, random_floats(300 * 6, 9), random_floats(6, 10), Metric::kDot, 1.0};
    for (int i = 0; i < 40 * 6 - 6; ++i) draw.rows.push_back(draw.rows[i % 6]);
    const Indices one = on_cuda(draw);
    CHECK(one == on_cpu(draw), "one seed");
    draw.offsets = {17};
    const Indices later = on_cuda(draw);
    CHECK(std::equal(later.begin(), later.end() - 17, one.begin() + 17),
          "row r draws at offset + r");
    Indices reversed(one.rbegin(), one.rend());
    draw.offsets.clear();
    for (int64_t r = 40; r-- > 0;) draw.offsets.push_back(r);
    CHECK(on_cuda(draw) == reversed, "an offset for each row");
    draw.seeds.assign(40, 7);
    CHECK(on_cuda(draw) == reversed, "seeds and offsets for each row");
    draw.offsets = {3};
    CHECK(on_cuda(draw) == Indices(40, one[3]), "a seed for each row, one offset");
    draw.seeds.front() = 8;
    CHECK(on_cuda(draw) == on_cpu(draw), "seeds that differ");
  }
  {  // Rows that are not finite take index 0; more rows than are held at once.
    Case draw = {make_layout(9, {2}, false), random_floats(9 * 2, 11), random_floats(8200 * 2, 12),
                 Metric::kDot, 0.5};
    draw.rows[4] = std::numeric_limits<float>::infinity();
    draw.rows[8] = -std::numeric_limits<float>::infinity();
    draw.rows[12] = std::numeric_limits<float>::quiet_NaN();
    const Indices got = on_cuda(draw);
    CHECK(got == on_cpu(draw), "many rows");
    CHECK(got[2] == 0 && got[4] == 0 && got[6] == 0, "rows that are not finite");
  }
  return 0;
}
