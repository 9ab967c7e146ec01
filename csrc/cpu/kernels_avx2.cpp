// Compiled with the flags of its instruction set; see kernels_impl.h.
#if defined(__x86_64__)
#define TOKENFLOW_KERNEL_TABLE avx2_kernels
#include "kernels_impl.h"
#endif
