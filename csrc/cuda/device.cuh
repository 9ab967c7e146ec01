// The hardware, as the kernels use it. Nothing else in csrc/cuda names a CUDA intrinsic, so that
// tests/cuda_host can put its own <cuda_runtime.h> in front and run the same source on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace tokenflow::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }

__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// The block's dynamic shared memory; kernels use no other.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
#else
  return static_cast<T*>(emulation::shared_memory());
#endif
}

// 8 or 16 bytes (uint2, uint4) in one access, at a position aligned to as many.
template <typename Vector>
__device__ __forceinline__ Vector load_vector(const void* from) {
#if defined(__CUDACC__)
  return *static_cast<const Vector*>(from);
#else
  return emulation::load_vector<Vector>(from);
#endif
}

template <typename Vector>
__device__ __forceinline__ void store_vector(void* to, const Vector& vector) {
#if defined(__CUDACC__)
  *static_cast<Vector*>(to) = vector;
#else
  emulation::store_vector(to, vector);
#endif
}

// Every thread of the block.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// What this thread wrote before is seen by whoever sees what it writes after.
__device__ __forceinline__ void device_fence() { __threadfence(); }

// Every lane of the warp takes part in these.
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kFullMask, value, mask);
}

// Sum over kLanes neighbouring lanes, the same bits in each of them.
template <int kLanes>
__device__ __forceinline__ double sum_over_lanes(double value) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// Largest over the warp's lanes `step` apart.
template <typename T>
__device__ __forceinline__ T max_over_warp(T x, int step) {
  for (int mask = kWarpSize / 2; mask >= step; mask /= 2) {
    const T other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}

// Largest over the warp, by one instruction.
__device__ __forceinline__ uint32_t max_over_warp(uint32_t x) {
  return __reduce_max_sync(kFullMask, x);
}

// What lane `lane` holds.
template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(kFullMask, value, lane);
}

template <typename T>
__device__ __forceinline__ T shuffle_up(T value, int delta) {
  return __shfl_up_sync(kFullMask, value, delta);
}

__device__ __forceinline__ unsigned ballot(bool predicate) {
  return __ballot_sync(kFullMask, predicate);
}

__device__ __forceinline__ int float_as_int(float value) { return __float_as_int(value); }

__device__ __forceinline__ float int_as_float(int bits) { return __int_as_float(bits); }

__device__ __forceinline__ int count_bits(unsigned mask) { return __popc(mask); }

__device__ __forceinline__ int leading_zeros(uint32_t word) {
  return __clz(static_cast<int>(word));
}

// Position of the lowest set bit of a mask that has one.
__device__ __forceinline__ int lowest_bit(unsigned mask) {
  return __ffs(static_cast<int>(mask)) - 1;
}

__device__ __forceinline__ int atomic_add(int* address, int value) {
  return atomicAdd(address, value);
}

// What was there before.
__device__ __forceinline__ uint32_t atomic_add(uint32_t* address, uint32_t value) {
  return atomicAdd(address, value);
}

__device__ __forceinline__ void atomic_add(int64_t* address, int64_t value) {
  // Two's complement addition is the same for both signs.
  atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}

// The sum depends on the order of arrival: only where a caller has asked for that.
__device__ __forceinline__ void atomic_add(float* address, float value) {
  atomicAdd(address, value);
}

__device__ __forceinline__ void atomic_max(int* address, int value) { atomicMax(address, value); }

// Maximum of numbers that are not negative: their bit patterns are ordered as integers, and the
// result does not depend on the order of arrival. What is there already can only grow, so an older
// copy of it shows as well that there is nothing to do: nearly all callers then leave it at a load.
__device__ __forceinline__ void atomic_max_not_negative(float* address, float value) {
  if (value > *static_cast<volatile float*>(address)) {
    atomicMax(reinterpret_cast<int*>(address), __float_as_int(value));
  }
}

__device__ __forceinline__ void atomic_max_not_negative(double* address, double value) {
  if (value > *static_cast<volatile double*>(address)) {
    atomicMax(reinterpret_cast<long long*>(address), __double_as_longlong(value));
  }
}

// Compute capabilities 8.6 and 8.9 have two lanes for float64 a multiprocessor, 8.0 and 9.0 have 32
// and 64.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
constexpr bool kFewFloat64Lanes = true;
#else
constexpr bool kFewFloat64Lanes = false;
#endif

