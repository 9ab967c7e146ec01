// Scalar quantization and the transposes of resampling against the CPU's.
#include <algorithm>

#include "../cpp/thread_executor.h"
#include "cpu/scalar.h"
#include "cuda/scalar.h"
#include "support.h"

using namespace test;
using namespace tokenflow;

namespace {

using Digits = std::vector<int16_t>;

struct Case {
  const char* name;
  Pyramid pyramid;
  int dim;
  int thresholds;
  int rounds;
  bool flips;
};

struct Results {
  Floats quantized, rows;
  Digits digits;
};

// `launch` a back end's scalar_quantize.
template <typename Launch>
Results quantize(const Case& test, const Launch& launch) {
  const int64_t tokens = test.pyramid.batch * tokens_per_image(test.pyramid);
  const int64_t plane = int64_t{test.pyramid.height} * test.pyramid.width * test.dim;
  const Floats h = random_floats(test.pyramid.batch * plane, 1);
  Floats thresholds = random_floats(int64_t{test.rounds} * test.thresholds * test.dim, 2);
  for (int r = 0; r < test.rounds; ++r) {  // ascending, the last channel with infinities
    for (int d = 0; d < test.dim; ++d) {
      Floats channel;
      const int64_t first = int64_t{r} * test.thresholds * test.dim + d;
      for (int i = 0; i < test.thresholds; ++i) channel.push_back(thresholds[first + i * test.dim]);
      std::sort(channel.begin(), channel.end());
      if (d == test.dim - 1 && test.thresholds > 1) channel.back() = INFINITY;
      for (int i = 0; i < test.thresholds; ++i) thresholds[first + i * test.dim] = channel[i];
    }
  }
  const Floats values = random_floats(int64_t{test.rounds} * (test.thresholds + 1) * test.dim, 3);
  const Floats chance = random_floats(tokens * test.dim, 4);
  std::unique_ptr<bool[]> flips(new bool[chance.size()]);
  for (size_t i = 0; i < chance.size(); ++i) flips[i] = chance[i] > 1;
  Results out = {poisoned<float>(test.pyramid.batch * plane), poisoned<float>(tokens * test.dim),
                 poisoned<int16_t>(tokens * test.dim)};
  ScalarQuantizeArgs<float> args = {};
  args.pyramid = test.pyramid;
  args.layout.dim = test.dim;
  args.layout.thresholds = test.thresholds;
  for (int s = 0; s < test.pyramid.num_scales; ++s) args.layout.round[s] = s % test.rounds;
  args.thresholds = thresholds.data();
  args.values = values.data();
  args.h = h.data();
  args.flips = test.flips ? flips.get() : nullptr;
  args.quantized = out.quantized.data();
  args.digits = out.digits.data();
  args.rows = out.rows.data();
  launch(args);
  return out;
}

void check(Case test) {
  for (const Upsampling upsampling : {Upsampling::kBicubic, Upsampling::kBilinear}) {
    test.pyramid.upsampling = upsampling;
    const Results wanted = quantize(test, [](const ScalarQuantizeArgs<float>& args) {
      cpu::scalar_quantize(args, cpu::thread_executor(1));
    });
    Results first;
    in_every_order([&](const char* order) {
      const int64_t launches = emulation::launches();
      const Results got = quantize(test, [](const ScalarQuantizeArgs<float>& args) {
        CHECK(cuda::launch_scalar_quantize(args, nullptr) == cudaSuccess, "launch");
      });
      CHECK(emulation::launches() - launches == 1, "one kernel");
      if (first.rows.empty()) first = got;
      CHECK(same_bits(got.quantized, first.quantized) && same_bits(got.rows, first.rows) &&
                got.digits == first.digits,
            "%s (%s): other bits in another order", test.name, order);
      CHECK(got.digits == wanted.digits, "%s (%s): digits", test.name, order);
      check_close(got.rows, Vector(wanted.rows.begin(), wanted.rows.end()), 1e-5, test.name);
      check_close(got.quantized, Vector(wanted.quantized.begin(), wanted.quantized.end()), 1e-5,
                  test.name);
    });

    const int64_t tokens = test.pyramid.batch * tokens_per_image(test.pyramid);
    const int64_t plane = test.pyramid.batch * test.pyramid.height * test.pyramid.width;
    const Floats planes = random_floats(plane * test.dim, 5);
    const Floats rows = random_floats(tokens * test.dim, 6);
    Floats up = poisoned<float>(tokens * test.dim), up_wanted = up;
    const UpsampleTransposeArgs<float> upsample = {test.pyramid, test.dim, planes.data(),
                                                   up.data()};
    UpsampleTransposeArgs<float> on_cpu = upsample;
    on_cpu.rows = up_wanted.data();
    CHECK(cuda::launch_upsample_transpose(upsample, nullptr) == cudaSuccess, "launch");
    cpu::upsample_transpose(on_cpu, cpu::thread_executor(1));
    check_close(up, Vector(up_wanted.begin(), up_wanted.end()), 1e-5, test.name);

    Floats pooled = poisoned<float>(plane * test.dim), pooled_wanted = pooled;
    const PoolTransposeArgs<float> pool = {test.pyramid, test.dim, rows.data(), pooled.data()};
    PoolTransposeArgs<float> pool_cpu = pool;
    pool_cpu.plane = pooled_wanted.data();
    CHECK(cuda::launch_pool_transpose(pool, nullptr) == cudaSuccess, "launch");
    cpu::pool_transpose(pool_cpu, cpu::thread_executor(1));
    check_close(pooled, Vector(pooled_wanted.begin(), pooled_wanted.end()), 1e-5, test.name);
  }
}

}  // namespace

