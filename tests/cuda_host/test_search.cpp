// nearest_code against the definition in float64: the same index for every row, ties included. And
// the proof behind it: no coarse score is further from the exact one than the bound.
#include <algorithm>
#include <set>

#include "cuda/search.cuh"
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

// Whether coarse scores are made by the kernel for compute capability 9.0, where it serves.
bool with_warpgroups = false;
constexpr const char* kSearch = "TOKENFLOW_CUDA_SEARCH";

void use_warpgroups(bool use) {
  with_warpgroups = use;
  max_shared_bytes_per_block = use ? kMostSharedBytes : kLeastSharedBytes;
  CHECK((use ? setenv(kSearch, "wgmma", 1) : unsetenv(kSearch)) == 0, "setenv");
}

// What cannot be had is an error, and codebooks too wide for warpgroups take the other kernel.
void check_choice() {
  const CodebookLayout narrow = make_layout(300, {8}, true), wide = make_layout(300, {90}, true);
  cuda::FragmentOrder order;
  const auto choose = [&](const char* wanted, const CodebookLayout& layout) {
    CHECK(setenv(kSearch, wanted, 1) == 0, "setenv");
    order = cuda::FragmentOrder::kByWord;
    return cuda::choose_order(layout, &order);
  };
  for (const char* wanted : {"", "mma"}) {
    CHECK(choose(wanted, narrow) == cudaSuccess && order == cuda::FragmentOrder::kByLane, "%s",
          wanted);
  }
  CHECK(choose("WGMMA", narrow) == cudaErrorInvalidValue, "a word that is none of the two");
  max_shared_bytes_per_block = kMostSharedBytes;
  CHECK(choose("wgmma", narrow) == cudaSuccess && order == cuda::FragmentOrder::kByWord, "wgmma");
  CHECK(choose("wgmma", wide) == cudaSuccess && order == cuda::FragmentOrder::kByLane, "too wide");
  max_threads_per_block = 32;
  CHECK(choose("wgmma", narrow) == cudaErrorNotSupported, "not compiled");
  NearestCodeArgs<float> args = {};
  const Floats values = random_floats(300 * 8, 1);
  Indices index = {-7};
  args.layout = narrow;
  args.codebook = args.rows = values.data();
  args.num_rows = 1;
  args.indices = index.data();
  CHECK(run(args, cuda::nearest_code_workspace_bytes, cuda::launch_nearest_code) ==
                cudaErrorNotSupported &&
            index[0] == -7,
        "a search that is not to be had");
  max_threads_per_block = 1024;
  max_shared_bytes_per_block = 64 * 1024;
  CHECK(choose("wgmma", make_layout(300, {40}, true)) == cudaErrorNotSupported,
        "too little memory");
  use_warpgroups(false);
}

// The stages of a search on their own.
struct Stages {
  CodebookLayout layout;
  int64_t num_rows;
  std::vector<std::unique_ptr<unsigned char, decltype(&std::free)>> memory;
  cuda::PackedCodes codes;
  cuda::PackedRows rows;
  cuda::ScoreRecord* records;
  int64_t num_records, record_codes;
  int64_t work, refine_work;  // warp operations, of all stages and of the last
  Indices indices;