// The number itself, of which the compiler knows nothing: what is computed from it stays where it
// is needed and holds no register before.
__device__ __forceinline__ int64_t opaque(int64_t value) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(value));
#endif
  return value;
}

__device__ __forceinline__ uint32_t opaque(uint32_t value) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// --- Half precision and tensor cores ---

// The nearest half, ties to even.
__device__ __forceinline__ uint16_t to_half(float value) {
#if defined(__CUDACC__)
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
#else
  return emulation::to_half(value);
#endif
}

__device__ __forceinline__ float from_half(uint16_t half) {
#if defined(__CUDACC__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  return emulation::from_half(half);
#endif
}

// The two halves of a word, the lower one first.
__device__ __forceinline__ float2 from_halves(unsigned word) {
#if defined(__CUDACC__)
  float2 values;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2;\n\t"
      "cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(values.x), "=f"(values.y)
      : "r"(word));
  return values;
#else
  return {emulation::from_half(static_cast<uint16_t>(word & 0xffffu)),
          emulation::from_half(static_cast<uint16_t>(word >> 16))};
#endif
}

// sum += A B with A [16][16] and B [16][8] of halves, summed in float32. With g = lane / 4 and
// t = lane % 4, a lane holds of A (row g: columns 2t, 2t + 1), (row g + 8: the same), (row g:
// columns 2t + 8, 2t + 9), (row g + 8: the same); of B (column g: rows 2t, 2t + 1), (rows 2t + 8,
// 2t + 9); and of the sum (row g: columns 2t, 2t + 1), (row g + 8: the same).
__device__ __forceinline__ void multiply_add_16x8x16(float (&sum)[4], unsigned a0, unsigned a1,
                                                     unsigned a2, unsigned a3, unsigned b0,
                                                     unsigned b1) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  emulation::multiply_add_16x8x16(sum, a0, a1, a2, a3, b0, b1);
#endif
}

// --- Copies to shared memory that run beside the thread ---

// 16 bytes, both positions aligned to 16.
__device__ __forceinline__ void copy_async(uint4* shared, const uint4* global) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
#else
  emulation::copy_async(shared, global);
#endif
}

// Closes the group of this thread's copies since the last one.
__device__ __forceinline__ void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::commit_copies();
#endif
}

// Waits for this thread's groups but the last kMayRun. Others see the copies after a barrier.
template <int kMayRun>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kMayRun) : "memory");
#else
  emulation::wait_for_copies(kMayRun);
#endif
}

// --- Compute capability 9.0 alone: products of four warps, and copies that report to a barrier ---

// Compiled for sm_90a, whose machine code no other compute capability runs. A kernel that uses what
// follows does nothing where this is false.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

constexpr int kWarpgroupThreads = 4 * kWarpSize;

__device__ __forceinline__ void warp_barrier() { __syncwarp(kFullMask); }

__device__ __forceinline__ unsigned shared_address(const void* shared) {
#if defined(__CUDACC__)
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
#else
  return emulation::shared_address(shared);
#endif
}

// A barrier in shared memory. Its phase ends when as many arrivals as it was set up for have come,
// and all bytes that were announced. Phases are 0 and 1 in turn, from 0 on.
using PhaseBarrier = uint64_t;

// By one thread; publish_barriers and block_barrier must follow before any other use.
__device__ __forceinline__ void set_up_barrier(PhaseBarrier* barrier, unsigned arrivals) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#else
  emulation::set_up_barrier(barrier, arrivals);
#endif
}

// Shows barriers that this thread has set up to copies.
__device__ __forceinline__ void publish_barriers() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::
                   : "memory");
#endif
}

__device__ __forceinline__ void arrive(PhaseBarrier* barrier) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#else
  emulation::arrive(barrier, 0);
#endif
}

// Arrives, and announces bytes.
__device__ __forceinline__ void arrive_expecting(PhaseBarrier* barrier, unsigned bytes) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
#else
  emulation::arrive(barrier, bytes);
#endif
}

// Waits for the end of the phase `phase`, which is the running one or the one before.
__device__ __forceinline__ void wait_for_phase(PhaseBarrier* barrier, unsigned phase) {
#if defined(__CUDACC__)
  unsigned ended = 0;
  do {
    asm volatile(
        "{ .reg .pred ended;\n\t"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 ended, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, ended; }"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(phase)
        : "memory");
  } while (ended == 0);
