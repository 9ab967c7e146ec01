// Drawing codes by their closeness on the CPU (see common/gumbel.h).
#pragma once

#include "../common/gumbel.h"
#include "executor.h"

namespace tokenflow::cpu {

template <typename T>
void sample_code(const SampleCodeArgs<T>& args, const Executor& executor);

}  // namespace tokenflow::cpu
