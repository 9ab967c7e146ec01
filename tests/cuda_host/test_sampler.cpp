// The CUDA sampler against the CPU's: the same codes, probabilities and status, bit for bit. What
// the CPU draws is held against float64 in tests/sampler.
#include <map>

#include "cpu/sampler.h"
#include "cuda/sampler.h"
#include "cuda/sampler_team.cuh"
#include "support.h"

using namespace test;
using namespace tokenflow;

namespace {

const cpu::Executor kOneThread = {1, nullptr};

uint16_t bfloat16_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

// Logits of some type in memory of just the size they need: a row begins `lead` elements into the
// memory and `stride` after the last one.
struct Logits {
  LogitType type;
  Floats floats;
  std::vector<uint16_t> halves;
  int64_t lead, stride;

  Logits(LogitType type, const Floats& values, int64_t rows, int64_t codes, int64_t lead,
         int64_t stride)
      : type(type), lead(lead), stride(stride) {
    const int64_t size = lead + (rows - 1) * stride + codes;
    floats = poisoned<float>(type == LogitType::kFloat ? size : 0);
    halves = poisoned<uint16_t>(type == LogitType::kFloat ? 0 : size);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < codes; ++i) {
        const float value = values[r * codes + i];
        const size_t at = static_cast<size_t>(lead + r * stride + i);
        if (type == LogitType::kFloat) floats[at] = value;
        if (type == LogitType::kHalf) halves[at] = emulation::to_half(value);
        if (type == LogitType::kBFloat16) halves[at] = bfloat16_of(value);
      }
    }
  }

  LogitRows rows() const {
    if (type == LogitType::kFloat) return {floats.data() + lead, 2 * stride, stride};
    return {halves.data() + lead, 2 * stride, stride};
  }
};

struct Outputs {
  Indices indices;
  Floats probability;
  std::vector<uint8_t> status;

  explicit Outputs(int64_t rows)
      : indices(poisoned<int64_t>(rows)),
        probability(poisoned<float>(rows)),
        status(poisoned<uint8_t>(rows)) {}

  void into(SampleArgs& args) {
    args.indices = indices.data();
    args.probability = probability.data();
    args.status = status.data();
  }
};

void check(const std::string& what, SampleArgs args) {
  Outputs wanted(args.rows);
  wanted.into(args);
  cpu::sample(args, kOneThread);
  in_every_order([&](const char* order) {
    Outputs got(args.rows);
    got.into(args);
    const int64_t launches = emulation::launches();
    CHECK(cuda::launch_sample(args, nullptr) == cudaSuccess, "%s: launch", what.c_str());
    CHECK(emulation::launches() == launches + 1, "%s: more than one launch", what.c_str());
    for (size_t r = 0; r < got.indices.size(); ++r) {
      CHECK(got.indices[r] == wanted.indices[r], "%s: row %zu drew %lld, the CPU %lld (%s)",
            what.c_str(), r, static_cast<long long>(got.indices[r]),
            static_cast<long long>(wanted.indices[r]), order);
    }
    CHECK(same_bits(got.probability, wanted.probability), "%s: probability", what.c_str());
    CHECK(got.status == wanted.status, "%s: status", what.c_str());
  });
}

SampleArgs arguments(int64_t codes, int64_t rows, int64_t top_k, double top_p, double min_p) {
  SampleArgs args = {};
  args.rows = rows;
  args.inner = 2;
  args.codes = codes;
  args.top_k.value = top_k;
  args.top_p.value = top_p;
  args.min_p.value = min_p;
  args.temperature.value = 0.8;
  args.guidance.value = 1.25;
  args.seed.value = 12345;
  args.offset.value = 6;
  return args;
}

struct Filter {
  int64_t top_k;
  double top_p;
  double min_p = 0;
  double temperature = 0.8;
};

// Random logits, of `values` different ones if that is positive, some of them masked. Around
// `centre`: at 1,000 nearly all share the upper half of their keys.
Floats make_values(int64_t count, unsigned seed, int values, bool masked, float centre = 0) {
  Floats logits = random_floats(count, seed, 2);
  std::mt19937 random(seed);
  for (float& logit : logits) {
    if (values > 0) logit = static_cast<float>(static_cast<int>(random() % values)) - 1.0f;
    logit += centre;
    // Of every type the lowest.
    const float masks[] = {-std::numeric_limits<float>::infinity(), -3.38953139e38f, -65504.0f};
    if (masked && random() % 3 == 0) logit = masks[random() % 3];
  }
  return logits;
}