#else
  emulation::wait_for_phase(barrier, phase);
#endif
}

// Copies `bytes` to shared memory and reports them to the barrier, which must expect them. Size and
// positions are multiples of 16. By one thread.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, unsigned bytes,
                                          PhaseBarrier* barrier) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#else
  emulation::copy_bulk(shared, global, bytes, barrier);
#endif
}

// Before the first product after a thread has touched its sums or operands otherwise.
__device__ __forceinline__ void begin_products() {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Describes 128 vectors of 16 columns in shared memory, from an address that is a multiple of 16:
// matrices of 8 vectors by 8 columns, in which a vector's columns are 16 bytes, one after the
// other. The second 8 columns are one matrix further, and the next 8 vectors two.
__device__ __forceinline__ uint64_t describe_operand(const void* shared) {
  constexpr uint64_t kMatrix = 128 >> 4;
  return (shared_address(shared) & 0x3ffffu) >> 4 | kMatrix << 16 | 2 * kMatrix << 32;
}

#if defined(__CUDACC__)
#define TOKENFLOW_SUMS(i)                                                                         \
  "+f"(sums[i][0][0][0]), "+f"(sums[i][0][0][1]), "+f"(sums[i][0][0][2]), "+f"(sums[i][0][0][3]), \
      "+f"(sums[i][1][0][0]), "+f"(sums[i][1][0][1]), "+f"(sums[i][1][0][2]),                     \
      "+f"(sums[i][1][0][3])
#endif

// sums = A B, or += where `adds`, by a warpgroup: A [64][16] of halves in registers, of which each
// warp has 16 rows and each lane the words of multiply_add_16x8x16, and B [16][128], as described,
// in shared memory. sums [j / 2][j % 2][0] are those of columns 8 j to 8 j + 7, a lane's as there.
// Runs beside the thread until wait_for_products; till then the sums and B are not to be touched.
__device__ __forceinline__ void multiply_add_64x128x16(float (&sums)[8][2][1][4], const uint4& a,
                                                       uint64_t b, bool adds) {
#if defined(__CUDACC__)
  asm volatile(
      "{ .reg .pred adds;\n\t"
      "setp.ne.b32 adds, %69, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, adds, 1, 1, 0; }"
      : TOKENFLOW_SUMS(0), TOKENFLOW_SUMS(1), TOKENFLOW_SUMS(2), TOKENFLOW_SUMS(3),
        TOKENFLOW_SUMS(4), TOKENFLOW_SUMS(5), TOKENFLOW_SUMS(6), TOKENFLOW_SUMS(7)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(adds ? 1 : 0)
      : "memory");
#else
  emulation::multiply_add_64x128x16(&sums[0][0][0][0], a.x, a.y, a.z, a.w, b, adds);
#endif
}

// Closes the group of products since the last one, and waits for all.
__device__ __forceinline__ void wait_for_products(float (&sums)[8][2][1][4]) {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;"
               : TOKENFLOW_SUMS(0), TOKENFLOW_SUMS(1), TOKENFLOW_SUMS(2), TOKENFLOW_SUMS(3),
                 TOKENFLOW_SUMS(4), TOKENFLOW_SUMS(5), TOKENFLOW_SUMS(6), TOKENFLOW_SUMS(7)
               :
               : "memory");
#else
  emulation::wait_for_products();
  (void)sums;
#endif
}

#undef TOKENFLOW_SUMS

// Bytes of dynamic shared memory that a block of the current device may ask for.
inline cudaError_t largest_shared_memory(int* bytes) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

inline cudaError_t num_multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// Launches and reports what the launch itself says; the error does not linger for a later caller.
//
// How much dynamic shared memory a kernel may have is state of the kernel, which all threads share.
// It is always set to the most there is: set to what a launch needs, another thread's launch of the
// same kernel could lower it in between.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int block, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedWithoutAsking) {
    int most = 0;
    error = largest_shared_memory(&most);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(block));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  }
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

}  // namespace tokenflow::cuda

// Leaves the function with the first error.
#define TOKENFLOW_CUDA_TRY(expression)        \
  do {                                        \
    const cudaError_t error_ = (expression);  \
    if (error_ != cudaSuccess) return error_; \
  } while (false)
