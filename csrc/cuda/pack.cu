// Packs rows and codes as operands of the tensor cores.
#include "pack.cuh"

namespace tokenflow::cuda {
namespace {

constexpr int kPackThreads = 128;

// A code of the padded codebooks: number n of all. Its neighbours in a warp have the same book.
struct PaddedCode {
  int64_t book;
  int64_t code;  // of the book
  bool exists;
  int64_t number;  // among all that exist; where it does not, of the book's last

  __device__ __forceinline__ PaddedCode(const CodebookLayout& layout, int64_t n) {
    const int64_t padded = padded_codes(layout);
    book = n / padded;
    code = n - book * padded;
    exists = code < layout.codes;
    number = book * layout.codes + (exists ? code : layout.codes - 1);
  }
};

// Grid: kPackLanes lanes for every code of the padded codebooks, in blocks of kPackThreads. Writes
// the reciprocal lengths to `inverse_norms` [books, codes, groups], and, unless they are null,
// biases to `bias` [books, codes], and raises the range in `summary` [books]. Reads the codes once,
// bound by memory.
__global__ void __launch_bounds__(kPackThreads)
    measure_kernel(const __grid_constant__ CodebookLayout layout, const float* codebook,
                   double* inverse_norms, double* bias, CodebookSummary* summary) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) / kPackLanes;
  // Lanes without a code measure the last one again.
  const PaddedCode code(layout, n);
  const VectorSize size = measure_vector(codebook + code.number * layout.dim, layout,
                                         inverse_norms + code.number * layout.groups);
  if (bias) bias[code.number] = size.finite ? size.bias : -static_cast<double>(INFINITY);
  if (summary) {
    CodebookRange& range = summary[code.book].range;
    const double length = max_over_warp(size.length, kPackLanes);
    const double largest_bias = max_over_warp(fabs(size.bias), kPackLanes);
    if (lane_index() == 0) {
      atomic_max_not_negative(&range.length, length);
      atomic_max_not_negative(&range.bias, largest_bias);
    }
  }
}

// A row of zeros is as far from all codes of unit length, but for rounding: every code would have
// to be compared by its distance, for each such row. By the inner product all codes tie.
//
// Grid: a thread for every code of the padded codebooks. The nearest of a warp's codes to a row of
// zeros, by `distance`, the lowest on a tie; codes that are not finite are infinitely far.
// Bytes: 4 dim a code. Bound by float64 divisions.
__global__ void __launch_bounds__(kPackThreads)
    nearest_to_zero_kernel(const __grid_constant__ CodebookLayout layout, const float* codebook,
                           const double* bias, NearestOfSome* to_zero) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  const PaddedCode padded(layout, n);
  const bool finite = padded.exists && bias[padded.number] > -static_cast<double>(INFINITY);
  double distance = finite ? 0 : static_cast<double>(INFINITY);
  const float* code = codebook + padded.number * layout.dim;
  const bool by_distance = finite && layout.metric != Metric::kDot;
#pragma unroll 1
  for (int g = 0; g < layout.groups && by_distance; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const double norm = group_norm(squared_norm(code, begin, end), layout.l2_norm);
    double group = 0;
    for (int d = begin; d < end; ++d) {
      const double difference = static_cast<double>(code[d]) / norm;
      group += product(difference, difference);
    }
    distance += product(layout.weight[g], group);
  }
  int64_t index = padded.code;
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

// Packs code n of the padded codebooks, which is measured, and raises the bounds; the work of
// kPackLanes lanes.
__device__ __forceinline__ void pack_code(const CodebookLayout& layout, const float* codebook,
                                          int64_t n, const PackedCodes& codes) {
  const PaddedCode code(layout, n);
  CodebookSummary& summary = codes.summary[code.book];
  const double bias = codes.bias[code.number];
  const bool finite = code.exists && bias > -static_cast<double>(INFINITY);
  const CodeExponents exponents = code_exponents(summary.range);

  SpareColumns spare;
  double rest = finite ? ldexp(bias, exponents.bias) : 0, magnitude = 0;
#pragma unroll
  for (uint16_t& part : spare.bias) {
    part = to_half(static_cast<float>(rest));
    const double value = static_cast<double>(from_half(part));
    rest -= value;
    magnitude += fabs(value);
  }
  spare.exclusion = to_half(finite ? 0.0f : -kExclusion);
  const PackedLengths lengths =
      pack_vector<Operand::kCodes>(codebook + code.number * layout.dim, finite, layout,
                                   codes.inverse_norms + code.number * layout.groups,
                                   exponents.length, spare, n, codes.fragments);
  // |2^a c| is at most |cq| + |ec|.
  const CoarseCodeBounds bounds = {max_over_warp(lengths.packed + lengths.error, kPackLanes),
                                   max_over_warp(lengths.error, kPackLanes),
                                   max_over_warp(round_up(magnitude), kPackLanes)};
  if (lane_index() == 0) {
    CoarseCodeBounds& all = summary.bounds;
    atomic_max_not_negative(&all.length, bounds.length);
    atomic_max_not_negative(&all.error, bounds.error);
    atomic_max_not_negative(&all.bias, bounds.bias);
  }
}