// Where rows begin: a multiple of 16 bytes, as vectors are loaded, or not.
enum class Layout { kAligned, kOneAligned, kNotAligned };

void check_rows(const std::string& what, LogitType type, int64_t codes, int64_t rows, bool guided,
                int values, bool masked, const std::vector<Filter>& filters, float centre = 0,
                Layout layout = Layout::kNotAligned) {
  const int64_t padded = (codes + 7) / 8 * 8;
  const bool aligned = layout != Layout::kNotAligned;
  const Logits cond(type, make_values(rows * codes, 1, values, masked, centre), rows, codes,
                    aligned ? 0 : 1, aligned ? padded : codes + 3);
  const bool both = layout == Layout::kAligned;
  const Logits uncond(type, make_values(rows * codes, 2, values, masked, centre), rows, codes,
                      both ? 8 : 3, both ? padded + 8 : codes);
  for (const Filter& filter : filters) {
    SampleArgs args = arguments(codes, rows, filter.top_k, filter.top_p, filter.min_p);
    args.temperature.value = filter.temperature;
    args.type = type;
    args.logits = cond.rows();
    if (guided) args.uncond = uncond.rows();
    check(what + ", " + std::to_string(codes) + " codes, k " + std::to_string(filter.top_k) +
              ", p " + std::to_string(filter.top_p) + ", min p " + std::to_string(filter.min_p),
          args);
  }
}

// Half keys at least a bound, against the comparison itself.
void check_half_key_filter() {
  std::mt19937 random(7);
  for (int round = 0; round < 4000; ++round) {
    uint32_t words[16], wanted = 0;
    const auto half = [&] { return static_cast<uint32_t>(random() & 0xffffu); };
    const uint32_t bounds[] = {0, 0x7fff, 0x8000, 0xffff, half(), half()};
    const uint32_t bound = bounds[random() % 6];
    for (uint32_t i = 0; i < 16; ++i) {
      // Near the bound, or anywhere.
      const uint32_t near = (bound + half() % 3 - 1) & 0xffffu, any = half();
      const uint32_t low = random() % 2 ? near : any, high = random() % 2 ? near : any;
      words[i] = low | high << 16;
      wanted |= (low >= bound ? 1u << i : 0u) | (high >= bound ? 0x10000u << i : 0u);
    }
    cuda::HalfKeyFilter filter(bound);
    for (const uint32_t word : words) filter.add(word);
    CHECK(filter.hits == wanted, "half keys of at least %04x: %08x, not %08x", bound, filter.hits,
          wanted);
  }
}

// Twice, so that bins are seen to be clear again.
__global__ void boundary_kernel(const uint32_t* keys, const uint64_t* values, int count,
                                cuda::Range open, uint64_t limit, cuda::Boundary* found) {
  const cuda::Team<256> team = {*cuda::shared_memory<cuda::SamplerShared>()};
  team.clear();
  cuda::block_barrier();
  const auto limit_of = [&](uint64_t) { return limit; };
  const auto visit = [&](cuda::Range now, const auto& add) {
    for (int i = team.thread(); i < count; i += 256) {
      if (now.has(keys[i])) add(keys[i], values[i]);
    }
  };
  const cuda::Boundary near = team.find_boundary<false>(open, limit_of, visit);
  const cuda::Boundary exact = team.find_boundary<true>(open, limit_of, visit);
  if (team.thread() == 0) found[0] = near;
  if (team.thread() == 0) found[1] = exact;
}

