// The losses of scalar quantization, token by token, and their gradient. What is summed over tokens
// is summed by blocks, whose sums a second kernel adds in their order: no float is added by two
// threads in an unknown order.
#include "../common/curve.h"
#include "pyramid.cuh"
#include "scalar_losses.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarpSize;
// Lanes that share a group of a token: eight neighbouring channels are one sector of memory.
constexpr int kGroupLanes = 8;
constexpr int kGroupsPerBlock = kRowThreads / kGroupLanes;
// Tokens of a scale whose losses one block sums.
constexpr int kLossTokens = 256;
constexpr int kLosses = 3;  // error, entropy, chance

struct DeviceMath {
  static constexpr float kMost = 87, kOne = 1;
  static __device__ __forceinline__ float exp_of_negative(float x) { return expf(x); }
  static __device__ __forceinline__ float log1p(float u) { return log1pf(u); }
};

__host__ __device__ __forceinline__ int chunks_of(Extent extent) {
  return (area(extent) + kLossTokens - 1) / kLossTokens;
}

__host__ __device__ __forceinline__ int chunks_per_image(const Pyramid& pyramid) {
  int chunks = 0;
  for (int s = 0; s < pyramid.num_scales; ++s) chunks += chunks_of(pyramid.extent[s]);
  return chunks;
}

__device__ __forceinline__ int scale_of(const Pyramid& pyramid, int64_t token) {
  const int64_t in_image = token % tokens_per_image(pyramid);
  int s = 0;
  while (in_image >= pyramid.first_token[s + 1]) ++s;
  return s;
}

// Of a mean over the tokens of a scale what comes to one.
__device__ __forceinline__ float share_of(const Pyramid& pyramid, int s) {
  return 1.0f / static_cast<float>(pyramid.batch * area(pyramid.extent[s]));
}

__device__ __forceinline__ const float* curves_of(const ScalarTables<float>& tables,
                                                  const ScalarLayout& layout, int round) {
  return tables.curves + static_cast<int64_t>(round) * kCurveParts * layout.dim;
}

// What stands in for channel d of a row; `inverse` is that of its group's length.
__device__ __forceinline__ float stand_in(const ScalarTables<float>& tables,
                                          const ScalarLayout& layout, int round, int d, float row,
                                          float inverse) {
  if (layout.stand_in == StandIn::kSame) return row;
  if (layout.stand_in == StandIn::kUnit) return row * inverse;
  const float* curve = curves_of(tables, layout, round) + d;
  const int dim = layout.dim;
  const float y = curve[0] * row + curve[dim];
  return curve[2 * dim] * bend<DeviceMath>(layout.stand_in, y).value + curve[3 * dim];
}

// Its derivative, but for kUnit.
__device__ __forceinline__ float stand_in_slope(const ScalarTables<float>& tables,
                                                const ScalarLayout& layout, int round, int d,
                                                float row) {
  if (layout.stand_in == StandIn::kSame) return 1;
  const float* curve = curves_of(tables, layout, round) + d;
  const float y = curve[0] * row + curve[layout.dim];
  return curve[0] * curve[2 * layout.dim] * bend<DeviceMath>(layout.stand_in, y).slope;
}

__device__ __forceinline__ float value_of(const ScalarTables<float>& tables,
                                          const ScalarLayout& layout, int round, int d, int digit) {
  const int64_t line = static_cast<int64_t>(round) * (layout.thresholds + 1) + digit;
  return tables.values[line * layout.dim + d];
}

// Grid: kGroupLanes lanes a group of a token, kGroupsPerBlock of them a block. Bytes: 4 a channel
// read, 4 a group written; bound by memory.
__global__ void __launch_bounds__(kRowThreads)
    inverse_length_kernel(const float* rows, int64_t count, int group, float* inverses) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kGroupsPerBlock +
                    static_cast<int>(threadIdx.x) / kGroupLanes;
  const bool present = i < count;
  const int lane = lane_index() % kGroupLanes;
  double squared = 0;
  for (int d = lane; present && d < group; d += kGroupLanes) {
    const double x = static_cast<double>(rows[i * group + d]);
    squared += x * x;
  }
  squared = sum_over_lanes<kGroupLanes>(squared);
  if (present && lane == 0) inverses[i] = static_cast<float>(inverse_norm(squared, true));
}

struct LossArgs {
  Pyramid pyramid;
  ScalarLayout layout;
  ScalarTables<float> tables;
  const float* rows;
  const int16_t* digits;
  const float* inverses;  // [batch, tokens, groups], of kUnit
  double* sums;           // [kLosses, batch, chunks, dim]
  float* error;
  float* entropy;
  float* chance;
  int chunks;  // of an image
};