  // Scores and refines as for a device of so many multiprocessors, or with so many tiles of codes
  // (1, 2 or a multiple of 4) a block.
  Stages(const CodebookLayout& layout, const Floats& codebook, const Floats& row_values,
         int multiprocessors, int tiles_per_block = 0)
      : layout(layout), num_rows(static_cast<int64_t>(row_values.size()) / layout.dim) {
    take([&](cuda::Workspace& memory) { codes = cuda::take_packed_codes(memory, layout); });
    CHECK(cuda::choose_order(layout, &codes.order) == cudaSuccess, "order");
    CHECK((codes.order == cuda::FragmentOrder::kByWord) ==
              (with_warpgroups && cuda::operand_steps(layout.dim) <= cuda::kMostSteps),
          "%d channels are scored by the other kernel", layout.dim);
    take([&](cuda::Workspace& memory) {
      rows = cuda::take_packed_rows(memory, layout, num_rows, codes);
    });
    take([&](cuda::Workspace& memory) { records = cuda::take_records(memory, layout, num_rows); });
    work = -emulation::warp_operations();
    CHECK(cuda::launch_pack(layout, codebook.data(), codes, row_values.data(),
                            {num_rows, 0, num_rows, 1}, num_rows, rows, nullptr) == cudaSuccess,
          "pack");
    indices = poisoned<int64_t>(num_rows);
    cuda::SearchArgs args = {};
    args.layout = layout;
    args.codebook = codebook.data();
    args.codes = codes;
    args.rows = row_values.data();
    args.packed = rows;
    args.map = {num_rows, 0, num_rows, 1};
    args.num_rows = num_rows;
    args.records = records;
    args.indices = indices.data();
    args.multiprocessors = multiprocessors;
    cuda::ScoreRuns runs(args, num_rows);
    if (tiles_per_block != 0) {
      runs.tiles_per_block = tiles_per_block;
      runs.record_tiles = std::min(tiles_per_block, 4);
      runs.num_records = cuda::ceil_div(layout.codes, 128 * runs.record_tiles);
    }
    num_records = runs.num_records;
    record_codes = int64_t{runs.record_tiles} * 128;
    CHECK(cuda::launch_coarse_score(args, 0, num_rows, runs, nullptr) == cudaSuccess, "scores");
    refine_work = -emulation::warp_operations();
    CHECK(cuda::launch_refine(args, 0, num_rows, runs, nullptr) == cudaSuccess, "refine");
    refine_work += emulation::warp_operations();
    work += emulation::warp_operations();
  }

  // Memory of its own for each, so that its end is guarded.
  template <typename Take>
  void take(const Take& take_from) {
    cuda::Workspace sizes(nullptr);
    take_from(sizes);
    void* begin = nullptr;
    if (posix_memalign(&begin, 256, sizes.bytes()) != 0) std::abort();
    std::memset(begin, 0xff, sizes.bytes());
    memory.emplace_back(static_cast<unsigned char*>(begin), &std::free);
    cuda::Workspace workspace(begin);
    take_from(workspace);
  }

  int columns() const { return 16 * cuda::operand_steps(layout.dim); }

  double bound(int64_t n) const {
    return static_cast<double>(
        coarse_error_bound(columns(), rows.bounds[n], codes.summary->bounds));
  }

  // Column k of packed vector n, found the way the head comment of pack.cuh tells it.
  float packed(const uint4* fragments, bool of_rows, int64_t n, int k) const {
    const int64_t fragment = (n / 128 * (columns() / 16) + k / 16) * 8 + n % 128 / 16;
    const int lane = static_cast<int>(n % 8) * 4 + k % 8 / 2;
    const int upper = static_cast<int>(n / 8 % 2), further = k / 8 % 2;
    const int word = of_rows ? 2 * further + upper : 2 * upper + further;
    const bool by_word = !of_rows && codes.order == cuda::FragmentOrder::kByWord;
    uint16_t half;
    std::memcpy(&half,
                reinterpret_cast<const unsigned char*>(fragments + fragment * 32) +
                    (by_word ? word * 32 + lane : lane * 4 + word) * 4 + k % 2 * 2,
                sizeof(half));
    return cuda::from_half(half);
  }
};

// A product of halves added to a float32, with what does not fit cut off.
float add_cut(float sum, float a, float b) {
  const double exact = static_cast<double>(sum) + static_cast<double>(a) * static_cast<double>(b);
  const float nearest = static_cast<float>(exact);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(exact) ? std::nextafter(nearest, 0.0f)
                                                                    : nearest;
}

