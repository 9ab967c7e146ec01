// The emulation itself: each mistake that it is there to show, made on purpose.
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

__global__ void past_the_end_kernel() { shared_memory<float>()[threadIdx.x] = 0; }

__global__ void warp_kernel(int* sums, unsigned* ballots, int* ups) {
  int value = static_cast<int>(threadIdx.x);
  for (int step = 16; step > 0; step /= 2) value += shuffle_xor(value, step);
  sums[threadIdx.x] = value;
  ballots[threadIdx.x] = ballot(threadIdx.x % 3 == 0);
  ups[threadIdx.x] = shuffle_up(static_cast<int>(threadIdx.x), 2);
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
  CHECK(launch(past_the_end_kernel, dim3(1), 32, 100 * 1024, nullptr) == cudaErrorInvalidValue,
        "more shared memory than there is");

  test::in_every_order([](const char* order) {
    std::vector<int> sums(64), ups(64);
    std::vector<unsigned> ballots(64);
    CHECK(launch(warp_kernel, dim3(1), 64, 0, nullptr, sums.data(), ballots.data(), ups.data()) ==
              cudaSuccess,
          "launch");
    for (int i = 0; i < 64; ++i) {
      unsigned wanted = 0;
      for (int lane = 0; lane < 32; ++lane) {
        if ((i / 32 * 32 + lane) % 3 == 0) wanted |= 1u << lane;
      }
      CHECK(sums[i] == (i < 32 ? 496 : 1520), "%s: %d", order, sums[i]);
      CHECK(ballots[i] == wanted, "%s: %u", order, ballots[i]);
      CHECK(ups[i] == (i % 32 < 2 ? i : i - 2), "%s: %d", order, ups[i]);
    }
  });
  return 0;
}
