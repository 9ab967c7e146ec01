// What the CPU sampler is made of: Philox's published answers, the order of keys, the exponential's
// accuracy, half precision, exact scaling; then draws that do not depend on threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/instruction_set.h"
#include "cpu/sampler.h"
#include "thread_executor.h"

using namespace tokenflow;

namespace {

void test_philox() {
  struct Answer {
    PhiloxBlock counter;
    uint32_t key[2];
    PhiloxBlock output;
  };
  // Random123's kat_vectors.
  const uint32_t ones = 0xffffffffu;
  const Answer answers[] = {
      {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
      {{{ones, ones, ones, ones}},
       {ones, ones},
       {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
      {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
       {0xa4093822u, 0x299f31d0u},
       {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}}};
  for (const Answer& answer : answers) {
    const PhiloxBlock got = philox_4x32_10(answer.counter, answer.key[0], answer.key[1]);
    CHECK(std::memcmp(&got, &answer.output, sizeof(got)) == 0, "%08x", got.word[0]);
  }
  CHECK(random_bits(0, 0) == 0xe169c58d6627e8d5ull, "%llx",
        static_cast<unsigned long long>(random_bits(0, 0)));
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

void test_keys() {
  const float infinity = INFINITY;
  const float ascending[] = {-infinity, -3e38f, -1.0f, -1e-42f, 0.0f,
                             1e-45f,    1.0f,   3e38f, infinity};
  for (size_t i = 0; i + 1 < sizeof(ascending) / sizeof(float); ++i) {
    CHECK(key_of(ascending[i]) < key_of(ascending[i + 1]), "%g", static_cast<double>(ascending[i]));
  }
  CHECK(key_of(-0.0f) == key_of(0.0f), "zeros");
  CHECK(key_of(NAN) == kMaskedKey && key_of(-NAN) == kMaskedKey, "NaN");
  CHECK(key_of(-infinity) == kMaskedKey && key_of(infinity) == kInfinityKey, "infinities");
  std::mt19937 random(1);
  for (int i = 0; i < 1000000; ++i) {
    const float value = float_of(random());
    if (value == value) CHECK(value_of(key_of(value)) == value, "%g", static_cast<double>(value));
  }
}

// As fixed_point_weight promises: 2^-23 of the truth and 2^-40.
void test_weights() {
  double worst = 0;
  for (int i = 0; i <= 30 << 16; ++i) {
    const float z = -static_cast<float>(i) / 65536.0f;
    const double truth = std::exp(static_cast<double>(z));
    const double got = std::ldexp(static_cast<double>(fixed_point_weight(z, 0.0f, 2.0f)), -40);
    const double error = std::fabs(got - truth) - std::ldexp(1.0, -40);
    worst = std::max(worst, error / truth);
  }
  CHECK(worst < std::ldexp(1.0, -23), "off by %g 2^-24", worst * 16777216.0);
  std::printf("exponential: within %.2f 2^-24 and 2^-40\n", worst * 16777216.0);
  CHECK(fixed_point_weight(5.0f, 5.0f, 2.0f) == uint64_t{1} << kWeightBits, "largest");
  CHECK(fixed_point_weight(INFINITY, INFINITY, 0.0f) == uint64_t{1} << kWeightBits, "infinities");
  CHECK(fixed_point_weight(-1e30f, INFINITY, 0.0f) == 0, "0 times infinity");
  CHECK(fixed_point_weight(-3e38f, 3e38f, 2.0f) == 0, "far below");
  // A difference of 6e38, which no float32 is: exp(-6) in 40 fractional bits.
  const double apart =
      std::ldexp(static_cast<double>(fixed_point_weight(-3e38f, 3e38f, 2e-38f)), -kWeightBits);
  CHECK(std::fabs(apart / std::exp(-6.0) - 1) < 1e-6, "%g", apart);
  // What lies below least_weighted_key weighs nothing, at any temperature.
  for (const float inverse : {0.1f, 1.0f, 7.0f, 1e30f}) {
    for (const float largest : {-50.0f, 0.0f, 3.0f, 1e6f}) {
      const uint32_t key = least_weighted_key(largest, inverse);
      CHECK(fixed_point_weight(value_of(key - 1), largest, inverse) == 0, "%g %g",
            static_cast<double>(largest), static_cast<double>(inverse));
    }
  }
}

void test_halves() {
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
    const int exponent = static_cast<int>(bits >> 10 & 31);
    const double fraction = static_cast<double>(bits & 1023) / 1024;
    const double sign = bits >> 15 ? -1 : 1;
    const float got = from_float16(static_cast<uint16_t>(bits));
    if (exponent == 31) {
      CHECK((bits & 1023) ? got != got : static_cast<double>(got) == sign * INFINITY, "%x", bits);
    } else {
      const double value =
          exponent ? std::ldexp(1 + fraction, exponent - 15) : std::ldexp(fraction, -14);
      CHECK(static_cast<double>(got) == sign * value, "%x", bits);
    }
    const float wide = from_bfloat16(static_cast<uint16_t>(bits)), same = float_of(bits << 16);
    CHECK(std::memcmp(&wide, &same, sizeof(wide)) == 0, "%x", bits);
  }
}

void test_scaling() {
  std::mt19937_64 random(2);
  for (int i = 0; i < 100000; ++i) {
    const uint64_t a = random(), b = random() >> (random() % 64);
    const uint64_t wanted = static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
    CHECK(scaled_random(a, b) == wanted, "%llx %llx", static_cast<unsigned long long>(a),
          static_cast<unsigned long long>(b));
  }
}

// z is that of float64 times the scale, at any guidance and magnitude, and what is masked stays so.
void test_guidance() {
  const float infinity = INFINITY, lowest = -std::numeric_limits<float>::max();
  const float bfloat16_lowest = -3.38953139e38f;
  std::mt19937 random(4);
  std::uniform_real_distribution<float> uniform(-1, 1);
  SampleArgs args = {};
  args.uncond.data = &args;
  for (const double t : {-1e30, -8.5, -1.0, -0.5, -1e-9, 1e-300, 0.7, 1.0, 7.5, 1e30}) {
    args.guidance.value = t;
    const Guidance guidance = guidance_of(args, 0);
    CHECK(guidance.on && guidance.scale > 0, "%g", t);
    for (int i = 0; i < 20000; ++i) {
      const float size = i % 3 == 0 ? 3.38e38f : i % 3 == 1 ? 1e-3f : 20.0f;
      const float a = size * uniform(random), b = size * uniform(random);
      const Combined code = guided<LogitType::kFloat>(a, b, guidance);
      const double wanted =
          (static_cast<double>(static_cast<float>(1 + t)) * static_cast<double>(a) +
           static_cast<double>(static_cast<float>(-t)) * static_cast<double>(b)) *
          guidance.scale;
      const double error = std::fabs(static_cast<double>(code.z) - wanted);
      const double room = static_cast<double>(size) * 6e-8 + 1e-44;
      CHECK(!code.masked && is_nan(code) == 0 && error <= room, "t %g: %g, not %g", t,
            static_cast<double>(code.z), wanted);
    }
    for (const float mask : {-infinity, lowest, bfloat16_lowest}) {
      for (const float other : {-infinity, lowest, -1.0f, 0.0f, 3e38f, infinity, NAN}) {
        for (const Combined code : {guided<LogitType::kFloat>(mask, other, guidance),
                                    guided<LogitType::kFloat>(other, mask, guidance),
                                    guided<LogitType::kBFloat16>(mask, other, guidance)}) {
          CHECK(key_of(code) == kMaskedKey && is_nan(code) == 0, "t %g, mask %g, other %g", t,
                static_cast<double>(mask), static_cast<double>(other));
        }
      }
    }
    CHECK(key_of(guided<LogitType::kHalf>(-65504.0f, 1.0f, guidance)) == kMaskedKey, "half");
    CHECK(key_of(guided<LogitType::kFloat>(-65504.0f, 1.0f, guidance)) != kMaskedKey, "no mask");
    CHECK(is_nan(guided<LogitType::kFloat>(1.0f, NAN, guidance)) != 0, "NaN");
  }
  for (const double t : {std::nan(""), static_cast<double>(infinity), -1e31}) {
    args.guidance.value = t;
    const Combined code = guided<LogitType::kFloat>(1.0f, 2.0f, guidance_of(args, 0));
    CHECK(is_nan(code) != 0 && key_of(code) == kMaskedKey, "guidance %g", t);
  }
  CHECK(key_of(unguided<LogitType::kFloat>(bfloat16_lowest)) == kMaskedKey, "unguided mask");
  CHECK(key_of(unguided<LogitType::kFloat>(-3.38e38f)) == key_of(-3.38e38f), "unguided number");
}

// The filters and the draw, code by code over a sorted row, in the same integers.
int64_t draw_by_sorting(const std::vector<float>& logits, int64_t top_k, double top_p, double min_p,
                        uint64_t random) {
  const int64_t codes = static_cast<int64_t>(logits.size());
  std::vector<int64_t> order(codes);
  for (int64_t i = 0; i < codes; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return logits[a] < logits[b]; });
  const float largest = logits[order.back()];
  const float least = logits[order[codes - top_k]];
  std::vector<uint64_t> weights(codes);
  uint64_t total = 0;
  for (int64_t i = 0; i < codes; ++i) {
    weights[i] = logits[i] >= least ? fixed_point_weight(logits[i], largest, 2.0f) : 0;
    total += weights[i];
  }
  if (top_p > 0) {
    const uint64_t limit = static_cast<uint64_t>((1 - top_p) * static_cast<double>(total));
    uint64_t sum = 0;
    for (int64_t n = 0; n + 1 < codes; ++n) {
      sum += weights[order[n]];
      if (sum > limit) break;
      total -= weights[order[n]];
      weights[order[n]] = 0;
    }
  }
  for (uint64_t& weight : weights) {
    if (static_cast<double>(weight) >= min_p * std::ldexp(1.0, kWeightBits)) continue;
    total -= weight;
    weight = 0;
  }
  uint64_t target = scaled_random(random, total);
  int64_t i = 0;
  while (weights[i] <= target) target -= weights[i++];
  return i;
}

struct Shares {
  double top_p;
  double min_p;
};

void test_draws() {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 2);
  for (const int64_t codes : {2, 3, 16, 100, 129, 1000, 5000}) {
    for (const int values : {0, 1, 2, 7}) {  // different ones, 0 for all
      const int64_t rows = 40;
      std::vector<float> logits(static_cast<size_t>(rows * codes));
      for (float& logit : logits) {
        logit = values ? static_cast<float>(random() % values) : normal(random);
      }
      for (const int64_t top_k : {int64_t{2}, codes / 7 + 2, codes / 2 + 1, codes}) {
        for (const Shares& shares :
             {Shares{0, 0}, Shares{1e-12, 0}, Shares{0.25, 0}, Shares{0.8, 0}, Shares{1, 0},
              Shares{0, 0.03}, Shares{0.8, 0.2}, Shares{0.4, 0.01}, Shares{0, 1}}) {
          const double top_p = shares.top_p;
          std::vector<int64_t> indices(rows), again(rows);
          std::vector<float> probability(rows);
          std::vector<uint8_t> status(rows);
          SampleArgs args = {};
          args.rows = args.inner = rows;
          args.codes = codes;
          args.logits = {logits.data(), 0, codes};
          args.top_k.value = top_k;
          args.top_p.value = top_p;
          args.min_p.value = shares.min_p;
          args.temperature.value = 1;
          args.seed.value = 7;
          args.indices = indices.data();
          args.probability = probability.data();
          args.status = status.data();
          cpu::sample(args, cpu::thread_executor(1));
          for (int64_t r = 0; r < rows; ++r) {
            const std::vector<float> row(logits.begin() + r * codes,
                                         logits.begin() + (r + 1) * codes);
            const int64_t wanted = draw_by_sorting(row, top_k, top_p, shares.min_p,
                                                   random_bits(7, static_cast<uint64_t>(r)));
            CHECK(indices[r] == wanted,
                  "%lld codes, k %lld, p %g, min p %g, row %lld: %lld, not %lld",
                  static_cast<long long>(codes), static_cast<long long>(top_k), top_p, shares.min_p,
                  static_cast<long long>(r), static_cast<long long>(indices[r]),
                  static_cast<long long>(wanted));
          }
          args.indices = again.data();
          cpu::sample(args, cpu::thread_executor(3));
          CHECK(again == indices, "threads");
        }
      }
    }
  }
}

}  // namespace

int run_all() {
  test_philox();
  test_keys();
  test_weights();
  test_halves();
  test_scaling();
  test_guidance();
  test_draws();
  std::printf("sampler: ok (%s)\n", cpu::instruction_set());
  return 0;
}

int main() { return test::run(run_all); }
