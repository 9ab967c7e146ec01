// The quantizer on the CPU: entry points over plain memory (see common/quantizer_args.h), T float
// or double. float computes coarse scores with the machine's widest vectors and decides close ones
// in float64; double is the plain algorithm, for gradient checks.
#pragma once

#include <cstdint>

#include "../common/quantizer_args.h"
#include "executor.h"

namespace tokenflow::cpu {

// The first row of the codebook that holds a NaN or an infinity, or -1.
template <typename T>
int64_t first_nonfinite_code(const CodebookLayout& layout, const T* codebook,
                             const Executor& executor);

template <typename T>
void nearest_code(const NearestCodeArgs<T>& args, const Executor& executor);

template <typename T>
void quantize(const QuantizeArgs<T>& args, const Executor& executor);

template <typename T>
void quantize_backward(const QuantizeBackwardArgs<T>& args, const Executor& executor);

template <typename T>
void pyramid_rows(const PyramidRowsArgs<T>& args, const Executor& executor);

template <typename T>
void decode(const DecodeArgs<T>& args, const Executor& executor);

template <typename T>
void segment_sum(const SegmentSumArgs<T>& args, const Executor& executor);

}  // namespace tokenflow::cpu
