// The emulation itself: each mistake that it is there to show, made on purpose.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cuda/device.cuh"
#include "support.h"

namespace {

using namespace tokenflow::cuda;

__global__ void neighbour_kernel(float* out, bool with_barrier, bool towards_higher) {
  float* shared = shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x);
  shared[i] = static_cast<float>(i);
  if (with_barrier) block_barrier();
  out[i] = shared[(i + (towards_higher ? 1 : 63)) % 64];
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) block_barrier();
}

__global__ void divergent_warp_kernel(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = shuffle_xor(1, 1);
  } else {
    out[threadIdx.x] = static_cast<int>(ballot(true));
  }
}

__global__ void shared_memory_kernel() { shared_memory<float>()[threadIdx.x] = 0; }

__global__ void warp_kernel(int* sums, unsigned* ballots, int* ups, unsigned* largest) {
  int value = static_cast<int>(threadIdx.x);
  for (int step = 16; step > 0; step /= 2) value += shuffle_xor(value, step);
  sums[threadIdx.x] = value;
  ballots[threadIdx.x] = ballot(threadIdx.x % 3 == 0);
  ups[threadIdx.x] = shuffle_up(static_cast<int>(threadIdx.x), 2);
  largest[threadIdx.x] = max_over_warp(0xfffffff0u ^ (threadIdx.x * 5 % 64));
}

// Every half is a float, and every float goes to the nearest half, the even one on a tie.
void check_halves() {
  float before = 0;
  for (unsigned i = 0; i < 0x7c00u; ++i) {
    const uint16_t half = static_cast<uint16_t>(i), odd = static_cast<uint16_t>(i & 1u);
    const float value = from_half(half), minus = from_half(static_cast<uint16_t>(i | 0x8000u));
    CHECK(to_half(value) == half && minus == -value && to_half(minus) == (i | 0x8000u), "%u", i);
    if (i > 0) {
      const float middle = before + (value - before) / 2;  // exact
      CHECK(value > before && to_half(middle) == half - odd, "%u", i);
      CHECK(to_half(std::nextafter(middle, value)) == half, "%u", i);
      CHECK(to_half(std::nextafter(middle, before)) == half - 1, "%u", i);
    }
    before = value;
  }
  CHECK(from_half(1) == std::ldexp(1.0f, -24) && from_half(0x3c00) == 1, "scale of halves");
  CHECK(
      from_half(0x7bff) == 65504 && std::isinf(from_half(0x7c00)) && std::isnan(from_half(0x7e00)),
      "the largest half");
  CHECK(to_half(65519.0f) == 0x7bff && to_half(65520.0f) == 0x7c00, "rounding to infinity");
  CHECK(std::isnan(from_half(to_half(std::nanf("")))), "NaN");
}

// out [16][8] = sum [16][8] + a [16][16] b [16][8], fragments as the PTX manual lists them.
__global__ void product_kernel(const float* a, const float* b, const float* sum, float* out) {
  const int group = lane_index() >> 2, in_group = lane_index() % 4;
  const auto pair = [](float low, float high) {
    return static_cast<unsigned>(to_half(low)) | static_cast<unsigned>(to_half(high)) << 16;
  };
  unsigned a_words[4], b_words[2];
  for (int i = 0; i < 8; i += 2) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = in_group * 2 + (i >= 4 ? 8 : 0);
    a_words[i / 2] = pair(a[row * 16 + column], a[row * 16 + column + 1]);
  }
  for (int i = 0; i < 4; i += 2) {
    const int row = in_group * 2 + (i >= 2 ? 8 : 0);
    b_words[i / 2] = pair(b[row * 8 + group], b[(row + 1) * 8 + group]);
  }
  float c[4];
  for (int i = 0; i < 4; ++i) {
    c[i] = sum[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  }
  multiply_add_16x8x16(c, a_words[0], a_words[1], a_words[2], a_words[3], b_words[0], b_words[1]);
  for (int i = 0; i < 4; ++i) {
    out[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = c[i];
  }
}

void check_products() {
  std::vector<float> a(256), b(128), sum(128), out(128);
  std::mt19937 random(5);
  const auto fill = [&](std::vector<float>& values) {  // small integers: nothing is rounded
    for (float& value : values) value = static_cast<float>(static_cast<int>(random() % 41) - 20);
  };
  test::in_every_order([&](const char* order) {
    fill(a);
    fill(b);
    fill(sum);
    CHECK(launch(product_kernel, dim3(1), 32, 0, nullptr, a.data(), b.data(), sum.data(),
                 out.data()) == cudaSuccess,
          "launch");
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        float wanted = sum[i * 8 + j];
        for (int k = 0; k < 16; ++k) wanted += a[i * 16 + k] * b[k * 8 + j];
        CHECK(out[i * 8 + j] == wanted, "%s: (%d, %d) is %g, not %g", order, i, j,
              static_cast<double>(out[i * 8 + j]), static_cast<double>(wanted));
      }
    }
  });
  // What does not fit beside the largest, 2^24, is cut from each addend: 5/2, 5/2 and 7/2 count 2
  // each, and 7/4 nothing.
  std::fill(a.begin(), a.end(), 0.0f);
  std::fill(b.begin(), b.end(), 1.0f);
  std::fill(sum.begin(), sum.end(), 16777216.0f);
  for (int i = 0; i < 16; ++i) {
    a[i * 16] = a[i * 16 + 7] = 2.5f;
    a[i * 16 + 8] = 3.5f;
    a[i * 16 + 15] = 1.75f;
  }
  test::in_every_order([&](const char* order) {
    CHECK(launch(product_kernel, dim3(1), 32, 0, nullptr, a.data(), b.data(), sum.data(),
                 out.data()) == cudaSuccess,
          "launch");
    for (const float value : out) {
      CHECK(value == 16777222.0f, "%s: %.9g", order, static_cast<double>(value));
    }
  });
}

