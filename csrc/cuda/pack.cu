// Packs rows and codes as operands of the tensor cores.
#include "pack.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kPackThreads = 128;

// Grid: kPackLanes lanes for every vector, in blocks of kPackThreads. Writes the reciprocal lengths
// to `inverse_norms` [vectors, groups], and, unless they are null, biases to `bias` [vectors], and
// raises `range`. Reads the vectors once, bound by memory.
__global__ void __launch_bounds__(kPackThreads)
    measure_kernel(const __grid_constant__ CodebookLayout layout, const float* codebook,
                   double* inverse_norms, double* bias, CodebookRange* range) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) / kPackLanes;
  // Lanes without a vector measure the last one again.
  const int64_t code = n < layout.codes ? n : layout.codes - 1;
  const VectorSize size =
      measure_vector(codebook + code * layout.dim, layout, inverse_norms + code * layout.groups);
  if (bias) bias[code] = size.finite ? size.bias : -static_cast<double>(INFINITY);
  if (range) {
    const double length = max_over_warp(size.length, kPackLanes);
    const double largest_bias = max_over_warp(fabs(size.bias), kPackLanes);
    if (lane_index() == 0) {
      atomic_max_not_negative(&range->length, length);
      atomic_max_not_negative(&range->bias, largest_bias);
    }
  }
}

// What a slot holds of code 0.
constexpr uint32_t kHighestEntry = 0xffffffffu;

// Which slot holds the codes that are equal to this one, which enters it. Of equal codes the one
// with the lowest index is nearest to a row, so that the others need no score. Without this, each
// row near to such a code would have to compare all of them.
__device__ __forceinline__ int64_t enter_slot(const EqualCodes& equal, const float* codebook,
                                              int dim, int64_t n) {
  const float* code = codebook + n * dim;
  uint32_t hash = 0;
  for (int d = 0; d < dim; ++d) {
    hash = (hash ^ static_cast<uint32_t>(float_as_int(code[d]))) * 0x9e3779b1u;
    hash ^= hash >> 15;
  }
  const uint32_t entry = kHighestEntry - static_cast<uint32_t>(n);
  for (int64_t slot = hash & (equal.size - 1);; slot = (slot + 1) & (equal.size - 1)) {
    uint32_t found = *static_cast<volatile uint32_t*>(equal.slots + slot);
    if (found == 0) found = atomic_set_if_zero(equal.slots + slot, entry);
    if (found == 0) return slot;
    const float* other = codebook + static_cast<int64_t>(kHighestEntry - found) * dim;
    bool same = true;
    for (int d = 0; d < dim && same; ++d) same = float_as_int(code[d]) == float_as_int(other[d]);
    if (same) {  // whichever of the equal codes is there later
      if (found < entry) atomic_max(equal.slots + slot, entry);
      return slot;
    }
  }
}

// Whether no earlier code has the same bits.
__device__ __forceinline__ bool is_first_of_equal(const EqualCodes& equal, int64_t n) {
  return equal.slots[equal.slot_of[n]] == kHighestEntry - static_cast<uint32_t>(n);
}

// `distance` of a finite code to a row of zeros.
__device__ __forceinline__ double distance_to_zero(const CodebookLayout& layout,
                                                   const float* code) {
  double distance = 0;
#pragma unroll 1
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const double norm = group_norm(squared_norm(code, begin, end), layout.l2_norm);
    double group = 0;
    for (int d = begin; d < end; ++d) {
      const double difference = static_cast<double>(code[d]) / norm;
      group += product(difference, difference);
    }
    distance += product(layout.weight[g], group);
  }
  return distance;
}

// Prepares for rows and codes that tie with many others. A row of zeros is as far from all codes of
// unit length, but for rounding: every code would have to be compared by its distance, for each
// such row. Equal codes: see enter_slot.
//
// Grid: a thread for every code of the padded codebook. Enters its code among the equal ones. A
// warp writes the nearest of its codes to a row of zeros, by `distance`, the lowest on a tie; codes
// that are not finite are infinitely far. Bytes: 4 dim a code. Bound by float64 divisions.
__global__ void __launch_bounds__(kPackThreads)
    prepare_ties_kernel(const __grid_constant__ CodebookLayout layout, const float* codebook,
                        const double* bias, NearestOfSome* to_zero, const EqualCodes equal) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  const bool finite = n < layout.codes && bias[n] > -static_cast<double>(INFINITY);
  double distance = static_cast<double>(INFINITY);
  if (finite) {
    equal.slot_of[n] = enter_slot(equal, codebook, layout.dim, n);
    distance = distance_to_zero(layout, codebook + n * layout.dim);
  }
  int64_t index = n;
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const double d = shuffle_xor(distance, step);
    const int64_t i = shuffle_xor(index, step);
    if (d < distance || (d == distance && i < index)) {
      distance = d;
      index = i;
    }
  }
  if (lane_index() == 0) to_zero[n / kWarpSize] = {distance, index};
}

