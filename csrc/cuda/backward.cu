// Gradients of the residual loop. Nothing was saved but the indices: the rows of every scale are
// recomputed by all_rows_kernel. Every transposed operation gathers, so that no float
// is added by two threads in an unknown order; the sum over a code's rows does so only where the
// caller asks for it.
#include "quantizer.h"
#include "resample_transpose.cuh"
#include "residual_pass.cuh"
#include "segment_sum.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kTokenThreads = 256;
// Lanes that share a token: eight neighbouring channels are one sector of memory, and the channels
// of TokenFlow's groups (32 and 8) leave none of the lanes idle.
constexpr int kTokenLanes = 8;
constexpr int kTokensPerBlock = kTokenThreads / kTokenLanes;
constexpr int kCodeThreads = 256;

struct RowGradientArgs {
  Pyramid pyramid;
  CodebookLayout layout;
  const float* codebook;
  const double* code_inverse_norms;
  const int64_t* indices;
  const float* grad_code_error;  // [books, scales] or null
  const float* grad_row_error;   // [books, scales] or null
  float* rows;       // [batch, tokens, dim], not normalised; becomes the gradient of each token's
                     // normalised code if there is a grad_code_error and no code_sums
  int64_t* numbers;  // out [batch, tokens]: each token's code among those of all books, or null
  float* code_sums;  // [books, codes, dim] gains that gradient in order of arrival instead, or null
  bool has_grad_rows;  // grad_rows holds the gradient from f^, else nothing
  float* grad_rows;  // in and out [batch, tokens, dim] or null: becomes the gradient of each plane
                     // position in the row's bin
};

// Grid: kTokenLanes lanes a token, kTokensPerBlock tokens a block; a lane owns every eighth channel
// of each group. No shared memory.
// Bytes: 8 a token, 4 dim each of rows, grad_rows and the codebook read, 4 dim of grad_rows and
// 4 dim of rows written: 20 dim + 8. The second look at a channel hits L1. Operations: about 12 dim
// in float64. With code_sums dim atomics instead of the rows written; they wait for each other
// where many tokens have one code. Bound by memory.
__global__ void __launch_bounds__(kTokenThreads)
    row_gradient_kernel(const __grid_constant__ RowGradientArgs args) {
  const Pyramid& pyramid = args.pyramid;
  const CodebookLayout& layout = args.layout;
  const int lane = lane_index() % kTokenLanes;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock +
                        static_cast<int>(threadIdx.x) / kTokenLanes;
  const bool present = token < pyramid.batch * tokens_per_image(pyramid);
  const int64_t in_book = present ? args.indices[token] : -1;
  const bool named = names_code(in_book, layout);

  // 32 bits hold the number of a token (see unsupported_reason).
  const unsigned map =
      static_cast<unsigned>(token) / static_cast<unsigned>(tokens_per_image(pyramid));
  const int in_image = static_cast<int>(static_cast<unsigned>(token) -
                                        map * static_cast<unsigned>(tokens_per_image(pyramid)));
  const int64_t index = named ? first_code(layout, static_cast<int>(map)) + in_book : -1;
  if (args.numbers && present && lane == 0) args.numbers[token] = index;
  int s = 0;
  while (in_image >= pyramid.first_token[s + 1]) ++s;
  const Extent extent = pyramid.extent[s];
  const int p = in_image - static_cast<int>(pyramid.first_token[s]);
  const AreaBin bin_x = area_bin(p % extent.width, pyramid.width, extent.width);
  const AreaBin bin_y = area_bin(p / extent.width, pyramid.height, extent.height);
  const double bin_share =
      1.0 / static_cast<double>((bin_y.end - bin_y.begin) * (bin_x.end - bin_x.begin));
  // In the scale's mean.
  const int64_t squares = pyramid.batch / layout.books * area(extent) * layout.dim;
  const int64_t mean = map % layout.books * pyramid.num_scales + s;
  const float share = 2.0f / static_cast<float>(squares);
  const float row_share = args.grad_row_error ? share * args.grad_row_error[mean] : 0.0f;
  const float code_share = args.grad_code_error ? share * args.grad_code_error[mean] : 0.0f;

  float* rows = args.rows + token * layout.dim;
  float* grad_rows = args.grad_rows ? args.grad_rows + token * layout.dim : nullptr;
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g] + lane, end = layout.begin[g + 1];
    if (grad_rows && present && !named) {
      for (int d = begin; d < end; d += kTokenLanes) grad_rows[d] = 0;
    }
    // z and q: the normalised row and code; y: the row; u: the gradient from f^.
    const auto code = [&](int d) {
      return static_cast<double>(
          unit_code(args.codebook, args.code_inverse_norms, layout, index, d, g));
    };
    const auto upsampled = [&](int d) {
      return args.has_grad_rows ? static_cast<double>(grad_rows[d]) : 0.0;
    };
    double yy = 0, yq = 0, yu = 0;
    for (int d = begin; named && d < end; d += kTokenLanes) {
      const double y = static_cast<double>(rows[d]);
      yy += y * y;
      if (grad_rows) {
        yq += y * code(d);
        yu += y * upsampled(d);
      }
    }
    yy = sum_over_lanes<kTokenLanes>(yy);
    yq = sum_over_lanes<kTokenLanes>(yq);
    yu = sum_over_lanes<kTokenLanes>(yu);
    const double scale = inverse_norm(yy, layout.l2_norm);
    // <y, u + row_share (z - q)>
    const double dot = yu + static_cast<double>(row_share) * (yy * scale - yq);
    const GroupTranspose transpose = group_transpose(yy, dot, layout.l2_norm);
    for (int d = begin; named && d < end; d += kTokenLanes) {
      const double y = static_cast<double>(rows[d]);
      const double difference = y * scale - code(d);
      if (grad_rows) {
        const double grad = upsampled(d) + static_cast<double>(row_share) * difference;
        grad_rows[d] = static_cast<float>(apply(transpose, y, grad) * bin_share);
      }
      const float code_grad = -code_share * static_cast<float>(difference);
      if (args.code_sums) {
        atomic_add(args.code_sums + index * layout.dim + d, code_grad);
      } else if (args.grad_code_error) {
        rows[d] = code_grad;
      }
    }
  }
}