// Grid: (images x chunks of kLossTokens tokens of one scale, blocks of 32 channels); a warp's lanes
// own channels, its warps every eighth token. Shared memory: kLosses numbers a thread. Bytes: 6 a
// channel read; operations: about 40 with an entropy, bound by those.
__global__ void __launch_bounds__(kRowThreads)
    scalar_losses_kernel(const __grid_constant__ LossArgs args) {
  const Pyramid& pyramid = args.pyramid;
  const ScalarLayout& layout = args.layout;
  const int64_t map = blockIdx.x / static_cast<unsigned>(args.chunks);
  int chunk = static_cast<int>(blockIdx.x % static_cast<unsigned>(args.chunks)), s = 0;
  for (; chunk >= chunks_of(pyramid.extent[s]); ++s) chunk -= chunks_of(pyramid.extent[s]);
  const int dim = layout.dim, d = static_cast<int>(blockIdx.y) * kWarpSize + lane_index();
  const int round = layout.round[s], count = area(pyramid.extent[s]);
  const int64_t first = map * tokens_per_image(pyramid) + pyramid.first_token[s];
  const float slope = static_cast<float>(layout.slope[s]);
  const int last = (chunk + 1) * kLossTokens < count ? (chunk + 1) * kLossTokens : count;
  float error = 0, entropy = 0, chance = 0;
  for (int p = chunk * kLossTokens + warp_index(); d < dim && p < last; p += kRowWarps) {
    const int64_t token = first + p, at = token * dim + d;
    float inverse = 1;
    if (args.inverses) {
      inverse = args.inverses[token * layout.groups + d / (dim / layout.groups)];
    }
    const float z = stand_in(args.tables, layout, round, d, args.rows[at], inverse);
    if (args.error) {
      const float off = value_of(args.tables, layout, round, d, args.digits[at]) - z;
      error += off * off;
    }
    if (args.entropy) {
      const SignChoice<float> choice = sign_choice<DeviceMath>(slope * z);
      entropy += choice.entropy;
      chance += choice.chance;
    }
  }
  float* shared = shared_memory<float>();  // [kLosses][kRowThreads]
  shared[threadIdx.x] = error;
  shared[kRowThreads + threadIdx.x] = entropy;
  shared[2 * kRowThreads + threadIdx.x] = chance;
  block_barrier();
  if (warp_index() >= kLosses || d >= dim) return;
  double sum = 0;
  for (int warp = 0; warp < kRowWarps; ++warp) {
    sum +=
        static_cast<double>(shared[warp_index() * kRowThreads + warp * kWarpSize + lane_index()]);
  }
  const int64_t blocks = pyramid.batch * args.chunks;
  args.sums[(warp_index() * blocks + blockIdx.x) * dim + d] = sum;
}

// Grid: a block a scale, whose threads own channels. Shared memory: two numbers a thread. Bytes: 24
// a chunk and channel read; bound by latency.
__global__ void __launch_bounds__(kRowThreads, 4)
    scalar_losses_sum_kernel(const __grid_constant__ LossArgs args) {
  const Pyramid& pyramid = args.pyramid;
  const int s = static_cast<int>(blockIdx.x), dim = args.layout.dim;
  const double share = 1.0 / static_cast<double>(pyramid.batch * area(pyramid.extent[s]));
  const int64_t blocks = pyramid.batch * args.chunks;
  int first = 0;
  for (int before = 0; before < s; ++before) first += chunks_of(pyramid.extent[before]);
  double totals[2] = {};
  for (int d = threadIdx.x; d < dim; d += kRowThreads) {
    double sums[kLosses] = {};
    for (int64_t map = 0; map < pyramid.batch; ++map) {
      for (int chunk = 0; chunk < chunks_of(pyramid.extent[s]); ++chunk) {
        const int64_t block = map * args.chunks + first + chunk;
        for (int loss = 0; loss < kLosses; ++loss) {
          sums[loss] += args.sums[(loss * blocks + block) * dim + d];
        }
      }
    }
    totals[0] += sums[0];
    totals[1] += sums[1];
    if (args.chance) {
      args.chance[static_cast<int64_t>(s) * dim + d] = static_cast<float>(sums[2] * share);
    }
  }
  double* shared = shared_memory<double>();  // [2][kRowThreads]
  shared[threadIdx.x] = totals[0];
  shared[kRowThreads + threadIdx.x] = totals[1];
  block_barrier();
  if (threadIdx.x >= 2) return;
  double total = 0;
  for (int i = 0; i < kRowThreads; ++i) total += shared[threadIdx.x * kRowThreads + i];
  if (threadIdx.x == 0 && args.error) args.error[s] = static_cast<float>(total * share / dim);
  if (threadIdx.x == 1 && args.entropy) args.entropy[s] = static_cast<float>(total * share);
}

