// Packs rows and codes as operands of the tensor cores.
#include "pack.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kPackThreads = 128;

// Grid: kPackLanes lanes for every code, in blocks of kPackThreads. Writes the reciprocal lengths
// to `inverse_norms` [codes, groups] and raises `range` to the codes', either of which may be null.
// Reads the codebook once, bound by memory.
__global__ void __launch_bounds__(kPackThreads)
    measure_kernel(const __grid_constant__ CodebookLayout layout, const float* codebook,
                   double* inverse_norms, CodebookRange* range) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) / kPackLanes;
  const bool exists = n < layout.codes;
  const float* code = codebook + (exists ? n : 0) * layout.dim;
  if (inverse_norms) {
    for (int g = 0; g < layout.groups; ++g) {
      const double squared = quad_squared_norm(code, layout.begin[g], layout.begin[g + 1]);
      if (exists && lane_index() % kPackLanes == 0) {
        inverse_norms[n * layout.groups + g] = inverse_norm(squared, layout.l2_norm);
      }
    }
  }
  if (range) {
    const VectorSize size = measure_vector(code, layout);
    const double length = max_over_warp(size.length, kPackLanes);
    const double bias = max_over_warp(fabs(size.bias), kPackLanes);
    if (lane_index() == 0) {
      atomic_max_not_negative(&range->length, length);
      atomic_max_not_negative(&range->bias, bias);
    }
  }
}

// Packs code n of the padded codebook, the work of kPackLanes lanes, and raises the bounds.
__device__ __forceinline__ void pack_code(const CodebookLayout& layout, const float* codebook,
                                          int64_t n, const PackedCodes& codes) {
  const bool exists = n < layout.codes;
  const float* code = codebook + (exists ? n : 0) * layout.dim;
  VectorSize size = measure_vector(code, layout);
  if (!exists) size = {0, 0, false};
  const CodeExponents exponents = code_exponents(codes.summary->range);

  SpareColumns spare;
  double rest = ldexp(size.bias, exponents.bias), magnitude = 0;
#pragma unroll
  for (uint16_t& part : spare.bias) {
    part = to_half(static_cast<float>(rest));
    const double value = static_cast<double>(from_half(part));
    rest -= value;
    magnitude += fabs(value);
  }
  spare.exclusion = to_half(size.finite ? 0.0f : -kExclusion);
  const PackedSquares squares = pack_vector<Operand::kCodes>(
      code, size.finite, layout, exponents.length, spare, n, true, codes.fragments);
  const CoarseCodeBounds bounds = {
      max_over_warp(round_up(ldexp(size.length, exponents.length)), kPackLanes),
      max_over_warp(round_up(sqrt(squares.error)), kPackLanes),
      max_over_warp(round_up(magnitude), kPackLanes)};
  if (lane_index() == 0) {
    CoarseCodeBounds& all = codes.summary->bounds;
    atomic_max_not_negative(&all.length, bounds.length);
    atomic_max_not_negative(&all.error, bounds.error);
    atomic_max_not_negative(&all.bias, bounds.bias);
  }
}

struct PackArgs {
  CodebookLayout layout;
  const float* codebook;
  PackedCodes codes;
  int64_t padded_codes;  // 0 where the codes are packed already
  const float* rows;
  PackedRows packed;
  int64_t num_rows;
};

// Grid: kPackLanes lanes for every code of the padded codebook, then for every row, in blocks of
// kPackThreads. Reads the vectors once (again from the L1) and writes 2 bytes a
// column of the operands, bound by memory.
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const __grid_constant__ PackArgs args) {
  static_assert(kTileCodes % (kPackThreads / kPackLanes) == 0, "a block packs codes or rows");
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) / kPackLanes;
  if (n < args.padded_codes) {
    pack_code(args.layout, args.codebook, n, args.codes);
  } else {
    const int64_t row = n - args.padded_codes;
    const bool exists = row < args.num_rows;
    pack_row(args.rows + (exists ? row : 0) * args.layout.dim, args.layout, row, exists,
             args.packed);
  }
}

// Blocks of kPackLanes lanes for every vector.
unsigned blocks(int64_t vectors) {
  return static_cast<unsigned>(ceil_div(kPackLanes * vectors, kPackThreads));
}

}  // namespace

cudaError_t launch_inverse_norms(const CodebookLayout& layout, const float* codebook,
                                 double* inverse_norms, cudaStream_t stream) {
  return launch(measure_kernel, dim3(blocks(layout.codes)), kPackThreads, 0, stream, layout,
                codebook, inverse_norms, static_cast<CodebookRange*>(nullptr));
}

cudaError_t launch_pack(const CodebookLayout& layout, const float* codebook,
                        const PackedCodes& codes, double* inverse_norms, const float* rows,
                        int64_t num_rows, const PackedRows& packed, cudaStream_t stream) {
  TOKENFLOW_CUDA_TRY(cudaMemsetAsync(codes.summary, 0, sizeof(CodebookSummary), stream));
  TOKENFLOW_CUDA_TRY(launch(measure_kernel, dim3(blocks(layout.codes)), kPackThreads, 0, stream,
                            layout, codebook, inverse_norms, &codes.summary->range));
  const int64_t padded = ceil_div(layout.codes, kTileCodes) * kTileCodes;
  const PackArgs args = {layout, codebook, codes, padded, rows, packed, num_rows};
  return launch(pack_kernel, dim3(blocks(padded + num_rows)), kPackThreads, 0, stream, args);
}

cudaError_t launch_pack_rows(const CodebookLayout& layout, const float* rows, int64_t num_rows,
                             const PackedRows& packed, cudaStream_t stream) {
  const PackArgs args = {layout, nullptr, {}, 0, rows, packed, num_rows};
  return launch(pack_kernel, dim3(blocks(num_rows)), kPackThreads, 0, stream, args);
}

}  // namespace tokenflow::cuda
