// What a formula needs to be compiled for both back ends.
#pragma once

#if defined(__CUDACC__)
#define TOKENFLOW_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Internal linkage: the CPU kernels are compiled once per instruction set, and a shared inline
// symbol would let the linker hand AVX-512 code to a machine without it.
#define TOKENFLOW_HOST_DEVICE static inline __attribute__((always_inline))
#endif
