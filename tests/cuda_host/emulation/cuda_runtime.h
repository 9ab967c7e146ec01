// Stands in for <cuda_runtime.h>: the language and the intrinsics that csrc/cuda/device.cuh names,
// compiled as plain C++. See emulation.h for how a kernel runs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "cuda_runtime_api.h"
#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)

#define threadIdx (::emulation::current_thread())
#define blockIdx (::emulation::current_block())

using dim3 = ::emulation::Dim3;

struct alignas(8) float2 {
  float x, y;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > max_shared_bytes_per_block) return cudaErrorInvalidValue;
  ::emulation::allow_shared_bytes(kernel, static_cast<size_t>(bytes));
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const bool fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffffu &&
                    grid.y <= 65535 && grid.z <= 65535 && block.x > 0 && block.x <= 1024 &&
                    block.y == 1 && block.z == 1;
  const size_t allowed = ::emulation::allowed_shared_bytes(reinterpret_cast<const void*>(kernel));
  if (!fits || config->dynamicSmemBytes > allowed) return cudaErrorInvalidValue;
  // As on the device, every launch has its own copy of the parameters, 4 KiB at the most.
  std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  static_assert(sizeof(parameters) <= 4096, "kernel parameters are limited to 4 KiB");
  ::emulation::run_grid(grid, block.x, config->dynamicSmemBytes,
                        [&] { std::apply(kernel, parameters); });
  return cudaSuccess;
}

inline void __syncthreads() { ::emulation::block_barrier(); }

// Fibers run one at a time on one CPU thread: every write is seen at once.
inline void __threadfence() {}

inline void __syncwarp(unsigned mask) { (void)::emulation::ballot(mask, true); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return ::emulation::exchange(mask, "shfl_xor", value, [=](int lane) { return lane ^ lane_mask; });
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return ::emulation::exchange(mask, "shfl", value, [=](int) { return from & 31; });
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  return ::emulation::exchange(mask, "shfl_up", value,
                               [=](int lane) { return lane < delta ? lane : lane - delta; });
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  return ::emulation::ballot(mask, predicate);
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return ::emulation::largest(mask, value);
}

// The compiler may fuse a product with a sum, but not this one: it has to be stored first.
inline double __dmul_rn(double a, double b) {
  volatile double product = a * b;
  return product;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}

inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline long long __double_as_longlong(double value) {
  long long bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

template <typename T>
T atomicMax(T* address, T value) {
  const T before = *address;
  *address = before > value ? before : value;
  return before;
}