// Grid: a warp a code. No shared memory. For sums that came by atomics; those of a code without
// rows are zeros, and stay so whatever the code holds.
// Bytes: 4 dim a code read, and for each that has rows 4 dim more of the codebook and 4 dim
// written; bound by memory.
__global__ void __launch_bounds__(kCodeThreads)
    code_gradient_kernel(const __grid_constant__ CodebookLayout layout, const float* codebook,
                         float* grad_codebook) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kCodeThreads / kWarpSize) + warp_index();
  if (i >= all_codes(layout)) return;
  float* grad = grad_codebook + i * layout.dim;
  bool any = false;
  for (int d = lane_index(); d < layout.dim; d += kWarpSize) any |= grad[d] != 0;
  if (ballot(any) != 0) code_gradient_by_warp(layout, codebook + i * layout.dim, grad);
}

struct BackwardScratch {
  bool wants_codes;  // more than zeros
  bool sorts;
  double* code_inverse_norms;
  float* rows;
  float* grad_rows;
  int64_t* numbers;  // see RowGradientArgs
  SegmentSumArgs<float> segments;
  void* sort;

  BackwardScratch(Workspace& workspace, const QuantizeBackwardArgs<float>& args) {
    const CodebookLayout& layout = args.layout;
    const int64_t tokens = args.pyramid.batch * tokens_per_image(args.pyramid);
    wants_codes = args.grad_codebook && args.grad_code_error && tokens > 0;
    sorts = wants_codes && !args.atomic_codebook_gradient;
    code_inverse_norms = workspace.take<double>(all_codes(layout) * layout.groups);
    rows = workspace.take<float>(tokens * layout.dim);
    grad_rows = args.grad_h ? workspace.take<float>(tokens * layout.dim) : nullptr;
    numbers = sorts && layout.books > 1 ? workspace.take<int64_t>(tokens) : nullptr;
    segments = {
        all_codes(layout),  layout.dim, tokens, rows, layout.books > 1 ? numbers : args.indices,
        args.grad_codebook, nullptr};
    const size_t sort_bytes = sorts ? segment_sum_workspace_bytes(segments) : 0;
    sort = workspace.take<unsigned char>(static_cast<int64_t>(sort_bytes));
  }
};

}  // namespace