// Holds packed scores and records to the bound, whichever way they are summed. Returns the
// largest bound as a share of the row's length times the longest code's, and stores how much of the
// bound was needed.
double check_bound(const char* name, const CodebookLayout& layout, const Floats& codebook,
                   const Floats& row_values, double* needed = nullptr, int tiles_per_block = 0) {
  const Stages stages(layout, codebook, row_values, 4, tiles_per_block);
  const CodebookRange range = stages.codes.summary->range;
  const bool has_centre = stages.codes.summary->has_centre != 0;
  const Vector centre = has_centre ? Vector(stages.codes.centre, stages.codes.centre + layout.dim)
                                   : Vector(layout.dim);
  const auto weighted = [&](const float* values) {
    Vector vector = normalized(values, layout);
    for (int g = 0; g < layout.groups; ++g) {
      for (int d = layout.begin[g]; d < layout.begin[g + 1]; ++d) {
        vector[d] *= std::sqrt(layout.weight[g]);
      }
    }
    return vector;
  };
  const auto dot = [](const Vector& a, const Vector& b) {
    long double sum = 0;
    for (size_t d = 0; d < a.size(); ++d) sum += static_cast<long double>(a[d]) * b[d];
    return sum;
  };
  std::vector<Vector> codes;
  std::vector<long double> biases;
  const int columns = stages.columns();
  std::vector<Floats> packed_codes;
  for (int64_t i = 0; i < layout.codes; ++i) {
    codes.push_back(weighted(codebook.data() + i * layout.dim));
    long double bias = -0.5L * dot(codes.back(), codes.back());
    for (int g = 0; layout.l2_norm && g < layout.groups; ++g) bias += 0.5L * layout.weight[g];
    if (layout.metric == Metric::kDot) bias = 0;
    if (has_centre) bias -= stages.codes.summary->centre_bias;
    biases.push_back(bias);
    packed_codes.emplace_back();
    for (int k = 0; k < columns; ++k) {
      packed_codes.back().push_back(stages.packed(stages.codes.fragments, false, i, k));
    }
  }
  double share = 0, most = 0;
  for (int64_t n = 0; n < stages.num_rows; ++n) {
    const Vector row = weighted(row_values.data() + n * layout.dim);
    Vector centred = row;
    for (int d = 0; d < layout.dim; ++d) centred[d] -= centre[d];
    const RowExponents exponents =
        row_exponents(std::sqrt(static_cast<double>(dot(centred, centred))), range);
    const long double unit = std::ldexp(1.0L, exponents.length + code_exponents(range).length);
    Floats packed;
    for (int k = 0; k < columns; ++k) {
      packed.push_back(stages.packed(stages.rows.fragments, true, n, k));
    }
    const double bound = stages.bound(n);
    std::vector<long double> scores;
    for (int64_t i = 0; i < layout.codes; ++i) {
      if (stages.codes.fate[i] != cuda::kCoarseScore) {
        scores.push_back(-INFINITY);
        continue;
      }
      const long double exact = unit * (dot(row, codes[i]) - dot(row, centre) + biases[i]);
      scores.push_back(exact);
      float up = 0, down = 0;
      for (int k = 0; k < columns; ++k) up = add_cut(up, packed[k], packed_codes[i][k]);
      for (int k = columns; k-- > 0;) down += packed[k] * packed_codes[i][k];
      for (const float score : {up, down}) {
        const double error = static_cast<double>(std::fabs(score - exact));
        CHECK(error <= bound, "%s: row %ld, code %ld: %g is more than the bound %g", name,
              static_cast<long>(n), static_cast<long>(i), error, bound);
        most = std::max(most, error / bound);
      }
    }
    for (int64_t r = 0; r < stages.num_records; ++r) {
      const cuda::ScoreRecord got = stages.records[n * stages.num_records + r];
      const int tag = cuda::tag_of(got.best);
      std::set<int64_t> group;
      for (int i = 0; i < 4; ++i) group.insert(r * stages.record_codes + cuda::group_code(tag, i));
      long double best = -INFINITY, others = -INFINITY;
      for (int64_t i = r * stages.record_codes;
           i < std::min(layout.codes, (r + 1) * stages.record_codes); ++i) {
        long double& most = group.count(i) ? best : others;
        most = std::max(most, scores[i]);
      }
      CHECK(std::isfinite(static_cast<double>(best))
                ? std::fabs(got.best - best) <= bound && others <= got.best + bound
                : got.best < -0x1p29f,
            "%s: row %ld, record %ld: %g, not %g", name, static_cast<long>(n), static_cast<long>(r),
            static_cast<double>(got.best), static_cast<double>(best));
      CHECK(std::isfinite(static_cast<double>(others)) ? std::fabs(got.runner_up - others) <= bound
                                                       : got.runner_up < -0x1p29f,
            "%s: row %ld, record %ld: the others have %g, not %g", name, static_cast<long>(n),
            static_cast<long>(r), static_cast<double>(got.runner_up), static_cast<double>(others));
    }
    const long double lengths = unit * std::sqrt(dot(row, row)) * range.length;
    if (lengths > 0) share = std::max(share, static_cast<double>(bound / lengths));
  }
  if (needed) *needed = most;
  return share;
}

