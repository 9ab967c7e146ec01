// Scalar quantization on the CPU (see common/scalar_args.h); T float or double.
#pragma once

#include "../common/scalar_args.h"
#include "executor.h"

namespace tokenflow::cpu {

template <typename T>
void scalar_quantize(const ScalarQuantizeArgs<T>& args, const Executor& executor);

template <typename T>
void scalar_quantize_backward(const ScalarQuantizeBackwardArgs<T>& args, const Executor& executor);

template <typename T>
void scalar_rows(const ScalarRowsArgs<T>& args, const Executor& executor);

template <typename T>
void scalar_rows_backward(const ScalarRowsBackwardArgs<T>& args, const Executor& executor);

void pack_digits(const PackDigitsArgs& args, const Executor& executor);

}  // namespace tokenflow::cpu
