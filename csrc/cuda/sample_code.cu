// A code for every row by the Gumbel-max trick, in one pass over the codebook. The matrix of scores
// is never in memory.
#include <cmath>

#include "pack.cuh"
#include "quantizer.h"
#include "sample_code.h"

namespace tokenflow::cuda {
namespace {

constexpr int kDrawThreads = 128;
constexpr int kDrawRows = 2;

// Rows whose reciprocal lengths are held at once: bounds the scratch.
constexpr int64_t kLengthsAtOnce = 8192;

struct DrawArgs {
  SampleCodeArgs<float> sample;
  const double* row_inverse_norms;   // [rows of the launch, groups]
  const double* code_inverse_norms;  // [codes, groups]
  int64_t first_row;
  int64_t num_rows;
};

__device__ __forceinline__ GumbelChoice better(const GumbelChoice& a, const GumbelChoice& b) {
  return beats(b, a) ? b : a;
}

// sums[r][c] over channels of (z_r - c_c)^2 or z_r c_c, in float64.
template <bool kDot>
__device__ __forceinline__ void sum_channels(const DrawArgs& args, const int64_t (&rows)[kDrawRows],
                                             const int64_t (&codes)[kGumbelCodes],
                                             double (&sums)[kDrawRows][kGumbelCodes]) {
  const CodebookLayout& layout = args.sample.layout;
  for (int g = 0; g < layout.groups; ++g) {
    const double root = sqrt(layout.weight[g]);
    double row_scale[kDrawRows], code_scale[kGumbelCodes];
#pragma unroll
    for (int r = 0; r < kDrawRows; ++r) {
      row_scale[r] = root * args.row_inverse_norms[rows[r] * layout.groups + g];
    }
#pragma unroll
    for (int c = 0; c < kGumbelCodes; ++c) {
      code_scale[c] = root * args.code_inverse_norms[codes[c] * layout.groups + g];
    }
#pragma unroll 1
    for (int d = layout.begin[g]; d < layout.begin[g + 1]; ++d) {
      double code[kGumbelCodes];
#pragma unroll
      for (int c = 0; c < kGumbelCodes; ++c) {
        code[c] =
            static_cast<double>(args.sample.codebook[codes[c] * layout.dim + d]) * code_scale[c];
      }
#pragma unroll
      for (int r = 0; r < kDrawRows; ++r) {
        const float* row = args.sample.rows + (args.first_row + rows[r]) * layout.dim;
        const double z = static_cast<double>(row[d]) * row_scale[r];
#pragma unroll
        for (int c = 0; c < kGumbelCodes; ++c) {
          const double other = kDot ? code[c] : z - code[c];
          sums[r][c] += (kDot ? z : other) * other;
        }
      }
    }
  }
}

// Grid: a block for kDrawRows rows, which owns their draws. A thread takes every kDrawThreads-th
// group of kGumbelCodes codes; then the block agrees on the best of each row.
// Shared memory: a choice a row and warp. Bytes: the codebook once a block, from L2. Operations: 3
// dim float64 a row and code, and a quarter of Philox's 10 rounds; the two logarithms only where
// they may change the choice. Bound by float64.
template <bool kDot>
__global__ void __launch_bounds__(kDrawThreads, 3)
    draw_kernel(const __grid_constant__ DrawArgs args) {
  const SampleCodeArgs<float>& sample = args.sample;
  const CodebookLayout& layout = sample.layout;
  const double temperature = sample.temperature;
  const bool noisy = temperature > 0;
  int64_t rows[kDrawRows];
  GumbelChoice best[kDrawRows];
#pragma unroll
  for (int r = 0; r < kDrawRows; ++r) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kDrawRows + r;
    rows[r] = row < args.num_rows ? row : args.num_rows - 1;
    best[r] = {-INFINITY, 0};
  }
  const int64_t groups = (layout.codes + kGumbelCodes - 1) / kGumbelCodes;
  for (int64_t group = threadIdx.x; group < groups; group += kDrawThreads) {
    int64_t codes[kGumbelCodes];
#pragma unroll
    for (int c = 0; c < kGumbelCodes; ++c) {
      const int64_t code = group * kGumbelCodes + c;
      codes[c] = code < layout.codes ? code : layout.codes - 1;
    }
    double sums[kDrawRows][kGumbelCodes] = {};
    sum_channels<kDot>(args, rows, codes, sums);
#pragma unroll
    for (int r = 0; r < kDrawRows; ++r) {
      PhiloxBlock random = {};
      if (noisy) {
        const int64_t n = args.first_row + rows[r];
        random = gumbel_words(static_cast<uint64_t>(value_at(sample.seed, n)),
                              stream_position(sample.seed, sample.offset, n), group);
      }
#pragma unroll
      for (int c = 0; c < kGumbelCodes; ++c) {
        double value = score_of(sums[r][c], layout.metric);
        // Infinite and NaN scores are of what is not finite. The last code's copies change nothing:
        // their noise is not looked at.
        if (group * kGumbelCodes + c >= layout.codes || !(fabs(value) < INFINITY)) continue;
        if (noisy) {
          const double bound = gumbel_bound(leading_zeros(~random.word[c]));
          if (!(value + temperature * bound >= best[r].value)) continue;
          value += temperature * gumbel(random.word[c]);
        }
        best[r] = better(best[r], {value, codes[c]});
      }
    }
  }
  GumbelChoice* shared = shared_memory<GumbelChoice>();
#pragma unroll
  for (int r = 0; r < kDrawRows; ++r) {
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      best[r] =
          better(best[r], {shuffle_xor(best[r].value, step), shuffle_xor(best[r].index, step)});
    }
    if (lane_index() == 0) shared[r * (kDrawThreads / kWarpSize) + warp_index()] = best[r];
  }
  block_barrier();
  const int r = static_cast<int>(threadIdx.x);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDrawRows + r;
  if (r >= kDrawRows || row >= args.num_rows) return;
  GumbelChoice choice = shared[r * (kDrawThreads / kWarpSize)];
  for (int w = 1; w < kDrawThreads / kWarpSize; ++w) {
    choice = better(choice, shared[r * (kDrawThreads / kWarpSize) + w]);
  }
  sample.indices[args.first_row + row] = choice.index;
}