enum class Mistake { kNone, kNoWait, kWaitForTooFew, kNoBarrier, kTooEarly };

// Brings two runs of 64 vectors through one place in shared memory; a thread reads what another
// copied.
__global__ void copy_kernel(const uint4* from, unsigned* out, Mistake mistake) {
  uint4* shared = shared_memory<uint4>();
  const int i = static_cast<int>(threadIdx.x);
  for (int run = 0; run < 2; ++run) {
    copy_async(shared + i, from + run * 64 + i);
    commit_copies();
    if (mistake == Mistake::kWaitForTooFew) {
      wait_for_copies<1>();
    } else if (mistake != Mistake::kNoWait) {
      wait_for_copies<0>();
    }
    if (mistake != Mistake::kNoBarrier) block_barrier();
    out[run * 64 + i] = shared[(i + 33) % 64].y;
    if (mistake != Mistake::kTooEarly) block_barrier();
  }
}

void check_copies() {
  std::vector<uint4> from(128);
  std::vector<unsigned> wanted(128), out(128);
  for (unsigned i = 0; i < 128; ++i) {
    from[i] = {0, 1000 + i, 0, 0};
    wanted[i / 64 * 64 + (i % 64 + 31) % 64] = 1000 + i;
  }
  for (const Mistake mistake : {Mistake::kNone, Mistake::kNoWait, Mistake::kWaitForTooFew,
                                Mistake::kNoBarrier, Mistake::kTooEarly}) {
    bool right = true;
    test::in_every_order([&](const char*) {
      CHECK(launch(copy_kernel, dim3(1), 64, 64 * sizeof(uint4), nullptr, from.data(), out.data(),
                   mistake) == cudaSuccess,
            "launch");
      right = right && out == wanted;
    });
    CHECK(right == (mistake == Mistake::kNone), "mistake %d %s", static_cast<int>(mistake),
          right ? "does not show" : "was not made");
  }
}

// Products of a warpgroup with codes that come one after another through two places.
enum class Slip { kNone, kNoFilled, kWrongPhase, kNoEmptied, kEarlyEmptied, kNoWait, kWrongMatrix };

struct Places {
  uint4 operands[2][256];  // 128 vectors of 16 columns each
  PhaseBarrier filled[2];
  PhaseBarrier emptied[2];
};