// Boundaries of running sums, of limits that are just a partial sum too, against a loop.
void check_boundaries() {
  std::mt19937_64 random(3);
  for (int round = 0; round < 40; ++round) {
    const uint32_t widths[] = {1, 200, 70000, 0xffffffffu};
    const uint32_t width = widths[round % 4],
                   low = static_cast<uint32_t>(random() % (~width + 1ull));
    std::vector<uint32_t> keys(1 + random() % 600);
    std::vector<uint64_t> values(keys.size());
    std::map<uint32_t, uint64_t> sums;
    uint64_t total = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
      keys[i] = low + static_cast<uint32_t>(random() % width);
      values[i] = 1 + random() % (random() % 2 ? 3 : uint64_t{1} << 41);  // words that overflow
      sums[keys[i]] += values[i];
      total += values[i];
    }
    const uint64_t part = random() % sums.size();  // keys below the boundary, in the second case
    uint64_t limit = random() % total, below = 0;
    if (round % 3 == 1) limit = 0;
    if (round % 3 == 2) {
      limit = 0;
      auto sum = sums.begin();
      for (uint64_t i = 0; i < part; ++i, ++sum) limit += sum->second;
    }
    auto wanted = sums.begin();
    for (; below + wanted->second <= limit; ++wanted) below += wanted->second;
    in_every_order([&](const char* order) {
      cuda::Boundary found[2];
      const cuda::Range open = {low, low + width - 1};
      CHECK(cuda::launch(boundary_kernel, dim3(1), 256, sizeof(cuda::SamplerShared), nullptr,
                         keys.data(), values.data(), static_cast<int>(keys.size()), open, limit,
                         found) == cudaSuccess,
            "launch");
      for (const cuda::Boundary& one : found) {
        CHECK(one.below == below && one.limit == limit && one.total == total, "sums (%s)", order);
      }
      CHECK(found[1].key == wanted->first, "%u, not %u (%s)", found[1].key, wanted->first, order);
      const auto first = sums.lower_bound(found[0].key);  // at or above the key that was found
      CHECK(first == wanted && (found[0].key == wanted->first || below == limit), "%u for %u (%s)",
            found[0].key, wanted->first, order);
    });
  }
}

// As many codes with a weight as the list holds, and one more. They lie where a warp lists many.
void check_full_list() {
  const int64_t list = cuda::SamplerShared::kList, codes = 3 * list;
  for (const int64_t weighted : {list, list + 1}) {
    Floats values(static_cast<size_t>(codes), -1000.0f);
    const Floats some = random_floats(weighted, 3, 1);
    std::copy(some.begin(), some.end(), values.begin() + 100);
    const Logits logits(LogitType::kFloat, values, 1, codes, 0, codes);
    for (const Filter& filter :
         {Filter{0, 0.7}, Filter{1900, 0.9}, Filter{weighted, 0.2}, Filter{weighted + 1, 0.999}}) {
      SampleArgs args = arguments(codes, 1, filter.top_k, filter.top_p, 0);
      args.type = LogitType::kFloat;
      args.logits = logits.rows();
      check(std::to_string(weighted) + " codes with a weight, k " + std::to_string(filter.top_k),
            args);
    }
  }
}

// Rows of all kinds in one launch, of which some need the list, some all codes, some neither.
void check_many_rows() {
  const int64_t codes = 5000, rows = 24;
  Floats values = random_floats(rows * codes, 11, 2);
  const auto row = [&](int64_t r) { return values.begin() + r * codes; };
  for (int64_t r = 0; r < rows; ++r) {
    std::mt19937 random(static_cast<unsigned>(r));
    for (auto logit = row(r); logit != row(r + 1); ++logit) {
      if (r % 6 == 1) *logit = static_cast<float>(random() % 2);  // more ties than the list holds
      if (r % 6 == 2) *logit = 1000.0f + *logit / 16;             // one half key
      if (r % 6 == 3) *logit = -std::numeric_limits<float>::infinity();
      if (r % 6 == 4) *logit -= 50.0f;  // all negative
    }
    if (r % 6 == 5) row(r)[static_cast<int64_t>(random() % codes)] = std::nanf("");
  }
  const Logits logits(LogitType::kFloat, values, rows, codes, 0, codes);
  Indices top_k(rows), seed(rows);
  for (int64_t r = 0; r < rows; ++r) {
    top_k[r] = r % 5 * 700;  // off where it is 0
    seed[r] = 99 + r;
  }
  SampleArgs args = arguments(codes, rows, 0, 0.9, 0);
  args.type = LogitType::kFloat;
  args.logits = logits.rows();
  args.top_k = {top_k.data(), 1, 0};
  args.seed = {seed.data(), 1, 0};
  check("many rows", args);
}

