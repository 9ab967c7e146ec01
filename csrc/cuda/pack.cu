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

// A hash of a channel's number; those of a vector's channels are added up. Zeros of both signs are
// one number.
__device__ __forceinline__ uint32_t hash_of(float value, int channel) {
  uint32_t bits = static_cast<uint32_t>(float_as_int(value + 0.0f));
  bits = (bits ^ static_cast<uint32_t>(channel) * 0x9e3779b9u) * 0x85ebca6bu;
  return (bits ^ bits >> 15) * 0xc2b2ae35u;
}

// The slot of a hash among so many.
__device__ __forceinline__ int64_t slot_of(uint32_t hash, int64_t slots) {
  return static_cast<int64_t>(hash ^ hash >> 16) & (slots - 1);
}

// Grid: kPackLanes lanes for every row, in blocks of kPackThreads. Writes the reciprocal lengths of
// a codebook's rows to `inverse_norms` [books, codes, groups]. Reads the rows once, bound by
// memory.
__global__ void __launch_bounds__(kPackThreads)
    inverse_norms_kernel(const __grid_constant__ CodebookLayout layout, const float* codebook,
                         double* inverse_norms) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) / kPackLanes;
  const PaddedCode code(layout, n);  // lanes without a code measure the last one again
  (void)measure_vector(codebook + code.number * layout.dim, layout,
                       inverse_norms + code.number * layout.groups);
}

// Codes whose mean is the centre, a vector for each kPackLanes threads of a block.
constexpr int kCentreCodes = kPackThreads / kPackLanes;

// No centre beyond so many channels, which one block would take too long over.
constexpr int kMostCentreChannels = 4096;

// The centre of a book's codes: the mean of a few of them, where it takes away three quarters and
// more of their squared lengths. The work of a block. Shared memory: a double a thread, and the
// codes' reciprocal lengths.
__device__ __forceinline__ void find_centre(const CodebookLayout& layout, const float* codebook,
                                            int64_t book, const PackedCodes& codes) {
  double* partial = shared_memory<double>();
  double* inverse_norms = partial + kPackThreads;  // [kPackThreads, groups]
  const int count =
      layout.codes < kCentreCodes ? static_cast<int>(layout.codes) : int{kCentreCodes};
  const auto code = [&](int i) {
    return codebook + (book * layout.codes + layout.codes * (i % count) / count) * layout.dim;
  };
  const int thread = static_cast<int>(threadIdx.x), own = thread / kPackLanes;
  double* own_norms = inverse_norms + thread * layout.groups;
  const VectorSize size = measure_vector(code(own), layout, own_norms);
  const bool counts = own < count && size.finite;
  for (int g = 0; g < layout.groups && !counts; ++g) own_norms[g] = 0;  // adds nothing
  const auto sum = [&](double value) {
    block_barrier();
    partial[thread] = value;
    for (int step = kPackThreads / 2; step > 0; step /= 2) {
      block_barrier();
      if (thread < step) partial[thread] += partial[thread + step];
    }
    block_barrier();
    return partial[0];
  };
  const bool first_lane = thread % kPackLanes == 0;
  const double squares = sum(counts && first_lane ? size.length * size.length : 0.0);
  const double finite = sum(counts && first_lane ? 1.0 : 0.0);
  double square = 0;
  for (int g = 0; g < layout.groups; ++g) {
    const double root = sqrt(layout.weight[g]) / finite;
    for (int d = layout.begin[g] + thread; d < layout.begin[g + 1]; d += kPackThreads) {
      double mean = 0;
#pragma unroll 8
      for (int i = 0; i < count; ++i) {
        const double factor = inverse_norms[i * kPackLanes * layout.groups + g];
        if (factor != 0) mean += static_cast<double>(code(i)[d]) * factor;  // or it is not finite
      }
      mean *= root;
      codes.centre[book * layout.dim + d] = mean;
      square += mean * mean;
    }
  }
  square = sum(square);
  if (thread == 0 && finite * square > 0.75 * squares) {
    CodebookSummary& summary = codes.summary[book];
    summary.has_centre = 1;
    summary.centre_bias = centre_bias(square, layout);
  }
}