struct DrawScratch {
  double* row_inverse_norms;
  double* code_inverse_norms;

  DrawScratch(Workspace& workspace, const SampleCodeArgs<float>& args)
      : row_inverse_norms(workspace.take<double>(
            (args.num_rows < kLengthsAtOnce ? args.num_rows : kLengthsAtOnce) *
            args.layout.groups)),
        code_inverse_norms(workspace.take<double>(args.layout.codes * args.layout.groups)) {}
};

}  // namespace

size_t sample_code_workspace_bytes(const SampleCodeArgs<float>& args) {
  Workspace workspace(nullptr);
  DrawScratch(workspace, args);
  return workspace.bytes();
}

cudaError_t launch_sample_code(const SampleCodeArgs<float>& args, void* workspace_memory,
                               cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  if (args.num_rows < 0 || unsupported_reason(args.layout)) return cudaErrorInvalidValue;
  Workspace workspace(workspace_memory);
  const DrawScratch scratch(workspace, args);
  TOKENFLOW_CUDA_TRY(
      launch_inverse_norms(args.layout, args.codebook, scratch.code_inverse_norms, stream));
  DrawArgs draw = {args, scratch.row_inverse_norms, scratch.code_inverse_norms, 0, 0};
  // Without noise the root, which makes equal what is not, decides nothing.
  if (!(args.temperature > 0) && args.layout.metric == Metric::kL2) {
    draw.sample.layout.metric = Metric::kSquaredL2;
  }
  const bool dot = args.layout.metric == Metric::kDot;
  for (; draw.first_row < args.num_rows; draw.first_row += kLengthsAtOnce) {
    const int64_t left = args.num_rows - draw.first_row;
    draw.num_rows = left < kLengthsAtOnce ? left : kLengthsAtOnce;
    CodebookLayout of_rows = args.layout;
    of_rows.codes = draw.num_rows;
    TOKENFLOW_CUDA_TRY(launch_inverse_norms(of_rows, args.rows + draw.first_row * args.layout.dim,
                                            scratch.row_inverse_norms, stream));
    TOKENFLOW_CUDA_TRY(
        launch(dot ? draw_kernel<true> : draw_kernel<false>,
               dim3(static_cast<unsigned>(ceil_div(draw.num_rows, kDrawRows))), kDrawThreads,
               kDrawRows * (kDrawThreads / kWarpSize) * sizeof(GumbelChoice), stream, draw));
  }
  return cudaSuccess;
}

}  // namespace tokenflow::cuda
