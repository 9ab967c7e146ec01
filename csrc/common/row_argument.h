// Arguments that are one value for all rows of a call, or one for each.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace tokenflow {

// Kernels find the values in memory or in their arguments.
template <typename T>
struct RowArgument {
  const T* values;  // memory of the back end's device, or null
  int64_t stride;   // 1: a value for each row, 0: one for all
  T value;          // for all, where values is null
};

template <typename T>
TOKENFLOW_HOST_DEVICE T value_at(const RowArgument<T>& argument, int64_t row) {
  return argument.values ? argument.values[row * argument.stride] : argument.value;
}

template <typename T>
TOKENFLOW_HOST_DEVICE bool is_one_for_all(const RowArgument<T>& argument) {
  return argument.values == nullptr || argument.stride == 0;
}

// Where in its seed's stream a row draws. With one seed and one offset for all rows, row r draws at
// offset + r.
TOKENFLOW_HOST_DEVICE uint64_t stream_position(const RowArgument<int64_t>& seed,
                                               const RowArgument<int64_t>& offset, int64_t row) {
  const uint64_t position = static_cast<uint64_t>(value_at(offset, row));
  const bool shared = is_one_for_all(seed) && is_one_for_all(offset);
  return shared ? position + static_cast<uint64_t>(row) : position;
}

}  // namespace tokenflow
