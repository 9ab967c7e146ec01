// The sampler on the CPU (see common/sampling.h).
#pragma once

#include "../common/sampling.h"
#include "executor.h"

namespace tokenflow::cpu {

// Draws a code for every row. Rows are shared out to threads; the result does not depend on how.
void sample(const SampleArgs& args, const Executor& executor);

}  // namespace tokenflow::cpu
