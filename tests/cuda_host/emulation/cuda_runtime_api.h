// Stands in for the CUDA toolkit's header: the host API that csrc/cuda uses, on plain memory.
#pragma once

#include <cstddef>
#include <cstring>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

// Shared memory that a block may have: the least of the devices that the kernels are built for.
// Tests change it.
constexpr int kLeastSharedBytes = 99 * 1024, kMostSharedBytes = 227 * 1024;
inline int max_shared_bytes_per_block = kLeastSharedBytes;
constexpr int kMultiprocessors = 2;

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaFuncAttributes {
  int maxThreadsPerBlock;
};

// Of a kernel that does something on this device; one that does not has blocks of a warp.
inline int max_threads_per_block = 1024;

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->maxThreadsPerBlock = max_threads_per_block;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value =
      attribute == cudaDevAttrMultiProcessorCount ? kMultiprocessors : max_shared_bytes_per_block;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  if (bytes != 0) std::memset(memory, value, bytes);
  return cudaSuccess;
}