// The gradient of what stands in for channel d of a token, `at` being where the channel lies.
__device__ __forceinline__ float gradient_of(const ScalarQuantizeBackwardArgs<float>& args,
                                             const float* grad_rows, int64_t at, int s, int d,
                                             float row, float z) {
  const ScalarLayout& layout = args.layout;
  const int dim = layout.dim, round = layout.round[s];
  const float share = share_of(args.pyramid, s);
  float grad = args.grad_quantized ? grad_rows[at] : 0.0f;
  if (args.grad_error) {
    const int64_t line = static_cast<int64_t>(round) * layout.thresholds;
    int digit = digit_of(row, args.tables.thresholds + line * dim + d, layout.thresholds, dim);
    if (args.flips && args.flips[at]) digit ^= 1;
    const float by = args.grad_error[s] * 2 * share / static_cast<float>(dim);
    grad += by * (z - value_of(args.tables, layout, round, d, digit));
  }
  if (args.grad_entropy) {
    const float slope = static_cast<float>(layout.slope[s]);
    grad += slope * sign_choice_backward<DeviceMath>(
                        slope * z, args.grad_chance[static_cast<int64_t>(s) * dim + d] * share,
                        args.grad_entropy[s] * share);
  }
  return grad;
}

// Grid: a thread a channel of a token. Bytes: 12 read and written; bound by memory.
__global__ void __launch_bounds__(kRowThreads)
    scalar_row_gradient_kernel(const __grid_constant__ ScalarQuantizeBackwardArgs<float> args,
                               float* grad_rows) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  const int dim = args.layout.dim;
  if (at >= args.pyramid.batch * tokens_per_image(args.pyramid) * dim) return;
  const int64_t token = at / dim;
  const int d = static_cast<int>(at - token * dim), s = scale_of(args.pyramid, token);
  const int round = args.layout.round[s];
  const float row = args.rows[at];
  const float z = stand_in(args.tables, args.layout, round, d, row, 1);
  float grad = gradient_of(args, grad_rows, at, s, d, row, z) *
               stand_in_slope(args.tables, args.layout, round, d, row);
  if (args.grad_rows) grad += args.grad_rows[at];
  grad_rows[at] = grad;
}

// The same at unit length. Grid: as inverse_length_kernel's. Bytes: 12 a channel from memory; the
// second and third look hit the caches.
__global__ void __launch_bounds__(kRowThreads, 4)
    unit_row_gradient_kernel(const __grid_constant__ ScalarQuantizeBackwardArgs<float> args,
                             float* grad_rows) {
  const ScalarLayout& layout = args.layout;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kGroupsPerBlock +
                    static_cast<int>(threadIdx.x) / kGroupLanes;
  const int64_t token = i / layout.groups;
  const bool present = token < args.pyramid.batch * tokens_per_image(args.pyramid);
  const int group = layout.dim / layout.groups, lane = lane_index() % kGroupLanes;
  const int first = static_cast<int>(i % layout.groups) * group;
  const int s = present ? scale_of(args.pyramid, token) : 0;
  const float* rows = args.rows + token * layout.dim + first;
  double squared = 0, dot = 0;
  for (int d = lane; present && d < group; d += kGroupLanes) {
    const double x = static_cast<double>(rows[d]);
    squared += x * x;
  }
  squared = sum_over_lanes<kGroupLanes>(squared);
  const float inverse = static_cast<float>(inverse_norm(squared, true));
  for (int d = lane; present && d < group; d += kGroupLanes) {
    const int64_t at = i * group + d;
    const float grad = gradient_of(args, grad_rows, at, s, first + d, rows[d], rows[d] * inverse);
    grad_rows[at] = grad;
    dot += static_cast<double>(rows[d]) * static_cast<double>(grad);
  }
  dot = sum_over_lanes<kGroupLanes>(dot);
  const GroupTranspose transpose = group_transpose(squared, dot, true);
  for (int d = lane; present && d < group; d += kGroupLanes) {
    const int64_t at = i * group + d;
    float grad = static_cast<float>(
        apply(transpose, static_cast<double>(rows[d]), static_cast<double>(grad_rows[at])));
    if (args.grad_rows) grad += args.grad_rows[at];
    grad_rows[at] = grad;
  }
}

