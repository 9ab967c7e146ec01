// Compiled with the flags of its instruction set; see coarse_score_int8_impl.h.
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define TOKENFLOW_COARSE_SCORE_KERNELS int8_coarse_score_dotprod
#include "coarse_score_int8_impl.h"
#endif
