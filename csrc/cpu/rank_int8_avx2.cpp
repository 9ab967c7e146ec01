// Compiled with the flags of its instruction set; see rank_int8_impl.h.
#if defined(__x86_64__)
#define TF_RANK_KERNELS int8_rank_avx2
#include "rank_int8_impl.h"
#endif
