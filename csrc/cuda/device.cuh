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

// Every thread of the block.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// What this thread wrote before is seen by whoever sees what it writes after.
__device__ __forceinline__ void device_fence() { __threadfence(); }

// Every lane of the warp takes part in these.
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kFullMask, value, mask);
}

template <typename T>
__device__ __forceinline__ T shuffle_up(T value, int delta) {
  return __shfl_up_sync(kFullMask, value, delta);
}

__device__ __forceinline__ unsigned ballot(bool predicate) {
  return __ballot_sync(kFullMask, predicate);
}

__device__ __forceinline__ int count_bits(unsigned mask) { return __popc(mask); }

// Position of the lowest set bit of a mask that has one.
__device__ __forceinline__ int lowest_bit(unsigned mask) {
  return __ffs(static_cast<int>(mask)) - 1;
}

__device__ __forceinline__ int atomic_add(int* address, int value) {
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

// Maximum of floats that are not negative (or NaN with the sign cleared, which wins): their bit
// patterns are ordered as integers, and the result does not depend on the order of arrival.
__device__ __forceinline__ void atomic_max_not_negative(float* address, float value) {
  atomicMax(reinterpret_cast<int*>(address), __float_as_int(fabsf(value)));
}

// Launches and reports what the launch itself says; the error does not linger for a later caller.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int block, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedWithoutAsking) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
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
#define TF_CUDA_TRY(expression)                   \
  do {                                            \
    const cudaError_t tf_error = (expression);    \
    if (tf_error != cudaSuccess) return tf_error; \
  } while (false)
