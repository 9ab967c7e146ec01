// Per-group l2 normalisation of one row, forward and backward, as torch.nn.functional.normalize.
#pragma once

#include "codebook.h"

namespace tokenflow {

// out_g = row_g / max(|row_g|, eps); a copy where the layout does not normalise. May be in place.
template <typename T>
TF_HOST_DEVICE void normalize_row(const T* row, const CodebookLayout& layout, T* out) {
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const double norm = layout.l2_norm ? group_norm(squared_norm(row, begin, end), true) : 1.0;
    for (int d = begin; d < end; ++d) {
      out[d] = static_cast<T>(static_cast<double>(row[d]) / norm);
    }
  }
}

// grad_row = transpose of normalize_row's Jacobian at `row`, applied to grad. May be in place
// (grad_row == grad). Where the length is at most eps the row is only scaled by 1 / eps.
template <typename T>
TF_HOST_DEVICE void normalize_row_backward(const T* row, const T* grad,
                                           const CodebookLayout& layout, T* grad_row) {
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    if (!layout.l2_norm) {
      for (int d = begin; d < end; ++d) grad_row[d] = grad[d];
      continue;
    }
    const double squared = squared_norm(row, begin, end);
    const double scale = inverse_norm(squared, true);
    double projection = 0;  // <unit row, grad>
    if (squared > kNormEpsilon * kNormEpsilon) {
      for (int d = begin; d < end; ++d) {
        projection += static_cast<double>(row[d]) * scale * static_cast<double>(grad[d]);
      }
    }
    for (int d = begin; d < end; ++d) {
      const double unit = static_cast<double>(row[d]) * scale;
      grad_row[d] = static_cast<T>((static_cast<double>(grad[d]) - unit * projection) * scale);
    }
  }
}

}  // namespace tokenflow