size_t quantize_backward_workspace_bytes(const QuantizeBackwardArgs<float>& args) {
  Workspace workspace(nullptr);
  const BackwardScratch scratch(workspace, args);
  (void)scratch;
  return workspace.bytes();
}

cudaError_t launch_quantize_backward(const QuantizeBackwardArgs<float>& args,
                                     void* workspace_memory, cudaStream_t stream) {
  const Pyramid& pyramid = args.pyramid;
  const CodebookLayout& layout = args.layout;
  if (unsupported_reason(pyramid, layout)) return cudaErrorInvalidValue;
  const int64_t tokens = pyramid.batch * tokens_per_image(pyramid);
  Workspace workspace(workspace_memory);
  const BackwardScratch scratch(workspace, args);
  if (args.grad_codebook && !scratch.sorts) {
    TOKENFLOW_CUDA_TRY(cudaMemsetAsync(
        args.grad_codebook, 0, static_cast<size_t>(all_codes(layout) * layout.dim) * sizeof(float),
        stream));
  }
  if (tokens == 0 || (!scratch.wants_codes && !args.grad_h)) return cudaSuccess;
  TOKENFLOW_CUDA_TRY(
      launch_inverse_norms(layout, args.codebook, scratch.code_inverse_norms, stream));
  const NamedCodes codes = {layout, args.codebook, scratch.code_inverse_norms, args.indices};
  TOKENFLOW_CUDA_TRY(launch_all_rows(pyramid, {codes, args.h, scratch.rows}, stream));

  RowGradientArgs row_gradient = {};
  row_gradient.pyramid = pyramid;
  row_gradient.layout = layout;
  row_gradient.codebook = args.codebook;
  row_gradient.code_inverse_norms = scratch.code_inverse_norms;
  row_gradient.indices = args.indices;
  row_gradient.grad_code_error = scratch.wants_codes ? args.grad_code_error : nullptr;
  row_gradient.grad_row_error = args.grad_row_error;
  row_gradient.rows = scratch.rows;
  row_gradient.numbers = scratch.numbers;
  row_gradient.code_sums = scratch.wants_codes && !scratch.sorts ? args.grad_codebook : nullptr;
  row_gradient.has_grad_rows = args.grad_h && args.grad_quantized;
  row_gradient.grad_rows = scratch.grad_rows;
  if (row_gradient.has_grad_rows) {
    TOKENFLOW_CUDA_TRY(launch_upsample_transpose(
        {pyramid, layout.dim, args.grad_quantized, scratch.grad_rows}, stream));
  }
  TOKENFLOW_CUDA_TRY(launch(row_gradient_kernel,
                            dim3(static_cast<unsigned>(ceil_div(tokens, kTokensPerBlock))),
                            kTokenThreads, 0, stream, row_gradient));
  if (args.grad_h) {
    TOKENFLOW_CUDA_TRY(launch_pool_transpose({pyramid, layout.dim, scratch.grad_rows, args.grad_h},
                                             BinShare::kWhole, stream));
  }
  if (scratch.sorts) {
    return launch_codebook_gradient(scratch.segments, layout, args.codebook, scratch.sort, stream);
  }
  if (row_gradient.code_sums && layout.l2_norm) {
    return launch(
        code_gradient_kernel,
        dim3(static_cast<unsigned>(ceil_div(all_codes(layout), kCodeThreads / kWarpSize))),
        kCodeThreads, 0, stream, layout, args.codebook, args.grad_codebook);
  }
  return cudaSuccess;
}

}  // namespace tokenflow::cuda
