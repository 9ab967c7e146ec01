// Scalar quantization, its losses and its gradient against the CPU's.
#include <algorithm>

#include "../cpp/thread_executor.h"
#include "cpu/scalar.h"
#include "cuda/scalar.h"
#include "support.h"

using namespace test;
using namespace tokenflow;

namespace {

struct Case {
  const char* name;
  Pyramid pyramid;
  int dim;
  int groups;
  int thresholds;
  int rounds;
  StandIn stand_in;
  bool flips;
  bool losses;  // both, or none
};

// What both back ends are given.
struct Inputs {
  Floats h, thresholds, values, curves, rows, grad_quantized, grad_rows, grad_error, grad_entropy,
      grad_chance;
  std::unique_ptr<bool[]> flips;
};

Inputs inputs_of(const Case& test) {
  const int64_t tokens = test.pyramid.batch * tokens_per_image(test.pyramid) * test.dim;
  const int64_t plane =
      test.pyramid.batch * test.pyramid.height * test.pyramid.width * int64_t{test.dim};
  const int64_t lines = int64_t{test.rounds} * test.dim;
  const int scales = test.pyramid.num_scales;
  Inputs in = {random_floats(plane, 1),
               random_floats(lines * test.thresholds, 2),
               random_floats(lines * (test.thresholds + 1), 3),
               random_floats(lines * kCurveParts, 4),
               random_floats(tokens, 5),
               random_floats(plane, 6),
               random_floats(tokens, 7),
               random_floats(scales, 8),
               random_floats(scales, 9),
               random_floats(int64_t{scales} * test.dim, 10),
               nullptr};
  for (int r = 0; r < test.rounds; ++r) {  // ascending, the last channel with infinities
    for (int d = 0; d < test.dim; ++d) {
      Floats channel;
      const int64_t first = int64_t{r} * test.thresholds * test.dim + d;
      for (int i = 0; i < test.thresholds; ++i) {
        channel.push_back(in.thresholds[first + i * test.dim]);
      }
      std::sort(channel.begin(), channel.end());
      if (d == test.dim - 1 && test.thresholds > 1) channel.back() = INFINITY;
      for (int i = 0; i < test.thresholds; ++i) in.thresholds[first + i * test.dim] = channel[i];
    }
  }
  const Floats chance = random_floats(tokens, 11);
  in.flips.reset(new bool[chance.size()]);
  for (size_t i = 0; i < chance.size(); ++i) in.flips[i] = chance[i] > 1;
  return in;
}

ScalarLayout layout_of(const Case& test) {
  ScalarLayout layout = {};
  layout.dim = test.dim;
  layout.groups = test.groups;
  layout.thresholds = test.thresholds;
  layout.rounds = test.rounds;
  layout.stand_in = test.stand_in;
  for (int s = 0; s < test.pyramid.num_scales; ++s) {
    layout.round[s] = s % test.rounds;
    layout.slope[s] = 1.5 + s;
  }
  return layout;
}

ScalarTables<float> tables_of(const Inputs& in, StandIn stand_in) {
  const bool bent = stand_in == StandIn::kTanh || stand_in == StandIn::kClamp;
  return {in.thresholds.data(), in.values.data(), bent ? in.curves.data() : nullptr};
}

PackDigitsArgs pack_of(int64_t batch, int64_t tokens, int groups, int dim, int64_t base) {
  PackDigitsArgs pack = {batch, tokens, groups, dim, {}, nullptr, nullptr};
  int64_t place = 1;
  for (int d = 0; d < dim; ++d, place *= base) pack.place[d] = place;
  return pack;
}

struct Results {
  Floats quantized, rows, error, entropy, chance;
  Indices indices;
};

// `launch` a back end's scalar_quantize.
template <typename Launch>
Results quantize(const Case& test, const Inputs& in, bool keep_rows, const Launch& launch) {
  const int64_t tokens = tokens_per_image(test.pyramid), batch = test.pyramid.batch;
  const int scales = test.pyramid.num_scales;
  Results out = {poisoned<float>(in.h.size()),
                 poisoned<float>(keep_rows ? in.rows.size() : 0),
                 poisoned<float>(test.losses ? scales : 0),
                 poisoned<float>(test.losses ? scales : 0),
                 poisoned<float>(test.losses ? scales * test.dim : 0),
                 poisoned<int64_t>(batch * tokens * test.groups)};
  ScalarQuantizeArgs<float> args = {};
  args.pyramid = test.pyramid;
  args.layout = layout_of(test);
  args.tables = tables_of(in, test.stand_in);
  args.pack = pack_of(batch, tokens, test.groups, test.dim / test.groups, test.thresholds + 1);
  args.pack.indices = out.indices.data();
  args.h = in.h.data();
  args.flips = test.flips ? in.flips.get() : nullptr;
  args.quantized = out.quantized.data();
  args.rows = keep_rows ? out.rows.data() : nullptr;
  args.error = test.losses ? out.error.data() : nullptr;
  args.entropy = test.losses ? out.entropy.data() : nullptr;
  args.chance = test.losses ? out.chance.data() : nullptr;
  launch(args);
  return out;
}

void check_near(const Floats& got, const Floats& wanted, double tolerance, const char* name) {
  check_close(got, Vector(wanted.begin(), wanted.end()), tolerance, name);
}

void check_forward(const Case& test, const Inputs& in) {
  for (const bool keep_rows : {false, true}) {
    const Results wanted = quantize(test, in, keep_rows, [](const ScalarQuantizeArgs<float>& args) {
      cpu::scalar_quantize(args, cpu::thread_executor(1));
    });
    Results first;
    in_every_order([&](const char* order) {
      const Results got = quantize(test, in, keep_rows, [](const ScalarQuantizeArgs<float>& args) {
        CHECK(run(args, cuda::scalar_quantize_workspace_bytes, cuda::launch_scalar_quantize) ==
                  cudaSuccess,
              "launch");
      });
      if (first.indices.empty()) first = got;
      CHECK(same_bits(got.quantized, first.quantized) && same_bits(got.rows, first.rows) &&
                same_bits(got.error, first.error) && same_bits(got.entropy, first.entropy) &&
                same_bits(got.chance, first.chance),
            "%s (%s): other bits in another order", test.name, order);
      CHECK(got.indices == wanted.indices, "%s (%s): indices", test.name, order);
      check_near(got.rows, wanted.rows, 1e-5, test.name);
      check_near(got.quantized, wanted.quantized, 1e-5, test.name);
      check_near(got.error, wanted.error, 1e-4, test.name);
      check_near(got.entropy, wanted.entropy, 1e-4, test.name);
      check_near(got.chance, wanted.chance, 1e-5, test.name);
    });
  }
}

void check_backward(const Case& test, const Inputs& in) {
  // All gradients, that of the plane alone, and all but that.
  for (const int kind : {0, 1, 2}) {
    ScalarQuantizeBackwardArgs<float> args = {};
    args.pyramid = test.pyramid;
    args.layout = layout_of(test);
    args.tables = tables_of(in, test.stand_in);
    args.rows = in.rows.data();
    args.flips = test.flips ? in.flips.get() : nullptr;
    if (kind < 2) args.grad_quantized = in.grad_quantized.data();
    if (kind != 1) args.grad_rows = in.grad_rows.data();
    if (kind != 1 && test.losses) {
      args.grad_error = in.grad_error.data();
      args.grad_entropy = in.grad_entropy.data();
      args.grad_chance = in.grad_chance.data();
    }
    Floats wanted = poisoned<float>(in.h.size()), first;
    args.grad_h = wanted.data();
    cpu::scalar_quantize_backward(args, cpu::thread_executor(1));
    in_every_order([&](const char* order) {
      Floats got = poisoned<float>(in.h.size());
      args.grad_h = got.data();
      CHECK(run(args, cuda::scalar_quantize_backward_workspace_bytes,
                cuda::launch_scalar_quantize_backward) == cudaSuccess,
            "launch");
      if (first.empty()) first = got;
      CHECK(same_bits(got, first), "%s (%s): other bits in another order", test.name, order);
      check_near(got, wanted, 2e-5, test.name);
    });
  }
}

void check(Case test) {
  const Inputs in = inputs_of(test);
  for (const Upsampling upsampling : {Upsampling::kBicubic, Upsampling::kBilinear}) {
    test.pyramid.upsampling = upsampling;
    check_forward(test, in);
    check_backward(test, in);
  }
}

// Rows, round by round, with their gradient.
void check_rows(StandIn stand_in, int64_t count, bool indices, bool codes) {
  const Case test = {"rows", make_pyramid(count, 1, 1, {{1, 1}}), 3, 1, 4, 2, stand_in, false,
                     false};
  const Inputs in = inputs_of(test);
  ScalarRowsArgs<float> args = {};
  args.num_rows = count;
  args.layout = layout_of(test);
  args.tables = tables_of(in, stand_in);
  args.pack = pack_of(1, count * 2, 1, 3, 5);
  args.rows = in.rows.data();
  const auto outputs = [&](Floats& sums, Floats& by_round, Indices& tokens) {
    sums = poisoned<float>(count * 3);
    by_round = poisoned<float>(codes ? count * 2 * 3 : 0);
    tokens = poisoned<int64_t>(indices ? count * 2 : 0);
    args.quantized = sums.data();
    args.codes = codes ? by_round.data() : nullptr;
    args.pack.indices = indices ? tokens.data() : nullptr;
  };
  Floats sums, by_round, wanted_sums, wanted_by_round;
  Indices tokens, wanted_tokens;
  outputs(sums, by_round, tokens);
  CHECK(run(args, cuda::scalar_rows_workspace_bytes, cuda::launch_scalar_rows) == cudaSuccess,
        "launch");
  outputs(wanted_sums, wanted_by_round, wanted_tokens);
  cpu::scalar_rows(args, cpu::thread_executor(1));
  CHECK(tokens == wanted_tokens && same_bits(sums, wanted_sums) &&
            same_bits(by_round, wanted_by_round),
        "rows");
  ScalarRowsBackwardArgs<float> backward = {count,          args.layout,         args.tables,
                                            in.rows.data(), in.grad_rows.data(), sums.data()};
  CHECK(cuda::launch_scalar_rows_backward(backward, nullptr) == cudaSuccess, "launch");
  backward.grad_rows = wanted_sums.data();
  cpu::scalar_rows_backward(backward, cpu::thread_executor(1));
  check_near(sums, wanted_sums, 1e-5, "the gradient of rows");
}

}  // namespace