size_t measure_shared_bytes(const CodebookLayout& layout) {
  return sizeof(double) * static_cast<size_t>(kPackThreads * (1 + layout.groups));
}

// Grid: a block for each book, which finds its centre; then kPackLanes lanes for every code of the
// padded codebooks, in blocks of kPackThreads. Writes reciprocal lengths and biases, counts the
// codes in bins by their lengths, and keeps the lowest code of every hash. Bytes: 4 dim a code.
// Bound by memory.
__global__ void __launch_bounds__(kPackThreads, 8)
    measure_kernel(const __grid_constant__ CodebookLayout layout, const float* codebook,
                   const __grid_constant__ PackedCodes codes) {
  if (blockIdx.x < layout.books) {
    if (layout.dim <= kMostCentreChannels) find_centre(layout, codebook, blockIdx.x, codes);
    return;
  }
  const int64_t n =
      ((blockIdx.x - layout.books) * kPackThreads + static_cast<int64_t>(threadIdx.x)) / kPackLanes;
  const PaddedCode code(layout, n);  // lanes without a code measure the last one again
  const float* vector = codebook + code.number * layout.dim;
  const VectorSize size =
      measure_vector(vector, layout, codes.inverse_norms + code.number * layout.groups);
  uint32_t hash = 0;
  for (int d = lane_index() % kPackLanes; d < layout.dim; d += kPackLanes) {
    hash += hash_of(vector[d], d);
  }
  for (int mask = kPackLanes / 2; mask > 0; mask /= 2) hash += shuffle_xor(hash, mask);

  // Neighbours nearly always share a bin: the warp counts for the first code's.
  const int bin = length_bin(size.length);
  const bool counts = code.exists && size.finite && lane_index() % kPackLanes == 0;
  const int common = shuffle(bin, 0);
  const int together = count_bits(ballot(counts && bin == common));
  const double length = max_over_warp(bin == common ? size.length : 0.0, 1);
  const double bias = max_over_warp(bin == common ? fabs(size.bias) : 0.0, 1);
  LengthBin* bins = codes.bins + code.book * kLengthBins;
  const bool for_all = lane_index() == 0 && together > 0;
  if (for_all || (counts && bin != common)) {
    LengthBin& own = bins[bin];
    (void)atomic_add(&own.count, for_all ? together : 1);
    atomic_max_not_negative(&own.length, for_all ? length : size.length);
    atomic_max_not_negative(&own.bias, for_all ? bias : fabs(size.bias));
  }
  if (lane_index() % kPackLanes != 0) return;
  codes.bias[code.number] = size.finite ? size.bias : -static_cast<double>(INFINITY);
  codes.fate[code.number] = size.finite ? static_cast<unsigned char>(bin) : kNoCoarseScore;
  if (counts) {
    const int64_t slots = hash_slots(layout);
    atomic_max(codes.first_of_hash + code.book * slots + slot_of(hash, slots),
               static_cast<int>(layout.codes - code.code));
  }
}

// Which of a book's codes are outliers.
struct LengthCut {
  int bin = kLengthBins - 1;  // those of higher bins
  double length = 0;          // the largest of the others
  double any_length = 0;      // of all

  __device__ __forceinline__ explicit LengthCut(const LengthBin* bins) {
    int above = 0;
    for (int b = kLengthBins - 1; b >= 0; --b) {
      const int count = bins[b].count;
      if (count == 0) continue;
      if (any_length == 0) any_length = length = bins[b].length;
      if (above + count > kMostOutliers) {
        // A bin may end anywhere: it takes a gap to set codes apart.
        if (above > 0 && 4 * bins[b].length < any_length) {
          bin = b;
          length = bins[b].length;
        }
        return;
      }
      above += count;
    }
  }
};

