// Runs CUDA kernels on one CPU thread. The threads of a block are fibers that run until they reach
// a barrier or a warp-wide operation; blocks run one after the other, or in shuffled order a few at
// a time.
//
// What it is made to show:
//   - a barrier that is missing: run the same launch with set_order(forward), (reverse) and
//     (shuffled). In the first two a thread sees either none or all of what its neighbours write
//     between two barriers; in the last, one warp runs as far ahead of the others as it can, and
//     one block of the others. One of them gives another result.
//   - a barrier or warp-wide operation that not all threads reach: the launch throws.
//   - shared memory used before it was written: it holds NaN (all bits set) at a block's start.
//   - a copy that nobody waited for, or that arrives while its place is still read: an asynchronous
//     copy arrives at the wait that covers it (forward), at once (reverse) or at either (shuffled).
//   - the same of copies that report to a barrier in shared memory, which otherwise arrive when no
//     thread of the block can go on, and of products that run beside the threads, which read
//     their operands and write their sums at the wait, at once, or at either.
//   - accesses out of bounds: AddressSanitizer sees the exact size of shared memory, too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>

namespace emulation {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3() = default;
  Dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}  // implicit, as dim3
};

enum class Order { kForward, kReverse, kShuffled };

// The order in which blocks start and fibers take turns, for all later launches.
void set_order(Order order, unsigned seed = 0);

// Kernels launched since the start of the program.
int64_t launches();

// What whole warps did together since then, shuffles and ballots and products of tensor cores: what
// a kernel's time follows where that depends on the data.
int64_t warp_operations();

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// --- For cuda_runtime.h
// ---------------------------------------------------------------------------

const Dim3& current_thread();
const Dim3& current_block();
void* shared_memory();

void allow_shared_bytes(const void* kernel, size_t bytes);
size_t allowed_shared_bytes(const void* kernel);

// Runs `thread` once for every thread of the grid.
void run_grid(Dim3 grid, unsigned block_threads, size_t shared_bytes,
              const std::function<void()>& thread);

void block_barrier();

constexpr int kWarp = 32;

// Posts `bytes` of this lane, waits for the whole warp and returns what all of its lanes posted,
// kSlotBytes apart.
constexpr size_t kSlotBytes = 48;
const unsigned char* post(unsigned mask, const char* operation, const void* value, size_t bytes);
int lane();

template <typename T, typename Source>
T exchange(unsigned mask, const char* operation, T value, Source source) {
  static_assert(sizeof(T) <= 8, "the hardware moves 32 or 64 bits");
  const unsigned char* slots = post(mask, operation, &value, sizeof(T));
  T result;
  std::memcpy(&result, slots + static_cast<size_t>(source(lane())) * kSlotBytes, sizeof(T));
  return result;
}

inline unsigned ballot(unsigned mask, bool predicate) {
  const unsigned char* slots = post(mask, "ballot", &predicate, sizeof(predicate));
  unsigned result = 0;
  for (int i = 0; i < kWarp; ++i) {
    if (slots[static_cast<size_t>(i) * kSlotBytes] != 0) result |= 1u << i;
  }
  return result;
}

inline unsigned largest(unsigned mask, unsigned value) {
  const unsigned char* slots = post(mask, "reduce_max", &value, sizeof(value));
  for (int i = 0; i < kWarp; ++i) {
    unsigned other;
    std::memcpy(&other, slots + static_cast<size_t>(i) * kSlotBytes, sizeof(other));
    if (other > value) value = other;
  }
  return value;
}

uint16_t to_half(float value);
float from_half(uint16_t half);

// The fragments of mma.m16n8k16 with halves and float32 sums. Of groups of 16 products (forward), 4
// (reverse) or 8 (shuffled) and the sum so far each is cut to the last bit of the largest, and the
// sum to float32: what different hardware does, at its coarsest.
void multiply_add_16x8x16(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                          unsigned b0, unsigned b1);

// Ends the launch where the position is not a multiple of the size.
void check_vector(const void* position, size_t bytes);

// What the memory was written as does not matter.
template <typename Vector>
Vector load_vector(const void* from) {
  check_vector(from, sizeof(Vector));
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

template <typename Vector>
void store_vector(void* to, const Vector& vector) {
  check_vector(to, sizeof(Vector));
  std::memcpy(to, &vector, sizeof(Vector));
}

void copy_async(void* shared, const void* global);  // 16 bytes
void commit_copies();
void wait_for_copies(int may_run);

unsigned shared_address(const void* shared);  // from the block's first byte

// Barriers in shared memory, 8 bytes each.
void set_up_barrier(uint64_t* barrier, unsigned arrivals);
void arrive(uint64_t* barrier, unsigned expected_bytes);
void wait_for_phase(uint64_t* barrier, unsigned phase);
void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier);

// The part of wgmma.m64n128k16 that is the warp's: its 16 rows of A, and sums [64] of a lane. The
// descriptor is without swizzling.
void multiply_add_64x128x16(float* sums, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                            uint64_t descriptor, bool adds);
void wait_for_products();

}  // namespace emulation
