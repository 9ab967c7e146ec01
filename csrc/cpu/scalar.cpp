#include "scalar.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "planes.h"

namespace tokenflow::cpu {
namespace {

// Rows are seldom wide: several are one for the inner loops, with the tables as often. So many that
// they are whole vectors, and 64 channels or more.
int rows_together(int dim, int count) {
  constexpr int kWidth = 64, kVector = 16, kMostEntries = 1 << 16;
  if (dim >= kWidth) return 1;
  const int whole = kVector / std::gcd(kVector, dim);
  const int together = (kWidth + whole * dim - 1) / (whole * dim) * whole;
  return int64_t{count} * together * dim > kMostEntries ? 1 : together;
}

}  // namespace

template <typename T>
void scalar_quantize(const ScalarQuantizeArgs<T>& args, const Executor& executor) {
  const Pyramid& pyramid = args.pyramid;
  const int64_t tokens = tokens_per_image(pyramid);
  const int dim = args.layout.dim, count = args.layout.thresholds;
  const Planes<T> planes(pyramid, dim, executor);
  const auto quantize = channel_kernels<T>().quantize_scalars;
  planes.each_map(2, [&](int64_t b, T* scratch) {
    thread_local std::vector<T> residual, sum;
    residual.resize(planes.plane_size());
    sum.assign(planes.plane_size(), T(0));
    T* codes = scratch + planes.scratch_size();
    planes.load(args.h, b, residual.data());
    for (int s = 0; s < pyramid.num_scales; ++s) {
      const int64_t first = (b * tokens + pyramid.first_token[s]) * dim;
      T* rows = args.rows + first;
      planes.pool(residual.data(), s, rows);
      const int64_t round = args.layout.round[s];
      for (int64_t n = 0; n < area(pyramid.extent[s]); ++n) {
        const int64_t at = first + n * dim;
        quantize(args.rows + at, args.thresholds + round * count * dim,
                 args.values + round * (count + 1) * dim, count, dim,
                 args.flips ? args.flips + at : nullptr, args.digits + at, codes + n * dim);
      }
      planes.add(codes, s, scratch, sum.data(), residual.data());
    }
    planes.store(sum.data(), b, args.quantized);
  });
}

template <typename T>
void scalar_rows(const ScalarRowsArgs<T>& args, const Executor& executor) {
  const int dim = args.dim, count = args.thresholds;
  const int64_t rounds = args.rounds;
  const auto quantize = channel_kernels<T>().quantize_scalars;
  const int together = rows_together(dim, count), width = together * dim;
  const auto repeated = [&](const T* table, int64_t lines) {
    std::vector<T> out;
    out.reserve(lines * width);
    for (int64_t i = 0; i < lines * together; ++i) {
      const T* line = table + i / together * dim;
      out.insert(out.end(), line, line + dim);
    }
    return out;
  };
  const std::vector<T> thresholds = repeated(args.thresholds_table, rounds * count);
  const std::vector<T> values = repeated(args.values, rounds * (count + 1));
  // Rows [first, last), so many at a time.
  const auto quantize_rows = [&](int64_t first, int64_t last, int at_once, const T* thresholds,
                                 const T* values) {
    const int width = at_once * dim;
    std::vector<T> rest(width), codes(width);
    std::vector<int16_t> digits(width);
    for (int64_t n = first; n < last; n += at_once) {
      if (rounds == 1) {
        quantize(args.rows + n * dim, thresholds, values, count, width, nullptr,
                 args.digits + n * dim, args.codes + n * dim);
        continue;
      }
      std::copy_n(args.rows + n * dim, width, rest.data());
      for (int64_t r = 0; r < rounds; ++r) {
        quantize(rest.data(), thresholds + r * count * width, values + r * (count + 1) * width,
                 count, width, nullptr, digits.data(), codes.data());
        for (int i = 0; i < width; ++i) rest[i] -= codes[i];
        for (int row = 0; row < at_once; ++row) {
          const int64_t at = ((n + row) * rounds + r) * dim;
          std::copy_n(codes.data() + row * dim, dim, args.codes + at);
          std::copy_n(digits.data() + row * dim, dim, args.digits + at);
        }
      }
    }
  };
  const int64_t blocks = args.num_rows / together;
  executor.for_ranges(blocks, rounds * (count + 2) * width, [&](int64_t begin, int64_t end) {
    quantize_rows(begin * together, end * together, together, thresholds.data(), values.data());
  });
  quantize_rows(blocks * together, args.num_rows, 1, args.thresholds_table, args.values);
}

void pack_digits(const PackDigitsArgs& args, const Executor& executor) {
  executor.for_ranges(
      args.batch * args.tokens, args.groups * args.dim, [&](int64_t begin, int64_t end) {
        if (args.groups == 1) {  // tokens lie as their indices do
          for (int64_t n = begin; n < end; ++n) {
            args.indices[n] = tokenflow::pack_digits(args, args.digits + n * args.dim);
          }
          return;
        }
        for (int64_t n = begin; n < end; ++n) {
          const int64_t b = n / args.tokens, t = n % args.tokens;
          for (int g = 0; g < args.groups; ++g) {
            args.indices[(b * args.groups + g) * args.tokens + t] =
                tokenflow::pack_digits(args, args.digits + (n * args.groups + g) * args.dim);
          }
        }
      });
}

template <typename T>
void upsample_transpose(const UpsampleTransposeArgs<T>& args, const Executor& executor) {
  const Pyramid& pyramid = args.pyramid;
  const Planes<T> planes(pyramid, args.dim, executor);
  planes.each_map(1, [&](int64_t b, T* scratch) {
    thread_local std::vector<T> plane;
    plane.resize(planes.plane_size());
    planes.load(args.plane, b, plane.data());
    for (int s = 0; s < pyramid.num_scales; ++s) {
      const int64_t first = b * tokens_per_image(pyramid) + pyramid.first_token[s];
      planes.add_transpose(plane.data(), s, scratch, args.rows + first * args.dim);
    }
  });
}

template <typename T>
void pool_transpose(const PoolTransposeArgs<T>& args, const Executor& executor) {
  const Pyramid& pyramid = args.pyramid;
  const Planes<T> planes(pyramid, args.dim, executor);
  planes.each_map(0, [&](int64_t b, T*) {
    thread_local std::vector<T> plane;
    plane.assign(planes.plane_size(), T(0));
    for (int s = 0; s < pyramid.num_scales; ++s) {
      const int64_t first = b * tokens_per_image(pyramid) + pyramid.first_token[s];
      planes.pool_transpose_add(args.rows + first * args.dim, s, plane.data());
    }
    planes.store(plane.data(), b, args.plane);
  });
}

#define TOKENFLOW_INSTANTIATE(T)                                                         \
  template void scalar_quantize<T>(const ScalarQuantizeArgs<T>&, const Executor&);       \
  template void scalar_rows<T>(const ScalarRowsArgs<T>&, const Executor&);               \
  template void upsample_transpose<T>(const UpsampleTransposeArgs<T>&, const Executor&); \
  template void pool_transpose<T>(const PoolTransposeArgs<T>&, const Executor&);

TOKENFLOW_INSTANTIATE(float)
TOKENFLOW_INSTANTIATE(double)

#undef TOKENFLOW_INSTANTIATE

}  // namespace tokenflow::cpu