// Decides which codes get a coarse score, and finds the nearest to a row of zeros.
//
// A code that equals one before it is never the nearest. Without this, each copy would have to be
// compared by its distance, for each row that is near to them.
//
// A row of zeros is as far from all codes of unit length, but for rounding: every code would have
// to be compared by its distance, for each such row. By the inner product all codes tie.
//
// Grid: a thread for every code of the padded codebooks; what the measuring found must be there.
// Bytes: 4 dim a code, twice for copies. Bound by float64 divisions.
__global__ void __launch_bounds__(kPackThreads, 6)
    judge_kernel(const __grid_constant__ CodebookLayout layout, const float* codebook,
                 const __grid_constant__ PackedCodes codes) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  const PaddedCode padded(layout, n);
  CodebookSummary& summary = codes.summary[padded.book];
  const LengthBin* bins = codes.bins + padded.book * kLengthBins;
  const LengthCut cut(bins);
  const float* code = codebook + padded.number * layout.dim;
  const unsigned char measured = padded.exists ? codes.fate[padded.number] : kNoCoarseScore;
  const bool finite = measured != kNoCoarseScore;
  const bool by_distance = finite && layout.metric != Metric::kDot;
  double distance = finite ? 0 : static_cast<double>(INFINITY);
  uint32_t hash = 0;
#pragma unroll 1
  for (int g = 0; g < layout.groups && finite; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const double norm =
        by_distance ? group_norm(squared_norm(code, begin, end), layout.l2_norm) : 1.0;
    double group = 0;
    for (int d = begin; d < end; ++d) {
      hash += hash_of(code[d], d);
      if (!by_distance) continue;
      const double difference = static_cast<double>(code[d]) / norm;
      group += product(difference, difference);
    }
    distance += product(layout.weight[g], group);
  }

  bool counts = finite;
  if (finite) {
    const int64_t slots = hash_slots(layout);
    const int64_t first =
        layout.codes - codes.first_of_hash[padded.book * slots + slot_of(hash, slots)];
    const float* other = codebook + (padded.book * layout.codes + first) * layout.dim;
    bool equal = first < padded.code;
    for (int d = 0; d < layout.dim && equal; ++d) equal = code[d] == other[d];
    if (equal) {
      counts = false;
    } else if (measured > cut.bin) {
      counts = false;
      summary.outliers[atomic_add(&summary.num_outliers, 1)] = static_cast<int>(padded.code);
    }
  }
  // Codes that do not exist have the last one's number.
  if (padded.exists) codes.fate[padded.number] = counts ? kCoarseScore : kNoCoarseScore;

  if (summary.has_centre) {
    double square = 0, bias = 0;
    if (counts) {
      const CentredVector centred =
          measure_centred<1>(code, layout, codes.inverse_norms + padded.number * layout.groups,
                             codes.centre + padded.book * layout.dim);
      square = centred.square;
      bias = codes.bias[padded.number] + centred.with_centre - summary.centre_bias;
    }
    // Packing sums in another order.
    square = max_over_warp(square, 1) * (1 + 0x1p-40);
    bias = max_over_warp(fabs(bias), 1) * (1 + 0x1p-30);
    if (lane_index() == 0) {
      atomic_max_not_negative(&summary.range.length, sqrt(square));
      atomic_max_not_negative(&summary.range.bias, bias);
    }
  }
  if (padded.code == 0) {
    summary.length = cut.length;
    summary.any_length = cut.any_length;
    if (!summary.has_centre) {
      double bias = 0;
      for (int b = 0; b <= cut.bin; ++b) bias = bins[b].bias > bias ? bins[b].bias : bias;
      summary.range = {cut.length, bias};
    }
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
  if (lane_index() == 0) codes.to_zero[n / kWarpSize] = {distance, index};
}

