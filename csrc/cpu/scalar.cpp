#include "scalar.h"

#include <algorithm>
#include <vector>

#include "planes.h"

namespace tokenflow::cpu {
namespace {

// Digits and values of one row of `dim` channels. The channels are the inner loop: it has no
// branch, and its vectors are as wide as the compiler's.
template <typename T>
void quantize_row(const T* row, const T* thresholds, const T* values, int count, int dim,
                  const bool* flips, int16_t* digits, T* codes) {
  std::fill_n(digits, dim, int16_t{0});
  for (int i = 0; i < count; ++i) {
    const T* line = thresholds + static_cast<int64_t>(i) * dim;
    for (int d = 0; d < dim; ++d) digits[d] += row[d] > line[d];
  }
  if (flips) {
    for (int d = 0; d < dim; ++d) digits[d] ^= flips[d];
  }
  for (int d = 0; d < dim; ++d) codes[d] = values[static_cast<int64_t>(digits[d]) * dim + d];
}

}  // namespace

template <typename T>
void scalar_quantize(const ScalarQuantizeArgs<T>& args, const Executor& executor) {
  const Pyramid& pyramid = args.pyramid;
  const int64_t tokens = tokens_per_image(pyramid);
  const int dim = args.layout.dim, count = args.layout.thresholds;
  const Planes<T> planes(pyramid, dim, executor);
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
        quantize_row(args.rows + at, args.thresholds + round * count * dim,
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
  if (args.rounds == 1) {
    // Rows are seldom wide: several are one for the inner loops, with the tables as often.
    constexpr int kWidth = 64;
    const int together = std::max(1, kWidth / dim), width = together * dim;
    const auto repeated = [&](const T* table, int lines) {
      std::vector<T> out;
      for (int i = 0; i < lines * together; ++i) {
        const T* line = table + static_cast<int64_t>(i / together) * dim;
        out.insert(out.end(), line, line + dim);
      }
      return out;
    };
    const std::vector<T> thresholds = repeated(args.thresholds_table, count);
    const std::vector<T> values = repeated(args.values, count + 1);
    executor.for_ranges(args.num_rows / together, (count + 2) * width,
                        [&](int64_t begin, int64_t end) {
                          for (int64_t n = begin; n < end; ++n) {
                            const int64_t at = n * width;
                            quantize_row(args.rows + at, thresholds.data(), values.data(), count,
                                         width, nullptr, args.digits + at, args.codes + at);
                          }
                        });
    for (int64_t n = args.num_rows / together * together; n < args.num_rows; ++n) {
      quantize_row(args.rows + n * dim, args.thresholds_table, args.values, count, dim, nullptr,
                   args.digits + n * dim, args.codes + n * dim);
    }
    return;
  }
  executor.for_ranges(args.num_rows, static_cast<int64_t>(args.rounds) * (count + 2) * dim,
                      [&](int64_t begin, int64_t end) {
                        std::vector<T> residual(dim);
                        for (int64_t n = begin; n < end; ++n) {
                          std::copy_n(args.rows + n * dim, dim, residual.data());
                          for (int64_t r = 0; r < args.rounds; ++r) {
                            const int64_t at = (n * args.rounds + r) * dim;
                            quantize_row(residual.data(), args.thresholds_table + r * count * dim,
                                         args.values + r * (count + 1) * dim, count, dim, nullptr,
                                         args.digits + at, args.codes + at);
                            for (int d = 0; d < dim; ++d) residual[d] -= args.codes[at + d];
                          }
                        }
                      });
}

void pack_digits(const PackDigitsArgs& args, const Executor& executor) {
  executor.for_ranges(
      args.batch * args.tokens, args.groups * args.dim, [&](int64_t begin, int64_t end) {
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