int main() {
  check({"signs", make_pyramid(2, 4, 4, {{1, 1}, {2, 2}, {3, 3}, {4, 4}}), 5, 1, 1, true});
  check({"levels", make_pyramid(1, 3, 5, {{3, 5}}), 6, 7, 1, false});
  check({"rounds", make_pyramid(2, 4, 3, {{2, 3}, {2, 3}, {4, 1}, {4, 1}}), 3, 4, 2, false});
  check({"larger than the plane", make_pyramid(1, 3, 4, {{5, 2}, {1, 1}, {2, 6}}), 2, 1, 1, false});
  check({"blocks of channels", make_pyramid(100, 2, 2, {{1, 1}, {2, 2}}), 9, 1, 1, true});

  {  // Rows, round by round.
    const Floats rows = random_floats(300 * 3, 7), values = random_floats(2 * 5 * 3, 8);
    Floats thresholds = random_floats(2 * 4 * 3, 9);
    for (int i = 0; i < 2 * 3; ++i) {  // a channel's are ascending
      float* of_channel = thresholds.data() + i / 3 * 12 + i % 3;
      for (int a = 0; a < 4; ++a) {
        for (int b = a + 1; b < 4; ++b) {
          if (of_channel[3 * b] < of_channel[3 * a])
            std::swap(of_channel[3 * a], of_channel[3 * b]);
        }
      }
    }
    Floats codes = poisoned<float>(300 * 2 * 3), wanted_codes = codes;
    Digits digits = poisoned<int16_t>(300 * 2 * 3), wanted_digits = digits;
    ScalarRowsArgs<float> args = {
        300, 3, 4, 2, thresholds.data(), values.data(), rows.data(), codes.data(), digits.data()};
    CHECK(cuda::launch_scalar_rows(args, nullptr) == cudaSuccess, "launch");
    args.codes = wanted_codes.data();
    args.digits = wanted_digits.data();
    cpu::scalar_rows(args, cpu::thread_executor(1));
    CHECK(digits == wanted_digits && same_bits(codes, wanted_codes), "rows");
  }
  {  // Token indices of digits.
    PackDigitsArgs args = {3, 70, 2, 5, {1, 3, 9, 27, 81}, nullptr, nullptr};
    Digits digits;
    for (int i = 0; i < 3 * 70 * 10; ++i) digits.push_back(static_cast<int16_t>(i * 7 % 11 % 3));
    Indices got = poisoned<int64_t>(3 * 70 * 2), wanted = got;
    args.digits = digits.data();
    args.indices = got.data();
    CHECK(cuda::launch_pack_digits(args, nullptr) == cudaSuccess, "launch");
    args.indices = wanted.data();
    cpu::pack_digits(args, cpu::thread_executor(1));
    CHECK(got == wanted, "indices");
  }
  {  // Shapes that are not supported launch nothing.
    ScalarQuantizeArgs<float> args = {};
    args.pyramid = make_pyramid(1, 300, 300, {{1, 1}});
    args.layout.dim = 1;
    const int64_t launches = emulation::launches();
    CHECK(cuda::launch_scalar_quantize(args, nullptr) == cudaErrorInvalidValue, "300 x 300");
    CHECK(emulation::launches() == launches, "launched");
  }
  return 0;
}
