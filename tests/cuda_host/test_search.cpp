// nearest_code against the definition in float64: the same index for every row, ties included.
#include "support.h"

using namespace test;
using namespace tokenflow;

namespace {

Indices search(const CodebookLayout& layout, const Floats& codebook, const Floats& rows) {
  NearestCodeArgs<float> args = {};
  args.layout = layout;
  args.codebook = codebook.data();
  args.num_rows = static_cast<int64_t>(rows.size()) / layout.dim;
  args.rows = rows.data();
  Indices indices = poisoned<int64_t>(args.num_rows);
  args.indices = indices.data();
  CHECK(run(args, cuda::nearest_code_workspace_bytes, cuda::launch_nearest_code) == cudaSuccess,
        "launch");
  return indices;
}

// The lowest index of the smallest distance; 0 for a row that is not finite.
Indices definition(const CodebookLayout& layout, const Floats& codebook, const Floats& rows) {
  std::vector<Vector> codes;
  for (int64_t i = 0; i < layout.codes; ++i) {
    codes.push_back(normalized(codebook.data() + i * layout.dim, layout));
  }
  Indices indices;
  for (size_t n = 0; n < rows.size() / layout.dim; ++n) {
    const Vector row = normalized(rows.data() + n * layout.dim, layout);
    double best = std::numeric_limits<double>::infinity();
    int64_t index = 0;
    for (int64_t i = 0; i < layout.codes; ++i) {
      const double d = test::distance(row, codes[i], layout);
      if (d < best) {
        best = d;
        index = i;
      }
    }
    indices.push_back(index);
  }
  return indices;
}

void compare(const char* name, const CodebookLayout& layout, const Floats& codebook,
             const Floats& rows) {
  const Indices wanted = definition(layout, codebook, rows);
  in_every_order([&](const char* order) {
    const Indices got = search(layout, codebook, rows);
    for (size_t n = 0; n < got.size(); ++n) {
      CHECK(got[n] == wanted[n], "%s (%s): row %zu takes %ld, not %ld", name, order, n,
            static_cast<long>(got[n]), static_cast<long>(wanted[n]));
    }
  });
}

void random_case(const char* name, int64_t codes, const std::vector<int>& dims, bool l2_norm,
                 const std::vector<double>& weights, int64_t num_rows, unsigned seed) {
  const CodebookLayout layout = make_layout(codes, dims, l2_norm, weights);
  compare(name, layout, random_floats(codes * layout.dim, seed),
          random_floats(num_rows * layout.dim, seed + 1));
}

}  // namespace