// Multiplies row i of `values` [rows, dim] by 10^x with x spread evenly over [low, high].
void spread_lengths(Floats* values, int dim, double low, double high) {
  const int64_t rows = static_cast<int64_t>(values->size()) / dim;
  for (int64_t i = 0; i < rows; ++i) {
    // 7 has no factor in common with the numbers of rows used here.
    const double x = low + (high - low) * static_cast<double>(i * 7 % rows) / (rows - 1);
    for (int d = 0; d < dim; ++d) {
      float& value = (*values)[i * dim + d];
      value = static_cast<float>(value * std::pow(10.0, x));
    }
  }
}

void random_case(const char* name, int64_t codes, const std::vector<int>& dims, bool l2_norm,
                 const std::vector<double>& weights, int64_t num_rows, unsigned seed) {
  CodebookLayout layout = make_layout(codes, dims, l2_norm, weights);
  const Floats codebook = random_floats(codes * layout.dim, seed);
  const Floats rows = random_floats(num_rows * layout.dim, seed + 1);
  compare(name, layout, codebook, rows);
  layout.metric = Metric::kDot;
  compare((std::string(name) + ", inner product").c_str(), layout, codebook, rows);
}

// Codebooks in which many codes come near to every row take at most twice the work of any other.
void check_crowds() {
  constexpr int kDim = 40, kCodes = 1200, kRows = 48;
  const Floats gaussian = random_floats(kCodes * kDim, 600),
               rows = random_floats(kRows * kDim, 601);
  struct Case {
    std::string name;
    Floats codes, rows;
  };
  std::vector<Case> cases = {{"ordinary", gaussian, rows}};
  const auto add = [&](const char* name) -> Case& {
    cases.push_back({name, gaussian, rows});
    return cases.back();
  };
  const auto scale = [](Floats& values, int64_t i, float factor) {
    for (int d = 0; d < kDim; ++d) values[i * kDim + d] *= factor;
  };
  Floats& equal = add("equal codes").codes;
  for (size_t i = kDim; i < equal.size(); ++i) equal[i] = equal[i % kDim];
  // Without the centre, codes and rows are nothing but float64's rounding.
  Case& alike = add("equal codes, rows of their direction");
  for (size_t i = 0; i < alike.codes.size(); ++i) alike.codes[i] = gaussian[i % kDim];
  for (size_t i = 0; i < alike.rows.size(); ++i) {
    alike.rows[i] = std::ldexp(gaussian[i % kDim], static_cast<int>(i / kDim % 5));
  }
  Floats& nearly = add("nearly all equal").codes;
  for (size_t i = 0; i < nearly.size(); ++i) {
    if (i / kDim % 97 != 5) nearly[i] = nearly[i % kDim];
  }
  Floats& pairs = add("every code twice").codes;
  std::copy_n(pairs.begin(), pairs.size() / 2, pairs.begin() + kCodes / 2 * kDim);
  Floats& zeros = add("codes of zeros").codes;
  for (size_t i = kDim * 10; i < zeros.size(); ++i) zeros[i] = i % 2 ? 0.0f : -0.0f;
  Floats& undefined = add("half of the codes not numbers").codes;
  for (int64_t i = 0; i < kCodes; i += 2) {
    undefined[i * kDim + i % kDim] = std::numeric_limits<float>::quiet_NaN();
  }
  Floats& zero_rows = add("rows of zeros").rows;
  std::fill(zero_rows.begin(), zero_rows.begin() + kRows / 2 * kDim, 0.0f);
  for (const float factor : {100.0f, 1e6f, 1e15f}) scale(add("a giant").codes, 700, factor);
  Floats& giants = add("many giants").codes;
  for (int i = 0; i < 30; ++i) scale(giants, 40 * i + i, i % 2 ? 1e4f : 1e2f);
  const Floats centre = random_floats(kDim, 602);
  for (const float spread : {1e-1f, 1e-2f, 1e-3f, 1e-4f}) {
    for (const bool of_rows : {false, true}) {
      Case& one = add(of_rows ? "rows and codes close together" : "codes close together");
      for (size_t i = 0; i < one.codes.size(); ++i) {
        one.codes[i] = centre[i % kDim] + spread * one.codes[i];
      }
      for (size_t i = 0; i < one.rows.size() && of_rows; ++i) {
        one.rows[i] = centre[i % kDim] + spread * one.rows[i];
      }
    }
  }
  for (const Metric metric : {Metric::kSquaredL2, Metric::kDot}) {
    for (const bool l2_norm : {true, false}) {
      CodebookLayout layout = make_layout(kCodes, {32, 8}, l2_norm, {1.0, 0.5});
      layout.metric = metric;
      double work = 0, refine_work = 0;
      for (const Case& one : cases) {
        const std::string name = one.name + (l2_norm ? ", unit groups" : "") +
                                 (metric == Metric::kDot ? ", inner product" : "");
        const Stages stages(layout, one.codes, one.rows, 4);
        if (work == 0) {
          work = static_cast<double>(stages.work);
          refine_work = static_cast<double>(stages.refine_work);
        }
        const double all = static_cast<double>(stages.work) / work;
        const double refine = static_cast<double>(stages.refine_work) / refine_work;
        CHECK(all <= 1.5 && refine <= 2.5, "%s: %.2f times the usual work, refine %.2f times",
              name.c_str(), all, refine);
        for (int n = 0; n < kRows; ++n) {
          const int64_t wanted = nearest_by_distance(one.rows.data() + n * kDim, one.codes, layout);
          CHECK(stages.indices[n] == wanted, "%s: row %d takes %ld, not %ld", name.c_str(), n,
                static_cast<long>(stages.indices[n]), static_cast<long>(wanted));
        }
        CodebookLayout some = layout;
        some.codes = 300;
        if (one.name == "half of the codes not numbers") continue;
        check_bound(name.c_str(), some, Floats(one.codes.begin(), one.codes.begin() + 300 * kDim),
                    Floats(one.rows.begin(), one.rows.begin() + 10 * kDim));
      }
    }
  }
}

