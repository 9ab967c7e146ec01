// Arguments of the quantizer's entry points, the same for csrc/cpu and csrc/cuda. All pointers are
// to contiguous memory of the back end's device. T is float (both) or double (CPU).
//
// A codebook is [codes, dim], or several [books, codes, dim] (see CodebookLayout): then a pyramid's
// batch counts images times books, and what is said of a map is so of each of an image's.
//
// An index of -1 marks the tokens of a dropped scale; such tokens add nothing anywhere.
#pragma once

#include <cstdint>

#include "codebook.h"
#include "geometry.h"

namespace tokenflow {

// i* = argmin_i d_i for every row.
template <typename T>
struct NearestCodeArgs {
  CodebookLayout layout;
  const T* codebook;  // [books, codes, dim]
  int64_t num_rows;   // a book
  const T* rows;      // [books, num_rows, dim], not normalised
  int64_t* indices;   // out [books, num_rows]
};

// The whole residual loop.
template <typename T>
struct QuantizeArgs {
  Pyramid pyramid;
  CodebookLayout layout;
  const T* codebook;       // [books, codes, dim]
  const T* h;              // [batch, dim, height, width]
  const int64_t* dropped;  // one scale number, or < 0 for none; may be null
  T* quantized;            // out [batch, dim, height, width]
  int64_t* indices;        // out [batch, tokens]
  T* squared_error;        // out [books, scales]: mean over rows and channels of (q - z)^2, z
                           // normalised; 0 for a dropped scale
  int64_t* hits;           // out [books, codes]
};

// Gradients of the loop; recomputes it from the indices.
//   grad_h        = sum over scales of  pool^T normalise^T (upsample^T grad_quantized
//                                                           + 2 grad_row_error[s] (z - q) / n_s)
//   grad_codebook = normalise^T of the sum over rows of      2 grad_code_error[s] (q - z) / n_s
// with n_s = batch / books * area of scale s * dim, the number of squares in the scale's mean.
// A null output is not wanted; a null gradient is zero.
template <typename T>
struct QuantizeBackwardArgs {
  Pyramid pyramid;
  CodebookLayout layout;
  const T* codebook;         // [books, codes, dim]
  const T* h;                // [batch, dim, height, width]
  const int64_t* indices;    // [batch, tokens]
  const T* grad_quantized;   // [batch, dim, height, width] or null
  const T* grad_code_error;  // [books, scales] or null
  const T* grad_row_error;   // [books, scales] or null
  T* grad_h;                 // out [batch, dim, height, width] or null
  T* grad_codebook;          // out [books, codes, dim] or null
  // CUDA may sum grad_codebook by float atomics in order of arrival, faster and not the same bits
  // at every call. The CPU's sum is always in row order.
  bool atomic_codebook_gradient;
};

// The rows that each scale searched with (normalised if the layout says so), from the indices.
template <typename T>
struct PyramidRowsArgs {
  Pyramid pyramid;
  CodebookLayout layout;
  const T* codebook;       // [books, codes, dim]
  const T* h;              // [batch, dim, height, width]
  const int64_t* indices;  // [batch, tokens]
  T* rows;                 // out [batch, tokens, dim]
};

// f^ from indices: the sum over scales of upsampled codebook rows.
template <typename T>
struct DecodeArgs {
  Pyramid pyramid;
  CodebookLayout layout;
  const T* codebook;       // [books, codes, dim]
  const int64_t* indices;  // [batch, tokens]
  T* quantized;            // out [batch, dim, height, width]
};

// Sum of rows by index, in row order (deterministic). Negative indices are skipped.
template <typename T>
struct SegmentSumArgs {
  int64_t codes;
  int64_t dim;
  int64_t num_rows;
  const T* rows;           // [num_rows, dim]
  const int64_t* indices;  // [num_rows]
  T* sums;                 // out [codes, dim]
  int64_t* counts;         // out [codes]
};

}  // namespace tokenflow