// out [runs][64][128] = a [64][16] b [runs][128][16]; a lies as a warp takes it, and b as
// described.
__global__ void warpgroup_kernel(const uint4* a, const uint4* b, int runs, float* out, Slip slip) {
  Places& places = *shared_memory<Places>();
  const int lane = lane_index(), warp = warp_index();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      set_up_barrier(&places.filled[i], 1);
      set_up_barrier(&places.emptied[i], 4);
    }
    publish_barriers();
  }
  block_barrier();
  const auto fetch = [&](int run) {
    const int place = run % 2;
    if (run >= 2 && slip != Slip::kNoEmptied) {
      wait_for_phase(&places.emptied[place], static_cast<unsigned>(run / 2 - 1) & 1u);
    }
    arrive_expecting(&places.filled[place], sizeof(places.operands[place]));
    copy_bulk(places.operands[place], b + run * 256, sizeof(places.operands[place]),
              &places.filled[place]);
  };
  if (threadIdx.x == 0) fetch(0);
  for (int run = 0; run < runs; ++run) {
    const int place = run % 2;
    if (threadIdx.x == 0 && run + 1 < runs) fetch(run + 1);
    warp_barrier();
    const unsigned phase = static_cast<unsigned>(run / 2) & 1u;
    if (slip != Slip::kNoFilled) {
      wait_for_phase(&places.filled[place], slip == Slip::kWrongPhase ? phase ^ 1u : phase);
    }
    if (slip == Slip::kEarlyEmptied && lane == 0) arrive(&places.emptied[place]);
    float sums[8][2][1][4];
    for (auto& part : sums) {
      for (auto& matrix : part) {
        for (float& sum : matrix[0]) sum = 1e6f;
      }
    }
    begin_products();
    const uint64_t b_here = describe_operand(places.operands[place]);
    for (int twice = 0; twice < 2; ++twice) {
      multiply_add_64x128x16(sums, a[warp * 32 + lane],
                             slip == Slip::kWrongMatrix ? b_here ^ uint64_t{1} << 16 : b_here,
                             twice == 1);
    }
    if (slip != Slip::kNoWait) wait_for_products(sums);
    if (slip != Slip::kEarlyEmptied && lane == 0) arrive(&places.emptied[place]);
    for (int i = 0; i < 64; ++i) {
      const int row = warp * 16 + lane / 4 + i % 4 / 2 * 8;
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      out[(run * 64 + row) * 128 + column] = sums[i / 8][i / 4 % 2][0][i % 4];
    }
  }
}

void check_warpgroups() {
  constexpr int kRuns = 5;
  std::mt19937 random(6);
  std::vector<float> a(64 * 16), b(kRuns * 128 * 16), wanted(kRuns * 64 * 128);
  for (float& value : a) value = static_cast<float>(static_cast<int>(random() % 41) - 20);
  for (float& value : b) value = static_cast<float>(static_cast<int>(random() % 41) - 20);
  for (int i = 0; i < kRuns * 64 * 128; ++i) {
    const int run = i / (64 * 128), row = i / 128 % 64, column = i % 128;
    for (int k = 0; k < 16; ++k) {
      wanted[i] += 2 * a[row * 16 + k] * b[(run * 128 + column) * 16 + k];
    }
  }
  std::vector<uint4> a_packed(4 * 32), b_packed(kRuns * 256);
  const auto pair = [](const float* values) {
    return static_cast<unsigned>(to_half(values[0])) | static_cast<unsigned>(to_half(values[1]))
                                                           << 16;
  };
  for (int i = 0; i < 4 * 32; ++i) {
    const float* row = &a[(i / 32 * 16 + i % 32 / 4) * 16 + i % 4 * 2];
    a_packed[i] = {pair(row), pair(row + 8 * 16), pair(row + 8), pair(row + 8 * 16 + 8)};
  }
  for (int i = 0; i < kRuns * 256; ++i) {  // matrices of 8 x 8: a row is 16 bytes
    const int matrix = i / 8, vector = matrix / 2 * 8 + i % 8;
    const float* columns = &b[vector * 16 + matrix % 2 * 8];
    b_packed[i] = {pair(columns), pair(columns + 2), pair(columns + 4), pair(columns + 6)};
  }
  for (const Slip slip : {Slip::kNone, Slip::kNoFilled, Slip::kWrongPhase, Slip::kNoEmptied,
                          Slip::kEarlyEmptied, Slip::kNoWait, Slip::kWrongMatrix}) {
    bool right = true;
    test::in_every_order([&](const char*) {
      std::vector<float> out = test::poisoned<float>(kRuns * 64 * 128);
      try {
        CHECK(launch(warpgroup_kernel, dim3(1), 128, sizeof(Places), nullptr, a_packed.data(),
                     b_packed.data(), kRuns, out.data(), slip) == cudaSuccess,
              "launch");
      } catch (const emulation::Error& error) {
        std::printf("  caught: %s\n", error.what());
        right = false;
      }
      right = right && out == wanted;
    });
    CHECK(right == (slip == Slip::kNone), "slip %d %s", static_cast<int>(slip),
          right ? "does not show" : "was not made");
  }
}