// Anything.
void check_random_cases() {
  std::mt19937 random(2024);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  const auto unit = [&] { return static_cast<double>(random()) / 4294967296.0; };
  const LogitType types[] = {LogitType::kFloat, LogitType::kBFloat16, LogitType::kHalf};
  const float centres[] = {0, 0, 100, -100, 1000};
  const int values[] = {0, 0, 0, 2, 40};
  for (int round = 0; round < 60; ++round) {
    const int64_t codes = 1 + below(round % 3 == 0 ? 9000 : 900), rows = 1 + below(3);
    const bool masked = below(4) == 0;
    const LogitType type = types[below(3)];
    const auto make = [&] {
      const int64_t stride = below(2) ? codes + below(9) : (codes + 7) / 8 * 8;
      const Floats logits = make_values(rows * codes, static_cast<unsigned>(random()),
                                        values[below(5)], masked, centres[below(5)]);
      return Logits(type, logits, rows, codes, below(2) ? below(9) : 0, stride);
    };
    const Logits cond = make(), uncond = make();
    SampleArgs args = arguments(codes, rows, below(2) ? below(codes + 1) : below(60),
                                below(4) ? unit() : 0, below(4) ? 0 : unit() / 4);
    args.type = type;
    args.logits = cond.rows();
    if (below(2)) args.uncond = uncond.rows();
    args.temperature.value = std::exp(6 * unit() - 3);
    args.guidance.value = 8 * unit() - 1;
    args.seed.value = static_cast<int64_t>(random());
    max_shared_bytes_per_block = (below(4) ? 99 : 20) * 1024;  // with and without half keys
    check("random case " + std::to_string(round) + ", " + std::to_string(codes) + " codes", args);
  }
  max_shared_bytes_per_block = kLeastSharedBytes;
}

// Every row with arguments of its own, and rows that make no sense.
void check_row_arguments() {
  const int64_t codes = 300, rows = 14;
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Floats values = make_values(rows * codes, 5, 0, false);
  const auto row = [&](int64_t r) { return values.begin() + r * codes; };
  std::fill(row(1), row(2), -infinity);
  std::fill(row(2), row(3), nan);
  row(3)[7] = nan;
  row(4)[11] = row(4)[250] = infinity;
  std::fill(row(5), row(6), 3.0e38f);
  row(6)[0] = 3.4e38f;
  row(6)[1] = -3.4e38f;
  const Logits cond(LogitType::kFloat, values, rows, codes, 0, codes);
  const Logits uncond(LogitType::kFloat, make_values(rows * codes, 6, 0, true), rows, codes, 0,
                      codes);
  const Indices top_k = {5, 5, 5, 5, 5, 5, 5, 0, -3, 301, 300, 1, 299, int64_t{1} << 31};
  const Vector top_p = {0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, -1, 1.5, nan, 1, 0.5, 1e-9, 0.3};
  const Vector min_p = {0, 0.1, 1, 0.5, 0.5, 1, 0.01, -1, 1.5, nan, 1e-300, 0.5, 0.2, 0.05};
  const Vector temperature = {1, 1, 1, 1, 1, 1, 0.1, 0, -1, nan, infinity, 1e-300, 1e300, 3};
  const Vector guidance = {0, 0, 0, 0, 1, 0, 0.5, 1, 2, 3, 0, nan, infinity, -4};
  Indices seed(rows), offset(rows);
  for (int64_t r = 0; r < rows; ++r) {
    seed[r] = (r - 7) * 0x123456789abcdefLL;
    offset[r] = r * r << 33;
  }
  SampleArgs args = arguments(codes, rows, 0, 0, 0);
  args.type = LogitType::kFloat;
  args.logits = cond.rows();
  args.uncond = uncond.rows();
  args.top_k = {top_k.data(), 1, 0};
  args.top_p = {top_p.data(), 1, 0};
  args.min_p = {min_p.data(), 1, 0};
  args.temperature = {temperature.data(), 1, 0};
  args.guidance = {guidance.data(), 1, 0};
  args.seed = {seed.data(), 1, 0};
  args.offset = {offset.data(), 1, 0};
  check("arguments a row", args);
  args.seed.stride = args.offset.stride = 0;
  check("one seed in memory", args);
  args.uncond.data = nullptr;
  check("arguments a row without guidance", args);

  Outputs out(rows);
  out.into(args);
  args.codes = 0;
  CHECK(cuda::launch_sample(args, nullptr) == cudaErrorInvalidValue, "no codes");
  args.codes = kMostCodes + 1;
  CHECK(cuda::launch_sample(args, nullptr) == cudaErrorInvalidValue, "too many codes");
  args.rows = 0;
  CHECK(cuda::launch_sample(args, nullptr) == cudaSuccess, "no rows");
}

}  // namespace