// By the inner product: codes of any length, equal ones, and rows and codes of zeros.
void check_inner_product() {
  CodebookLayout layout = make_layout(300, {20, 4}, false, {1.0, 0.5});
  layout.metric = Metric::kDot;
  Floats codebook = random_floats(300 * 24, 500), rows = random_floats(40 * 24, 501);
  spread_lengths(&codebook, 24, -2, 2);
  spread_lengths(&rows, 24, -9, 9);
  for (int64_t i = 0; i < 300; i += 3) {  // the longest codes, which win, three times
    std::copy_n(codebook.begin() + (i % 90) * 24, 24, codebook.begin() + (299 - i) * 24);
  }
  std::fill_n(codebook.begin() + 7 * 24, 24, 0.0f);
  std::fill_n(rows.begin() + 3 * 24, 24, 0.0f);
  rows[5 * 24 + 2] = std::numeric_limits<float>::infinity();
  compare("inner product", layout, codebook, rows);
  const Indices got = search(layout, codebook, rows);
  CHECK(got[3] == 0 && got[5] == 0,
        "a row of zeros, to which all codes are alike, takes the first");
  // Codes that point away from every row but one of zeros.
  for (float& value : rows) value = std::fabs(value);
  for (float& value : codebook) value = -std::fabs(value);
  rows[5 * 24 + 2] = 1;
  compare("inner product, negative", layout, codebook, rows);
}

