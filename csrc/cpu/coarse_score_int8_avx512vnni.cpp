// Compiled with the flags of its instruction set; see coarse_score_int8_impl.h.
#if defined(__x86_64__)
#define TF_RANK_KERNELS int8_rank_avx512vnni
#include "coarse_score_int8_impl.h"
#endif