int main() {
  check_half_key_filter();
  check_boundaries();
  const LogitType kTypes[] = {LogitType::kFloat, LogitType::kBFloat16, LogitType::kHalf};
  const std::vector<Filter> few = {{0, 0},     {1, 0},      {3, 0},        {0, 0.7},     {7, 0.8},
                                   {20, 1e-6}, {0, 0, 0.1}, {0, 0.8, 0.3}, {9, 0.9, 0.2}};
  for (const LogitType type : kTypes) {
    for (const bool guided : {false, true}) {
      check_rows("random", type, 33, 3, guided, 0, false, few);
      check_rows("masked", type, 300, 2, guided, 0, true, few);
      for (const Layout layout : {Layout::kAligned, Layout::kOneAligned}) {
        for (const int64_t codes : {400, 409}) {
          check_rows("aligned", type, codes, 3, guided, 0, true, {{9, 0.9}}, 0, layout);
        }
        check_rows("aligned, large", type, 8192 + 4096 + 13, 1, guided, 0, false, {{1200, 0.8}}, 0,
                   layout);
      }
    }
  }
  for (const int64_t codes : {1, 2, 31, 32, 255, 257}) {
    check_rows("small", LogitType::kFloat, codes, 2, false, 0, false, {{2, 0.5}, {0, 0.9}});
  }
  // Ties: at the k-th position, at top-p's boundary, all equal.
  const std::vector<Filter> tied = {{0, 0},     {1, 0},     {50, 0},         {0, 0.5},
                                    {50, 0.37}, {550, 0.9}, {550, 0.9, 0.4}, {3000, 0.37}};
  for (const int values : {1, 2, 3, 5}) {
    check_rows("ties", LogitType::kFloat, 600, 2, false, values, true, tied);
  }
  for (const int values : {1, 3}) {
    check_rows("more ties than the list", LogitType::kFloat, 7000, 1, false, values, false, tied);
  }
  // One half key for all, as many as the list holds and more: the lower halves decide.
  for (const int64_t codes : {1500, 6000}) {
    check_rows("one half key", LogitType::kFloat, codes, 1, false, 0, false,
               {{1, 0}, {40, 0.8}, {1200, 0.8}, {0, 0.5}, {0, 0.9, 0.02}}, 1000);
    check_rows("one negative half key", LogitType::kFloat, codes, 1, true, 0, false,
               {{1, 0}, {40, 0.8}}, -1000);
  }
  // More candidates than the list holds (2,048); k beyond the groups' maxima (2,048 and 4,096),
  // also with weights that are nearly equal, so that no code is missed unseen.
  check_rows("long lists", LogitType::kFloat, 4096, 1, true, 0, false,
             {{500, 0.8},
              {1200, 0.8},
              {2048, 0},
              {2047, 0.9},
              {3000, 0.8},
              {4095, 0.99},
              {0, 0.6},
              {4090, 0, 0, 100}});
  check_rows("long lists, large", LogitType::kFloat, 20000, 1, true, 0, false,
             {{2000, 0.8}, {4096, 0.8}, {5000, 0.8}, {19000, 0, 0, 100}});
  check_full_list();
  check_many_rows();
  check_row_arguments();
  check_random_cases();
  // Half keys that do not fit are computed again.
  max_shared_bytes_per_block = 48 * 1024;
  check_rows("without keys", LogitType::kBFloat16, 20001, 1, true, 0, false,
             {{1200, 0.8}, {1200, 0.8, 0.05}, {1, 0}});
  check_rows("without keys or list", LogitType::kFloat, 20001, 1, false, 3, false, {{9000, 0.7}});
  max_shared_bytes_per_block = kLeastSharedBytes;
  check_rows("large, with keys", LogitType::kBFloat16, 32768, 1, true, 0, true, {{1200, 0.8}});
  // As much shared memory as an H100 has.
  max_shared_bytes_per_block = kMostSharedBytes;
  check_rows("large, with keys", LogitType::kFloat, 100000, 1, false, 0, false, {{0, 0.5}});
  check_rows("large, without keys", LogitType::kBFloat16, 128256, 1, false, 0, false, {{50, 0.9}},
             0, Layout::kAligned);
  return 0;
}