struct PackArgs {
  CodebookLayout layout;
  const float* codebook;
  PackedCodes codes;
  int64_t padded_codes;  // of all books; 0 where the codes are packed already
  const float* rows;
  TokenMap map;
  PackedRows packed;
  int64_t num_rows;  // a book
};

// Grid: kPackLanes lanes for every code of the padded codebooks, then for every row of the padded
// ones, in blocks of kPackThreads. Reads the vectors once (again from the L1) and writes 2 bytes a
// column of the operands, bound by memory. Rows that do not exist are packed as zeros: their scores
// are computed, and not used.
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const __grid_constant__ PackArgs args) {
  static_assert(kTileCodes % (kPackThreads / kPackLanes) == 0, "a block packs codes or rows");
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) / kPackLanes;
  if (n < args.padded_codes) {
    pack_code(args.layout, args.codebook, n, args.codes);
  } else {
    const int64_t row = n - args.padded_codes, padded = padded_rows(args.num_rows);
    const int64_t book = row / padded, in_book = row - book * padded;
    const bool exists = in_book < args.num_rows;
    const int64_t token = exists ? args.map.token(in_book, book) : args.map.first;
    pack_row(args.rows + token * args.layout.dim, exists, args.layout, book, row, args.packed);
  }
}

// Blocks of kPackLanes lanes for every vector.
unsigned blocks(int64_t vectors) {
  return static_cast<unsigned>(ceil_div(kPackLanes * vectors, kPackThreads));
}

}  // namespace

cudaError_t launch_inverse_norms(const CodebookLayout& layout, const float* codebook,
                                 double* inverse_norms, cudaStream_t stream) {
  return launch(measure_kernel, dim3(blocks(layout.books * padded_codes(layout))), kPackThreads, 0,
                stream, layout, codebook, inverse_norms, static_cast<double*>(nullptr),
                static_cast<CodebookSummary*>(nullptr));
}

cudaError_t launch_pack(const CodebookLayout& layout, const float* codebook,
                        const PackedCodes& codes, const float* rows, const TokenMap& map,
                        int64_t num_rows, const PackedRows& packed, cudaStream_t stream) {
  const int64_t padded = layout.books * padded_codes(layout);
  TOKENFLOW_CUDA_TRY(cudaMemsetAsync(
      codes.summary, 0, static_cast<size_t>(layout.books) * sizeof(CodebookSummary), stream));
  TOKENFLOW_CUDA_TRY(launch(measure_kernel, dim3(blocks(padded)), kPackThreads, 0, stream, layout,
                            codebook, codes.inverse_norms, codes.bias, codes.summary));
  TOKENFLOW_CUDA_TRY(launch(nearest_to_zero_kernel,
                            dim3(static_cast<unsigned>(padded / kPackThreads)), kPackThreads, 0,
                            stream, layout, codebook, codes.bias, codes.to_zero));
  static_assert(kTileCodes % kPackThreads == 0, "whole blocks of codes");
  const PackArgs args = {layout, codebook, codes, padded, rows, map, packed, num_rows};
  return launch(pack_kernel, dim3(blocks(padded + layout.books * padded_rows(num_rows))),
                kPackThreads, 0, stream, args);
}

cudaError_t launch_pack_rows(const CodebookLayout& layout, const float* rows, const TokenMap& map,
                             int64_t num_rows, const PackedRows& packed, cudaStream_t stream) {
  const PackArgs args = {layout, nullptr, {}, 0, rows, map, packed, num_rows};
  return launch(pack_kernel, dim3(blocks(layout.books * padded_rows(num_rows))), kPackThreads, 0,
                stream, args);
}

}  // namespace tokenflow::cuda