// Packs code n of the padded codebook, which is measured, and raises the bounds; one that must
// never win as zeros. The work of kPackLanes lanes.
__device__ __forceinline__ void pack_code(const CodebookLayout& layout, const float* codebook,
                                          int64_t n, const PackedCodes& codes) {
  const int64_t code = n < layout.codes ? n : layout.codes - 1;
  const double bias = codes.bias[code];
  const bool finite = n < layout.codes && bias > -static_cast<double>(INFINITY);
  const bool scored = finite && is_first_of_equal(codes.equal, n);
  const CodeExponents exponents = code_exponents(codes.summary->range);

  SpareColumns spare;
  double rest = scored ? ldexp(bias, exponents.bias) : 0, magnitude = 0;
#pragma unroll
  for (uint16_t& part : spare.bias) {
    part = to_half(static_cast<float>(rest));
    const double value = static_cast<double>(from_half(part));
    rest -= value;
    magnitude += fabs(value);
  }
  spare.exclusion = to_half(scored ? 0.0f : -kExclusion);
  const PackedLengths lengths = pack_vector<Operand::kCodes>(
      codebook + code * layout.dim, scored, layout, codes.inverse_norms + code * layout.groups,
      exponents.length, spare, n, codes.fragments);
  // |2^a c| is at most |cq| + |ec|.
  const CoarseCodeBounds bounds = {max_over_warp(lengths.packed + lengths.error, kPackLanes),
                                   max_over_warp(lengths.error, kPackLanes),
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
  TokenMap map;
  PackedRows packed;
  int64_t num_rows;
};

// Grid: kPackLanes lanes for every code of the padded codebook, then for every row of the padded
// ones, in blocks of kPackThreads. Reads the vectors once (again from the L1) and writes 2 bytes a
// column of the operands, bound by memory. Rows that do not exist are packed as zeros: their scores
// are computed, and not used.
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const __grid_constant__ PackArgs args) {
  static_assert(kTileCodes % (kPackThreads / kPackLanes) == 0, "a block packs codes or rows");
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) / kPackLanes;
  if (n < args.padded_codes) {
    pack_code(args.layout, args.codebook, n, args.codes);
  } else {
    const int64_t row = n - args.padded_codes;
    const bool exists = row < args.num_rows;
    pack_row(args.rows + (exists ? args.map.token(row) : args.map.first) * args.layout.dim, exists,
             args.layout, row, args.packed);
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
                codebook, inverse_norms, static_cast<double*>(nullptr),
                static_cast<CodebookRange*>(nullptr));
}

cudaError_t launch_pack(const CodebookLayout& layout, const float* codebook,
                        const PackedCodes& codes, const float* rows, int64_t num_rows,
                        const PackedRows& packed, cudaStream_t stream) {
  TOKENFLOW_CUDA_TRY(cudaMemsetAsync(codes.summary, 0, sizeof(CodebookSummary), stream));
  TOKENFLOW_CUDA_TRY(cudaMemsetAsync(
      codes.equal.slots, 0, static_cast<size_t>(codes.equal.size) * sizeof(uint32_t), stream));
  TOKENFLOW_CUDA_TRY(launch(measure_kernel, dim3(blocks(layout.codes)), kPackThreads, 0, stream,
                            layout, codebook, codes.inverse_norms, codes.bias,
                            &codes.summary->range));
  const int64_t padded = ceil_div(layout.codes, kTileCodes) * kTileCodes;
  TOKENFLOW_CUDA_TRY(launch(prepare_ties_kernel, dim3(static_cast<unsigned>(padded / kPackThreads)),
                            kPackThreads, 0, stream, layout, codebook, codes.bias, codes.to_zero,
                            codes.equal));
  static_assert(kTileCodes % kPackThreads == 0, "whole blocks of codes");
  const PackArgs args = {layout, codebook, codes, padded, rows, {num_rows, 0, num_rows},
                         packed, num_rows};
  return launch(pack_kernel, dim3(blocks(padded + padded_rows(num_rows))), kPackThreads, 0, stream,
                args);
}

cudaError_t launch_pack_rows(const CodebookLayout& layout, const float* rows, const TokenMap& map,
                             int64_t num_rows, const PackedRows& packed, cudaStream_t stream) {
  const PackArgs args = {layout, nullptr, {}, 0, rows, map, packed, num_rows};
  return launch(pack_kernel, dim3(blocks(padded_rows(num_rows))), kPackThreads, 0, stream, args);
}

}  // namespace tokenflow::cuda