int main() {
  random_case("TokenFlow's groups", 300, {32, 8}, true, {1.0, 1.0}, 131, 1);
  random_case("weights", 257, {5, 3, 2}, true, {1.0, 0.25, 3.0}, 17, 2);
  random_case("no normalisation", 128, {7}, false, {}, 33, 3);
  random_case("one code", 1, {4, 2}, true, {}, 5, 4);
  random_case("more channels than a step", 130, {83, 6}, true, {1.0, 2.0}, 70, 5);
  random_case("a zero weight", 65, {3, 4}, false, {1.0, 0.0}, 9, 6);

  {  // Copies of a code: the lowest index wins, in a tile and between tiles.
    const CodebookLayout layout = make_layout(400, {6, 2}, true);
    Floats codebook = random_floats(400 * 8, 10);
    const Floats rows = random_floats(50 * 8, 11);
    for (const int64_t index : definition(layout, codebook, rows)) {
      for (const int64_t copy : {index / 2, int64_t{399} - index / 3}) {
        std::copy_n(codebook.begin() + index * 8, 8, codebook.begin() + copy * 8);
      }
    }
    compare("copies", layout, codebook, rows);
  }
  {  // A codebook of equal rows, and rows that equal a code.
    const CodebookLayout layout = make_layout(200, {4}, false);
    compare("equal codes", layout, Floats(200 * 4, 0.5f), random_floats(3 * 4, 12));
    const Floats codebook = random_floats(200 * 4, 13);
    compare("rows that are codes", layout, codebook, Floats(codebook.end() - 40, codebook.end()));
  }
  {  // Codes closer together than float32's rounding of a score can tell: float64 must decide.
    const CodebookLayout layout = make_layout(300, {16}, false);
    const Floats offset = random_floats(300 * 16, 14, 1e-4f);
    const Floats centre = random_floats(16, 15, 10.0f);
    Floats codebook(300 * 16), rows(20 * 16);
    for (int i = 0; i < 300 * 16; ++i) codebook[i] = centre[i % 16] + offset[i];
    const Floats shift = random_floats(20 * 16, 16, 1e-4f);
    for (int i = 0; i < 20 * 16; ++i) rows[i] = centre[i % 16] + shift[i];
    compare("codes close together", layout, codebook, rows);
  }
  {  // Rows and codes without a length.
    const CodebookLayout layout = make_layout(140, {3, 2}, true);
    Floats codebook = random_floats(140 * 5, 17), rows = random_floats(6 * 5, 18);
    std::fill_n(codebook.begin() + 30 * 5, 5, 0.0f);
    std::fill_n(rows.begin(), 5, 0.0f);
    std::fill_n(rows.begin() + 5, 3, 0.0f);
    std::fill_n(rows.begin() + 10, 5, 1e-20f);
    compare("zero rows", layout, codebook, rows);
  }
  {  // Values that are not finite take index 0 and disturb no neighbour.
    const CodebookLayout layout = make_layout(150, {5}, true);
    const Floats codebook = random_floats(150 * 5, 19);
    Floats rows = random_floats(9 * 5, 20);
    rows[2] = std::numeric_limits<float>::quiet_NaN();
    rows[4 * 5 + 4] = std::numeric_limits<float>::infinity();
    rows[8 * 5] = -std::numeric_limits<float>::infinity();
    compare("rows that are not finite", layout, codebook, rows);
  }
  {  // Scores beyond float32.
    const CodebookLayout layout = make_layout(131, {4}, false);
    compare("large values", layout, random_floats(131 * 4, 21, 1e25f),
            random_floats(5 * 4, 22, 1e25f));
  }
  {  // A codebook with values that are not finite: the index is in range and no such code is taken.
    const CodebookLayout layout = make_layout(129, {4}, true);
    Floats codebook = random_floats(129 * 4, 23);
    codebook[7 * 4 + 1] = std::numeric_limits<float>::quiet_NaN();
    codebook[128 * 4] = -std::numeric_limits<float>::quiet_NaN();
    codebook[50 * 4] = std::numeric_limits<float>::infinity();
    for (const int64_t index : search(layout, codebook, random_floats(20 * 4, 24))) {
      CHECK(index >= 0 && index < 129 && index != 7 && index != 128 && index != 50, "%ld",
            static_cast<long>(index));
    }
  }
  {  // More rows than are held at once.
    const CodebookLayout layout = make_layout(3, {2}, false);
    const Floats codebook = random_floats(6, 25), rows = random_floats(8200 * 2, 26);
    const Indices wanted = definition(layout, codebook, rows);
    CHECK(search(layout, codebook, rows) == wanted, "more rows than are held at once");
  }
  {  // The scratch does not grow with rows x codes.
    NearestCodeArgs<float> args = {};
    args.layout = make_layout(131072, {32, 8}, true);
    args.num_rows = 8192;
    const size_t bytes = cuda::nearest_code_workspace_bytes(args);
    args.num_rows = int64_t{1} << 24;
    CHECK(cuda::nearest_code_workspace_bytes(args) == bytes, "%zu", bytes);
    CHECK(bytes < size_t{64} << 20, "%zu", bytes);
    args.num_rows = 0;
    CHECK(cuda::launch_nearest_code(args, nullptr, nullptr) == cudaSuccess, "no rows");
    args.num_rows = -1;
    CHECK(cuda::launch_nearest_code(args, nullptr, nullptr) == cudaErrorInvalidValue, "-1 rows");
  }
  return 0;
}
