// Per-group l2 normalisation of one row, forward and backward, as torch.nn.functional.normalize.
#pragma once

#include "codebook.h"

namespace tokenflow {

// out_g = row_g / max(|row_g|, eps); a copy where the layout does not normalise. May be in place.
template <typename T>
TOKENFLOW_HOST_DEVICE void normalize_row(const T* row, const CodebookLayout& layout, T* out) {
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const double norm = layout.l2_norm ? group_norm(squared_norm(row, begin, end), true) : 1.0;
    for (int d = begin; d < end; ++d) {
      out[d] = static_cast<T>(static_cast<double>(row[d]) / norm);
    }
  }
}

// Transpose of normalisation's Jacobian at one group of a row: what it needs of the whole group.
struct GroupTranspose {
  bool l2_norm;
  double scale;
  double projection;  // <unit row, grad>
};

// From the group's squared length and <row, grad>. Where the length is at most eps the group is
// only scaled by 1 / eps.
TOKENFLOW_HOST_DEVICE GroupTranspose group_transpose(double squared_norm, double dot,
                                                     bool l2_norm) {
  const double scale = inverse_norm(squared_norm, l2_norm);
  const bool projects = squared_norm > kNormEpsilon * kNormEpsilon;
  return {l2_norm, scale, projects ? dot * scale : 0.0};
}

// A channel of the row's gradient, from the row's channel and that of the gradient.
TOKENFLOW_HOST_DEVICE double apply(const GroupTranspose& transpose, double row, double grad) {
  if (!transpose.l2_norm) return grad;
  return (grad - row * transpose.scale * transpose.projection) * transpose.scale;
}

// grad_row = the transpose at `row`, applied to grad. May be in place (grad_row == grad).
template <typename T>
TOKENFLOW_HOST_DEVICE void normalize_row_backward(const T* row, const T* grad,
                                                  const CodebookLayout& layout, T* grad_row) {
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    double dot = 0;
    for (int d = begin; d < end; ++d) {
      dot += static_cast<double>(row[d]) * static_cast<double>(grad[d]);
    }
    const GroupTranspose transpose =
        group_transpose(squared_norm(row, begin, end), dot, layout.l2_norm);
    for (int d = begin; d < end; ++d) {
      grad_row[d] = static_cast<T>(
          apply(transpose, static_cast<double>(row[d]), static_cast<double>(grad[d])));
    }
  }
}

}  // namespace tokenflow
