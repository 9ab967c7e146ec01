#define TOKENFLOW_SAMPLE_ROW sample_row_portable
#include "sampler_impl.h"
