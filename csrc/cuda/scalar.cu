// Scalar quantization along the pyramid: nothing is searched, so one kernel takes a map's channels
// from the first scale to the last.
#include "planes.cuh"
#include "resample_transpose.cuh"
#include "scalar.h"
#include "scalar_losses.cuh"

namespace tokenflow::cuda {
namespace {

// Quantizes this thread's channel at place p of a map's scale: writes its digit and gives its
// value. The thread that pooled the number reads it.
struct ScalarCode {
  const ScalarQuantizeArgs<float>& args;
  const float* rows;
  int16_t* digits;
  int channel;
  int round;
  int64_t first;  // element of [batch, tokens, dim]: the channel of the scale's first token

  __device__ __forceinline__ float operator()(int p) const {
    const int dim = args.layout.dim, thresholds = args.layout.thresholds;
    const int64_t n = first + static_cast<int64_t>(p) * dim;
    const int64_t line = static_cast<int64_t>(round) * thresholds;
    int digit = digit_of(rows[n], args.tables.thresholds + line * dim + channel, thresholds, dim);
    if (args.flips && args.flips[n]) digit ^= 1;
    digits[n] = static_cast<int16_t>(digit);
    return args.tables.values[(line + round + digit) * dim + channel];
  }
};

// Grid: a block for every map and `channels` channels, which owns their planes, digits and rows.
// Shared memory: as all_rows_kernel's. Bytes: 8 dim height width, and 6 dim a token; tables
// are read from the L1. Operations: 16 a scale and element of the plane, and a comparison a
// threshold. Bound by latency for small planes.
__global__ void __launch_bounds__(kPlaneThreads, 4)
    scalar_quantize_kernel(const __grid_constant__ ScalarQuantizeArgs<float> args, float* rows,
                           int16_t* digits, const __grid_constant__ PlaneBlocks blocks) {
  const Pyramid& pyramid = args.pyramid;
  const int dim = blocks.dim;
  const PlaneShape shape = plane_shape(pyramid);
  const ChannelBlock block = channel_block(blockIdx.x, dim, blocks.channels);
  const RowShare share(block, blocks.channels);
  const Planes shared(blocks);
  const int64_t offset = plane_offset(block, dim, shape);
  load_planes(args.h + offset, block, shape, shared);
  float* quantized = args.quantized + offset;
  for (int s = 0; s < pyramid.num_scales; ++s) {
    const Scale scale = scale_of(pyramid, s);
    const int64_t first = row_offset(block, share, dim, shape, scale);
    pool(shape, scale.extent, block, share, shared, dim, rows + first);
    const ScalarCode code = {args, rows, digits, block.first + share.channel, args.layout.round[s],
                             first};
    upsample_codes(shape, scale.extent, block, share, shared, code, [&](int i, float u) {
      shared.plane[i] -= u;
      quantized[i] = s == 0 ? u : quantized[i] + u;
    });
  }
}

// Grid: a thread for every channel of a row, which owns its rounds. Bytes: 4 a channel read and
// written, 6 a round written; bound by memory.
__global__ void __launch_bounds__(kPlaneThreads)
    scalar_rows_kernel(const __grid_constant__ ScalarRowsArgs<float> args, int16_t* digits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPlaneThreads + threadIdx.x;
  const int dim = args.layout.dim, thresholds = args.layout.thresholds, rounds = args.layout.rounds;
  if (i >= args.num_rows * dim) return;
  const int64_t n = i / dim;
  const int d = static_cast<int>(i - n * dim);
  float residual = args.rows[i], sum = 0;
  for (int r = 0; r < rounds; ++r) {
    const int64_t line = static_cast<int64_t>(r) * thresholds;
    const int digit = digit_of(residual, args.tables.thresholds + line * dim + d, thresholds, dim);
    const float code = args.tables.values[(line + r + digit) * dim + d];
    const int64_t at = (n * rounds + r) * dim + d;
    if (digits) digits[at] = static_cast<int16_t>(digit);
    if (args.codes) args.codes[at] = code;
    sum = r == 0 ? code : sum + code;
    residual -= code;
  }
  args.quantized[i] = sum;
}

// Grid: a thread for every group of a token, which owns its index. Bytes: 2 a digit and 8 an index;
// bound by memory.
__global__ void __launch_bounds__(kPlaneThreads)
    pack_digits_kernel(const __grid_constant__ PackDigitsArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPlaneThreads + threadIdx.x;
  if (i >= args.batch * args.tokens * args.groups) return;
  const int64_t n = i / args.groups, g = i - n * args.groups;
  const int64_t b = n / args.tokens, t = n - b * args.tokens;
  args.indices[(b * args.groups + g) * args.tokens + t] =
      pack_digits(args, args.digits + i * args.dim);
}

struct QuantizeWorkspace {
  int16_t* digits;
  float* rows;
  void* losses;
  size_t bytes;