int main() {
  const Pyramid square = make_pyramid(2, 4, 4, {{1, 1}, {2, 2}, {3, 3}, {4, 4}});
  check({"signs", square, 5, 1, 1, 1, StandIn::kSame, true, true});
  check({"signs at unit length", square, 6, 2, 1, 2, StandIn::kUnit, true, true});
  check({"wide signs", make_pyramid(1, 17, 17, {{1, 1}, {17, 17}}), 40, 1, 1, 1, StandIn::kUnit,
         false, true});
  check({"levels", make_pyramid(1, 3, 5, {{3, 5}}), 6, 2, 7, 1, StandIn::kTanh, false, false});
  check({"clamped levels", make_pyramid(2, 4, 3, {{2, 3}, {2, 3}, {4, 1}, {4, 1}}), 3, 1, 4, 2,
         StandIn::kClamp, false, false});
  check({"larger than the plane", make_pyramid(1, 3, 4, {{5, 2}, {1, 1}, {2, 6}}), 2, 1, 1, 1,
         StandIn::kTanh, false, true});
  check({"blocks of channels", make_pyramid(100, 2, 2, {{1, 1}, {2, 2}}), 9, 3, 1, 1,
         StandIn::kUnit, true, false});

  check_rows(StandIn::kSame, 300, true, true);
  check_rows(StandIn::kTanh, 71, true, false);
  check_rows(StandIn::kClamp, 1, false, true);
  check_rows(StandIn::kTanh, 0, true, true);
  {  // Token indices of digits.
    PackDigitsArgs args = {3, 70, 2, 5, {1, 3, 9, 27, 81}, nullptr, nullptr};
    std::vector<int16_t> digits;
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
    CHECK(cuda::launch_scalar_quantize(args, nullptr, nullptr) == cudaErrorInvalidValue,
          "300 x 300");
    CHECK(emulation::launches() == launches, "launched");
  }
  return 0;
}