// Grid: a thread a channel of a row, which owns its rounds. Bytes: 12; bound by memory.
__global__ void __launch_bounds__(kRowThreads)
    scalar_rows_backward_kernel(const __grid_constant__ ScalarRowsBackwardArgs<float> args) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  const ScalarLayout& layout = args.layout;
  if (at >= args.num_rows * layout.dim) return;
  const int d = static_cast<int>(at % layout.dim);
  float rest = args.rows[at], slope = 0;
  for (int r = 0; r < layout.rounds; ++r) {
    slope += stand_in_slope(args.tables, layout, r, d, rest);
    const int64_t line = static_cast<int64_t>(r) * layout.thresholds;
    const int digit = digit_of(rest, args.tables.thresholds + line * layout.dim + d,
                               layout.thresholds, layout.dim);
    rest -= value_of(args.tables, layout, r, d, digit);
  }
  args.grad_rows[at] = args.grad_quantized[at] * slope;
}

unsigned blocks_of(int64_t items, int per_block) {
  return static_cast<unsigned>(ceil_div(items, per_block));
}

struct LossWorkspace {
  float* inverses;
  double* sums;
  size_t bytes;

  LossWorkspace(const ScalarQuantizeArgs<float>& args, void* memory) {
    Workspace workspace(memory);
    const Pyramid& pyramid = args.pyramid;
    const bool unit = args.layout.stand_in == StandIn::kUnit;
    inverses = workspace.take<float>(
        unit ? pyramid.batch * tokens_per_image(pyramid) * args.layout.groups : 0);
    sums = workspace.take<double>(kLosses * pyramid.batch * chunks_per_image(pyramid) *
                                  args.layout.dim);
    bytes = workspace.bytes();
  }
};

}  // namespace

size_t scalar_losses_workspace_bytes(const ScalarQuantizeArgs<float>& args) {
  return args.error || args.entropy ? LossWorkspace(args, nullptr).bytes : 0;
}

cudaError_t launch_scalar_losses(const ScalarQuantizeArgs<float>& args, const float* rows,
                                 const int16_t* digits, void* workspace, cudaStream_t stream) {
  if (!args.error && !args.entropy) return cudaSuccess;
  const LossWorkspace work(args, workspace);
  const Pyramid& pyramid = args.pyramid;
  const ScalarLayout& layout = args.layout;
  const bool unit = layout.stand_in == StandIn::kUnit;
  if (unit) {
    const int64_t groups = pyramid.batch * tokens_per_image(pyramid) * layout.groups;
    TOKENFLOW_CUDA_TRY(launch(inverse_length_kernel, dim3(blocks_of(groups, kGroupsPerBlock)),
                              kRowThreads, 0, stream, rows, groups, layout.dim / layout.groups,
                              work.inverses));
  }
  const LossArgs losses = {pyramid,
                           layout,
                           args.tables,
                           rows,
                           digits,
                           unit ? work.inverses : nullptr,
                           work.sums,
                           args.error,
                           args.entropy,
                           args.chance,
                           chunks_per_image(pyramid)};
  const dim3 grid(static_cast<unsigned>(pyramid.batch * losses.chunks),
                  blocks_of(layout.dim, kWarpSize));
  TOKENFLOW_CUDA_TRY(launch(scalar_losses_kernel, grid, kRowThreads,
                            sizeof(float) * kLosses * kRowThreads, stream, losses));
  return launch(scalar_losses_sum_kernel, dim3(static_cast<unsigned>(pyramid.num_scales)),
                kRowThreads, sizeof(double) * 2 * kRowThreads, stream, losses);
}

cudaError_t launch_scalar_row_gradient(const ScalarQuantizeBackwardArgs<float>& args,
                                       float* grad_rows, cudaStream_t stream) {
  const int64_t tokens = args.pyramid.batch * tokens_per_image(args.pyramid);
  if (args.layout.stand_in == StandIn::kUnit) {
    return launch(unit_row_gradient_kernel,
                  dim3(blocks_of(tokens * args.layout.groups, kGroupsPerBlock)), kRowThreads, 0,
                  stream, args, grad_rows);
  }
  return launch(scalar_row_gradient_kernel, dim3(blocks_of(tokens * args.layout.dim, kRowThreads)),
                kRowThreads, 0, stream, args, grad_rows);
}

cudaError_t launch_scalar_rows_backward(const ScalarRowsBackwardArgs<float>& args,
                                        cudaStream_t stream) {
  const int64_t channels = args.num_rows * args.layout.dim;
  if (channels == 0) return cudaSuccess;
  return launch(scalar_rows_backward_kernel, dim3(blocks_of(channels, kRowThreads)), kRowThreads, 0,
                stream, args);
}

}  // namespace tokenflow::cuda
