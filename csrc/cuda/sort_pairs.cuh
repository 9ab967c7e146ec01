// A stable sort of (index, row number) by index.
#pragma once

#include "device.cuh"
#include "workspace.h"

namespace tokenflow::cuda {

// Scratch of a sort.
struct PairSort {
  uint32_t* keys[2];  // pairs before and after a pass, in turns
  uint32_t* rows[2];
  int tiles;
  int rounds;
  int* digit_counts;
  int* num_pairs;

  PairSort(Workspace& workspace, int64_t num_rows);
};

struct SortedPairs {
  const uint32_t* keys;
  const uint32_t* rows;
  const int* num_pairs;  // rows whose index is below 0 or not below `codes` are dropped
};

// `codes` is at most 2^30, num_rows positive and below 2^31. Sets chunks_done [chunks] to zero on
// the way, which spares a launch.
cudaError_t launch_sort_pairs(const PairSort& sort, const int64_t* indices, int64_t codes,
                              int64_t num_rows, int* chunks_done, int64_t chunks,
                              SortedPairs* pairs, cudaStream_t stream);

}  // namespace tokenflow::cuda