__global__ void misaligned_copy_kernel(const unsigned char* from) {
  copy_async(shared_memory<uint4>(), reinterpret_cast<const uint4*>(from + 8));
}

__global__ void misaligned_vector_kernel(bool stores) {
  unsigned char* shared = shared_memory<unsigned char>();
  store_vector(shared, uint4{1, 2, 3, 4});
  if (stores) {
    store_vector(shared + 4, uint2{});
  } else {
    (void)load_vector<uint4>(shared + 8);
  }
}

std::vector<float> neighbours(bool with_barrier, bool towards_higher) {
  std::vector<float> out(64);
  CHECK(launch(neighbour_kernel, dim3(1), 64, 64 * sizeof(float), nullptr, out.data(), with_barrier,
               towards_higher) == cudaSuccess,
        "launch");
  return out;
}

template <typename Body>
bool throws(const Body& body) {
  try {
    body();
  } catch (const emulation::Error& error) {
    std::printf("  caught: %s\n", error.what());
    return true;
  }
  return false;
}

}  // namespace

int main() {
  for (const bool towards_higher : {false, true}) {
    bool shown = false;
    test::in_every_order([&](const char* order) {
      const std::vector<float> out = neighbours(true, towards_higher);
      for (int i = 0; i < 64; ++i) {
        CHECK(out[i] == static_cast<float>((i + (towards_higher ? 1 : 63)) % 64), "%s", order);
      }
      // Where nothing was written yet there is NaN, which compares unequal.
      shown = shown || neighbours(false, towards_higher) != out;
    });
    CHECK(shown, "a missing barrier does not show");
  }
  CHECK(throws([] { (void)launch(divergent_barrier_kernel, dim3(1), 64, 0, nullptr); }),
        "a barrier that not all threads reach");
  CHECK(throws([] {
          std::vector<int> out(32);
          (void)launch(divergent_warp_kernel, dim3(1), 32, 0, nullptr, out.data());
        }),
        "lanes at different operations");
  CHECK(launch(shared_memory_kernel, dim3(1), 32, 100 * 1024, nullptr) == cudaErrorInvalidValue,
        "more shared memory than there is");
  // What a kernel may have is shared by all threads: no launch leaves less than another needs.
  for (const size_t kibibytes : {60, 50}) {
    CHECK(launch(shared_memory_kernel, dim3(1), 32, kibibytes * 1024, nullptr) == cudaSuccess &&
              emulation::allowed_shared_bytes(reinterpret_cast<const void*>(
                  shared_memory_kernel)) == static_cast<size_t>(max_shared_bytes_per_block),
          "a launch with %zu KiB sets the kernel's limit to the most there is", kibibytes);
  }

  CHECK(throws([] {
          alignas(16) static const unsigned char bytes[32] = {};
          (void)launch(misaligned_copy_kernel, dim3(1), 1, 16, nullptr, &bytes[0]);
        }),
        "a copy that is not aligned");
  for (const bool stores : {false, true}) {
    CHECK(throws([&] { (void)launch(misaligned_vector_kernel, dim3(1), 1, 32, nullptr, stores); }),
          "a vector that is not aligned");
  }
  check_halves();
  check_products();
  check_copies();
  check_warpgroups();

  test::in_every_order([](const char* order) {
    std::vector<int> sums(64), ups(64);
    std::vector<unsigned> ballots(64), largest(64), most(2);
    CHECK(launch(warp_kernel, dim3(1), 64, 0, nullptr, sums.data(), ballots.data(), ups.data(),
                 largest.data()) == cudaSuccess,
          "launch");
    for (unsigned i = 0; i < 64; ++i) {
      most[i / 32] = std::max(most[i / 32], 0xfffffff0u ^ (i * 5 % 64));
    }
    for (int i = 0; i < 64; ++i) {
      unsigned wanted = 0;
      for (int lane = 0; lane < 32; ++lane) {
        if ((i / 32 * 32 + lane) % 3 == 0) wanted |= 1u << lane;
      }
      CHECK(sums[i] == (i < 32 ? 496 : 1520), "%s: %d", order, sums[i]);
      CHECK(ballots[i] == wanted, "%s: %u", order, ballots[i]);
      CHECK(ups[i] == (i % 32 < 2 ? i : i - 2), "%s: %d", order, ups[i]);
      CHECK(largest[i] == most[i / 32], "%s: %u", order, largest[i]);
    }
  });
  return 0;
}
