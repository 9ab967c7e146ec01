// Sums of rows by index, and the codebook's gradient by way of them.
#pragma once

#include "pyramid.cuh"

namespace tokenflow::cuda {

// A row of `grad`, the gradient of a normalised row of the codebook, becomes the gradient of the
// row itself; the work of a warp. Lane l reads and writes channels l, l + 32, ... of `grad` alone.
__device__ __forceinline__ void code_gradient_by_warp(const CodebookLayout& layout,
                                                      const float* code, float* grad) {
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const int skip = (lane_index() - begin) & (kWarpSize - 1);  // to this lane's first channel
    double squared = 0, dot = 0;
#pragma unroll 1  // a group is seldom wider than the warp
    for (int d = begin + skip; d < end; d += kWarpSize) {
      const double channel = static_cast<double>(code[d]);
      squared += channel * channel;
      dot += channel * static_cast<double>(grad[d]);
    }
    squared = sum_over_lanes<kWarpSize>(squared);
    dot = sum_over_lanes<kWarpSize>(dot);
    const GroupTranspose transpose = group_transpose(squared, dot, layout.l2_norm);
#pragma unroll 1
    for (int d = begin + skip; d < end; d += kWarpSize) {
      grad[d] = static_cast<float>(
          apply(transpose, static_cast<double>(code[d]), static_cast<double>(grad[d])));
    }
  }
}

// launch_segment_sum, and what a code has received goes back through the normalisation of its row
// of `codebook`. args.counts may be null.
cudaError_t launch_codebook_gradient(const SegmentSumArgs<float>& args,
                                     const CodebookLayout& layout, const float* codebook,
                                     void* workspace, cudaStream_t stream);

}  // namespace tokenflow::cuda
