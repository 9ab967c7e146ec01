// Compiled with the compiler's default flags; see kernels_impl.h.
#define TOKENFLOW_KERNEL_TABLE portable_kernels
#include "kernels_impl.h"
