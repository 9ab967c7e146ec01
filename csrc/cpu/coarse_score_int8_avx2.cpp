// Compiled with the flags of its instruction set; see coarse_score_int8_impl.h.
#if defined(__x86_64__)
#define TOKENFLOW_COARSE_SCORE_KERNELS int8_coarse_score_avx2
#include "coarse_score_int8_impl.h"
#endif