  QuantizeWorkspace(const ScalarQuantizeArgs<float>& args, void* memory) {
    Workspace workspace(memory);
    const int64_t count = args.pyramid.batch * tokens_per_image(args.pyramid) * args.layout.dim;
    digits = workspace.take<int16_t>(count);
    float* own = workspace.take<float>(args.rows ? 0 : count);
    rows = args.rows ? args.rows : own;
    losses =
        workspace.take<unsigned char>(static_cast<int64_t>(scalar_losses_workspace_bytes(args)));
    bytes = workspace.bytes();
  }
};

}  // namespace

size_t scalar_rows_workspace_bytes(const ScalarRowsArgs<float>& args) {
  const int64_t digits = args.num_rows * args.layout.rounds * args.layout.dim;
  return args.pack.indices ? static_cast<size_t>(digits) * sizeof(int16_t) : 0;
}

cudaError_t launch_scalar_rows(const ScalarRowsArgs<float>& args, void* workspace,
                               cudaStream_t stream) {
  const int64_t channels = args.num_rows * args.layout.dim;
  if (channels == 0) return cudaSuccess;
  int16_t* digits = args.pack.indices ? static_cast<int16_t*>(workspace) : nullptr;
  TOKENFLOW_CUDA_TRY(launch(scalar_rows_kernel,
                            dim3(static_cast<unsigned>(ceil_div(channels, kPlaneThreads))),
                            kPlaneThreads, 0, stream, args, digits));
  if (!digits) return cudaSuccess;
  PackDigitsArgs pack = args.pack;
  pack.digits = digits;
  return launch_pack_digits(pack, stream);
}

cudaError_t launch_pack_digits(const PackDigitsArgs& args, cudaStream_t stream) {
  const int64_t indices = args.batch * args.tokens * args.groups;
  if (indices == 0) return cudaSuccess;
  return launch(pack_digits_kernel, dim3(static_cast<unsigned>(ceil_div(indices, kPlaneThreads))),
                kPlaneThreads, 0, stream, args);
}

size_t scalar_quantize_workspace_bytes(const ScalarQuantizeArgs<float>& args) {
  return QuantizeWorkspace(args, nullptr).bytes;
}

cudaError_t launch_scalar_quantize(const ScalarQuantizeArgs<float>& args, void* workspace,
                                   cudaStream_t stream) {
  const Pyramid& pyramid = args.pyramid;
  if (unsupported_planes(pyramid, args.layout.dim)) return cudaErrorInvalidValue;
  if (pyramid.batch == 0 || pyramid.num_scales == 0) return cudaSuccess;
  const QuantizeWorkspace work(args, workspace);
  const PlaneBlocks blocks(pyramid.batch, args.layout.dim, sizes_of_all_scales(pyramid));
  TOKENFLOW_CUDA_TRY(launch(scalar_quantize_kernel, dim3(blocks.count), kPlaneThreads,
                            blocks.shared_bytes(), stream, args, work.rows, work.digits, blocks));
  PackDigitsArgs pack = args.pack;
  pack.digits = work.digits;
  TOKENFLOW_CUDA_TRY(launch_pack_digits(pack, stream));
  return launch_scalar_losses(args, work.rows, work.digits, work.losses, stream);
}

size_t scalar_quantize_backward_workspace_bytes(const ScalarQuantizeBackwardArgs<float>& args) {
  const int64_t tokens = args.pyramid.batch * tokens_per_image(args.pyramid);
  return static_cast<size_t>(tokens * args.layout.dim) * sizeof(float);
}

cudaError_t launch_scalar_quantize_backward(const ScalarQuantizeBackwardArgs<float>& args,
                                            void* workspace, cudaStream_t stream) {
  const Pyramid& pyramid = args.pyramid;
  if (unsupported_planes(pyramid, args.layout.dim)) return cudaErrorInvalidValue;
  if (pyramid.batch == 0 || pyramid.num_scales == 0) return cudaSuccess;
  float* rows = static_cast<float*>(workspace);
  if (args.grad_quantized) {
    TOKENFLOW_CUDA_TRY(
        launch_upsample_transpose({pyramid, args.layout.dim, args.grad_quantized, rows}, stream));
  }
  TOKENFLOW_CUDA_TRY(launch_scalar_row_gradient(args, rows, stream));
  return launch_pool_transpose({pyramid, args.layout.dim, rows, args.grad_h}, BinShare::kMean,
                               stream);
}

}  // namespace tokenflow::cuda