// Packs code n of the padded codebooks, which is judged, and raises the bounds; the work of
// kPackLanes lanes.
template <FragmentOrder kOrder>
__device__ __forceinline__ void pack_code(const CodebookLayout& layout, const float* codebook,
                                          int64_t n, const PackedCodes& codes) {
  const PaddedCode code(layout, n);
  const float* vector = codebook + code.number * layout.dim;
  const double* inverse_norms = codes.inverse_norms + code.number * layout.groups;
  CodebookSummary& summary = codes.summary[code.book];
  const bool counts = code.exists && codes.fate[code.number] == kCoarseScore;
  const CodeExponents exponents = code_exponents(summary.range);
  const double* centre = summary.has_centre ? codes.centre + code.book * layout.dim : nullptr;
  double bias = codes.bias[code.number];
  if (centre) {
    bias += measure_centred<kPackLanes>(vector, layout, inverse_norms, centre).with_centre;
    bias -= summary.centre_bias;
  }

  SpareColumns spare;
  double rest = counts ? ldexp(bias, exponents.bias) : 0, magnitude = 0;
#pragma unroll
  for (uint16_t& part : spare.bias) {
    part = to_half(static_cast<float>(rest));
    const double value = static_cast<double>(from_half(part));
    rest -= value;
    magnitude += fabs(value);
  }
  spare.exclusion = to_half(counts ? 0.0f : -kExclusion);
  const PackedLengths lengths = pack_vector<Operand::kCodes, kOrder>(
      vector, counts, layout, inverse_norms, centre, exponents.length, spare, n, codes.fragments);
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
template <FragmentOrder kOrder>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const __grid_constant__ PackArgs args) {
  static_assert(kTileCodes % (kPackThreads / kPackLanes) == 0, "a block packs codes or rows");
  if constexpr (!kHasUse<kOrder>) return;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x) / kPackLanes;
  if (n < args.padded_codes) {
    pack_code<kOrder>(args.layout, args.codebook, n, args.codes);
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
  return launch(inverse_norms_kernel, dim3(blocks(layout.books * padded_codes(layout))),
                kPackThreads, 0, stream, layout, codebook, inverse_norms);
}

cudaError_t launch_pack(const CodebookLayout& layout, const float* codebook,
                        const PackedCodes& codes, const float* rows, const TokenMap& map,
                        int64_t num_rows, const PackedRows& packed, cudaStream_t stream) {
  const int64_t padded = layout.books * padded_codes(layout);
  const int* end = codes.first_of_hash + layout.books * hash_slots(layout);
  TOKENFLOW_CUDA_TRY(
      cudaMemsetAsync(codes.summary, 0,
                      static_cast<size_t>(reinterpret_cast<const char*>(end) -
                                          reinterpret_cast<const char*>(codes.summary)),
                      stream));
  TOKENFLOW_CUDA_TRY(
      launch(measure_kernel, dim3(static_cast<unsigned>(layout.books) + blocks(padded)),
             kPackThreads, measure_shared_bytes(layout), stream, layout, codebook, codes));
  TOKENFLOW_CUDA_TRY(launch(judge_kernel, dim3(static_cast<unsigned>(padded / kPackThreads)),
                            kPackThreads, 0, stream, layout, codebook, codes));
  static_assert(kTileCodes % kPackThreads == 0, "whole blocks of codes");
  const PackArgs args = {layout, codebook, codes, padded, rows, map, packed, num_rows};
  return launch(codes.order == FragmentOrder::kByLane ? pack_kernel<FragmentOrder::kByLane>
                                                      : pack_kernel<FragmentOrder::kByWord>,
                dim3(blocks(padded + layout.books * padded_rows(num_rows))), kPackThreads, 0,
                stream, args);
}

cudaError_t launch_pack_rows(const CodebookLayout& layout, const float* rows, const TokenMap& map,
                             int64_t num_rows, const PackedRows& packed, cudaStream_t stream) {
  const PackArgs args = {layout, nullptr, {}, 0, rows, map, packed, num_rows};
  return launch(pack_kernel<FragmentOrder::kByLane>,
                dim3(blocks(layout.books * padded_rows(num_rows))), kPackThreads, 0, stream, args);
}

}  // namespace tokenflow::cuda