// Shapes, near ties and the bound, for whichever kernel makes the coarse scores.
void check_kernels() {
  // Every number of steps that a kernel is made for, with few rows and with many, and the general
  // one; channels and bias fill the last step, or spill into one more.
  for (const int dim : {1, 13, 14, 16, 29, 32, 45, 48, 61, 62, 77, 78, 109, 200}) {
    const bool many = dim % 16 == 13;
    const std::string name = std::to_string(dim) + " channels";
    random_case(name.c_str(), 150, {dim}, many, {}, many ? 131 : 19,
                static_cast<unsigned>(100 + dim));
  }
  random_case("several blocks of rows", 130, {10, 6}, true, {}, 517, 40);
  random_case("several blocks of rows, general", 130, {70, 20}, true, {0.5, 1.0}, 140, 42);

  // Blocks that score one tile after another: stages of shared memory are used again.
  for (const int dim : {5, 40, 90}) {
    const CodebookLayout layout = make_layout(1200, {dim}, true);
    const Floats codebook = random_floats(1200 * dim, 44), rows = random_floats(70 * dim, 45);
    const Indices wanted = definition(layout, codebook, rows);
    for (const int multiprocessors : {1, 3, 20}) {
      in_every_order([&](const char* order) {
        CHECK(Stages(layout, codebook, rows, multiprocessors).indices == wanted, "%d channels (%s)",
              dim, order);
      });
    }
  }

  {  // Two codes as near to a row as each other, or nearly so, in one group of a record, in two
     // groups of one, and in two records of any length: what decides goes from half precision to
     // float64, and to the index where the distances are equal.
    for (const bool l2_norm : {false, true}) {
      const CodebookLayout layout = make_layout(1200, {32, 8}, l2_norm, {1.0, 0.5});
      constexpr int kDim = 40, kRows = 45;
      Floats codebook = random_floats(1200 * kDim, 80), rows = random_floats(kRows * kDim, 81);
      // Whole multiples of 2^-8, so that steps of 2^-14 to either side are exact.
      for (float& value : rows) value = std::round(value * 256) / 256;
      const std::vector<std::pair<int, int>> apart{{0, 1},   {1, 8},   {0, 2},
                                                   {5, 100}, {3, 200}, {40, 700}};
      for (int n = 0; n < kRows; ++n) {
        const auto [one, other] = apart[static_cast<size_t>(n) % apart.size()];
        const int first = n * 23 % 480 / 16 * 16;
        // Equal distances, and differences of one bit, 1e-7, 1e-5, 1e-4 and 1e-3 of one step.
        const float difference =
            std::vector<float>{0, 0x1p-23f, 1e-7f, 1e-5f, 1e-4f, 1e-3f}[n / 6 % 6];
        for (int d = 0; d < kDim; ++d) {
          const float step = (d * 7 + n) % 3 == 0 ? 0x1p-14f : -0x1p-14f,
                      value = rows[n * kDim + d];
          codebook[(first + one) * kDim + d] = value + step;
          codebook[(first + other) * kDim + d] =
              n % 2 == 0 ? value - step : value + step;  // mirrored, or the same
        }
        codebook[(first + (n % 4 < 2 ? one : other)) * kDim + n % kDim] *= 1 + difference;
      }
      std::fill_n(rows.end() - kDim, kDim, 0.0f);  // as far from all codes of unit length
      Indices wanted;
      for (int n = 0; n < kRows; ++n) {
        wanted.push_back(nearest_by_distance(rows.data() + n * kDim, codebook, layout));
      }
      for (const int tiles_per_block : {1, 2, 4, 8}) {
        in_every_order([&](const char* order) {
          CHECK(Stages(layout, codebook, rows, 1, tiles_per_block).indices == wanted,
                "near ties, %d tiles (%s)", tiles_per_block, order);
        });
        check_bound("near ties", layout, codebook, rows, nullptr, tiles_per_block);
      }
    }
  }
  {  // The bound for what is searched every day: small enough that few rows need float64, with or
     // without codes of no length, and not far from what is needed.
    const CodebookLayout layout = make_layout(300, {32, 8}, true);
    Floats codebook = random_floats(300 * 40, 60);
    const Floats rows = random_floats(150 * 40, 61);
    double needed = 0;
    const double share = check_bound("TokenFlow's groups", layout, codebook, rows, &needed);
    CHECK(share < 6.5e-4 && needed > 0.2, "bound %g, %g of it needed", share, needed);
    std::fill_n(codebook.begin() + 30 * 40, 40, 0.0f);
    std::fill_n(codebook.begin() + 77 * 40, 32, 0.0f);
    CHECK(check_bound("codes of no length", layout, codebook, rows) < 1.1 * share, "no length");
    compare("codes of no length", layout, codebook, rows);
    check_bound("without normalisation", make_layout(300, {40}, false), codebook, rows, &needed);
    CHECK(needed > 0.2, "%g of the bound needed", needed);
  }
}

// Runs of tiles for which every place in shared memory is used three times, by blocks whose warps
// all have rows, or some, or of which all but one have none; and the last product alone counts.
void check_long_runs() {
  for (const auto& [dim, num_rows] : std::vector<std::pair<int, int>>{
           {13, 1}, {40, 1}, {40, 64}, {40, 100}, {40, 400}, {77, 150}}) {
    const CodebookLayout layout = make_layout(2200, {dim}, false);
    const Floats codebook = random_floats(2200 * dim, 46), rows = random_floats(num_rows * dim, 47);
    const Indices wanted = definition(layout, codebook, rows);
    in_every_order([&](const char* order) {
      CHECK(Stages(layout, codebook, rows, 1, 20).indices == wanted, "%d channels, %d rows (%s)",
            dim, num_rows, order);
    });
  }
}

}  // namespace

