// Compiled with the flags of its instruction set; see sampler_impl.h.
#if defined(__x86_64__)
#define TOKENFLOW_SAMPLE_ROW sample_row_avx2
#include "sampler_impl.h"
#endif