int main() {
  check_inner_product();
  check_crowds();
  random_case("TokenFlow's groups", 300, {32, 8}, true, {1.0, 1.0}, 131, 1);
  random_case("weights", 257, {5, 3, 2}, true, {1.0, 0.25, 3.0}, 17, 2);
  random_case("no normalisation", 128, {7}, false, {}, 33, 3);
  random_case("one code", 1, {4, 2}, true, {}, 5, 4);
  random_case("more channels than a step", 130, {83, 6}, true, {1.0, 2.0}, 70, 5);
  random_case("a zero weight", 65, {3, 4}, false, {1.0, 0.0}, 9, 6);

  check_kernels();
  check_choice();
  use_warpgroups(true);
  check_kernels();
  check_long_runs();
  use_warpgroups(false);
  {  // Codes in bunches that half precision cannot tell apart, and rows in the midst of them.
    const CodebookLayout layout = make_layout(300, {32, 8}, true);
    const Floats centres = random_floats(20 * 40, 50);
    Floats codebook = random_floats(300 * 40, 51, 1e-4f), rows = random_floats(40 * 40, 52, 1e-4f);
    for (int i = 0; i < 300 * 40; ++i) codebook[i] += centres[i / 40 % 20 * 40 + i % 40];
    for (int i = 0; i < 40 * 40; ++i) rows[i] += centres[i / 40 % 20 * 40 + i % 40];
    compare("bunches", layout, codebook, rows);
    check_bound("bunches", layout, codebook, rows);
  }
  {  // Lengths from 1e-6 to 1e6 against codes from 1e-3 to 1e3.
    const CodebookLayout layout = make_layout(257, {6, 4}, false, {1.0, 0.3});
    Floats codebook = random_floats(257 * 10, 53), rows = random_floats(41 * 10, 54);
    spread_lengths(&codebook, 10, -3, 3);
    spread_lengths(&rows, 10, -6, 6);
    compare("lengths far apart", layout, codebook, rows);
    check_bound("lengths far apart", layout, codebook, rows);
    // Rows much longer or shorter. One group, so that float64 rounds here and there alike.
    const CodebookLayout joint = make_layout(257, {10}, false);
    for (const float scale : {1e-15f, 1e-30f, 1e15f, 1e30f}) {
      Floats scaled(codebook);
      for (float& value : scaled) value *= scale;
      CHECK(search(joint, scaled, rows) == definition(joint, scaled, rows), "%g", double{scale});
      check_bound("other lengths", joint, scaled, rows);
    }
  }
  {  // Rows so long that float64 rounds the differences between codes: it still decides.
    const CodebookLayout layout = make_layout(140, {5}, false);
    const Floats codebook = random_floats(140 * 5, 55, 1e-7f),
                 rows = random_floats(20 * 5, 56, 1e4f);
    compare("long rows", layout, codebook, rows);
  }
  {  // Every score is far below zero, also that of codes that are not there.
    const CodebookLayout layout = make_layout(130, {6}, false);
    Floats codebook = random_floats(130 * 6, 57), rows = random_floats(20 * 6, 58);
    for (int i = 0; i < 130 * 6; ++i) codebook[i] += 10;
    for (int i = 0; i < 20 * 6; ++i) rows[i] = (rows[i] - 20) * (i < 60 ? 1.0f : 1e6f);
    compare("scores below zero", layout, codebook, rows);
    check_bound("scores below zero", layout, codebook, rows);
  }
  {  // Vectors that half precision holds exactly: what is left of the bound is for summing.
    const CodebookLayout layout = make_layout(40, {300}, false);
    std::mt19937 random(62);
    Floats codebook(40 * 300), rows(20 * 300);
    for (Floats* values : {&codebook, &rows}) {
      for (float& value : *values) {
        value = static_cast<float>(static_cast<int>(random() % 4095) - 2047) / 2048;
        if (random() % 4 == 0) value /= 256;
      }
    }
    double needed = 0;
    check_bound("exact in half precision", layout, codebook, rows, &needed);
    CHECK(needed > 0, "%g of the bound needed", needed);
  }
  {  // Only the row is rounded, or only the codes, and all in the direction of the sum.
    const CodebookLayout layout = make_layout(3, {40}, false);
    Floats round(3 * 40, 1.0f), between(3 * 40, 1.0f + 0.99f / 2048);
    for (Floats* values : {&round, &between}) {  // all different, around zero
      for (int d = 0; d < 40; ++d) {
        (*values)[40 + d] *= -1;
        (*values)[80 + d] = 0;
      }
    }
    double needed = 0;
    check_bound("rounded rows", layout, round, between, &needed);
    CHECK(needed > 0.5, "%g of the bound needed", needed);
    check_bound("rounded codes", layout, between, round, &needed);
    CHECK(needed > 0.5, "%g of the bound needed", needed);
  }

  {  // Rounding the row takes one code's score down and the other's up, each by nearly the bound:
     // what seems the better by 1.8 of it is the worse.
    const CodebookLayout layout = make_layout(2, {39}, false);
    const float error = 0.98f / 4096;
    Floats row(39, 1.0f), codebook(2 * 39, 0.0f);
    codebook[0] = cuda::from_half(cuda::to_half(1.8f * 38 * error));
    for (int d = 1; d < 39; ++d) {
      const float sign = d % 2 ? 1.0f : -1.0f;
      row[d] += sign * error;  // rounded to 1
      codebook[d] = -sign;
      codebook[39 + d] = sign;
    }
    CHECK(definition(layout, codebook, row) == Indices{1}, "the second code is nearer");
    compare("rounding against the best", layout, codebook, row);
  }

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
    compare("rows that are not finite nor normalised", make_layout(150, {5}, false), codebook,
            rows);
  }
  {  // Scores beyond float32.
    const CodebookLayout layout = make_layout(131, {4}, false);
    compare("large values", layout, random_floats(131 * 4, 21, 1e25f),
            random_floats(5 * 4, 22, 1e25f));
  }
  // From float32's smallest numbers to its largest. One group without a weight, so that float64
  // rounds here and there alike. For the bound one with a weight, which takes unit lengths away
  // from a power of two, where one rounding decides how a row is scaled.
  for (const bool l2_norm : {true, false}) {
    const CodebookLayout layout = make_layout(140, {6}, l2_norm);
    const CodebookLayout weighted = make_layout(140, {6}, l2_norm, {3.0});
    const Floats codebook = random_floats(140 * 6, 70), rows = random_floats(24 * 6, 71);
    for (const auto& [codes_size, rows_size] :
         std::vector<std::pair<float, float>>{{1e-44f, 1e-44f},
                                              {1e-38f, 1e-38f},
                                              {1e-25f, 1e-25f},
                                              {1e-13f, 1e-13f},
                                              {1e-7f, 1e-7f},
                                              {1e19f, 1e19f},
                                              {1e25f, 1e25f},
                                              {7e37f, 7e37f},
                                              {1e-44f, 7e37f},
                                              {7e37f, 1e-44f},
                                              {1e10f, 1e-30f},
                                              {1e-30f, 1e10f}}) {
      Floats codes(codebook), scaled(rows);
      for (float& value : codes) value *= codes_size;
      for (float& value : scaled) value *= rows_size;
      CHECK(search(layout, codes, scaled) == definition(layout, codes, scaled), "%g and %g",
            double{codes_size}, double{rows_size});
      check_bound("any magnitude", weighted, codes, scaled);
    }
    Floats codes(codebook), any(rows);
    spread_lengths(&codes, 6, -44, 37);
    spread_lengths(&any, 6, -44, 37);
    CHECK(search(layout, codes, any) == definition(layout, codes, any), "any lengths");
    check_bound("any lengths", weighted, codes, any);
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
  {  // The same without normalisation, and nothing but such codes.
    const CodebookLayout layout = make_layout(131, {4}, false);
    Floats codebook = random_floats(131 * 4, 27, 1e15f);
    const Floats rows = random_floats(20 * 4, 28, 1e15f);
    codebook[3 * 4] = std::numeric_limits<float>::infinity();
    codebook[9 * 4 + 3] = -std::numeric_limits<float>::infinity();
    codebook[130 * 4 + 1] = std::numeric_limits<float>::quiet_NaN();
    compare("codes that are not finite", layout, codebook, rows);
    const Floats nothing(131 * 4, std::numeric_limits<float>::quiet_NaN());
    CHECK(search(layout, nothing, rows) == Indices(20, 0), "no code is finite");
  }
  {  // More rows than are held at once.
    const CodebookLayout layout = make_layout(3, {2}, false);
    const Floats codebook = random_floats(6, 25),
                 rows = random_floats((cuda::kRowsAtOnce + 8) * 2, 26);
    const Indices wanted = definition(layout, codebook, rows);
    CHECK(search(layout, codebook, rows) == wanted, "more rows than are held at once");
  }
  {  // The scratch does not grow with rows x codes.
    NearestCodeArgs<float> args = {};
    args.layout = make_layout(131072, {32, 8}, true);
    args.num_rows = cuda::kRowsAtOnce;
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
