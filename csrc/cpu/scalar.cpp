#include "scalar.h"

#include <algorithm>
#include <vector>

#include "planes.h"
#include "scalar_tables.h"

namespace tokenflow::cpu {
namespace {

// Rows of a scale are worked on so many numbers at a time, all of which stay in the nearest cache.
constexpr int64_t kNumbersAtOnce = 2048;

// What both passes know of rows: tables, kernels and scratch of a few rows. One for a thread.
template <typename T>
class Rows {
 public:
  Rows(const ScalarLayout& layout, const WideTables<T>& tables)
      : kernels_(channel_kernels<T>()),
        layout_(layout),
        tables_(tables),
        at_once_(tables.together() * std::max<int64_t>(1, kNumbersAtOnce / tables.width())),
        digits_(at_once_ * layout.dim),
        values_(digits_.size()),
        stand_in_(layout.stand_in == StandIn::kSame ? 0 : digits_.size()) {}

  // task(first, count) for all rows, a few at a time.
  template <typename Task>
  void for_some(int64_t count, const Task& task) const {
    for (int64_t first = 0; first < count; first += at_once_) {
      task(first, std::min(at_once_, count - first));
    }
  }

  // Digits and values of rows; the latter to `codes`, or kept here where it is null.
  const T* quantize(const T* rows, int64_t count, int round, const bool* flips,
                    T* codes = nullptr) {
    if (!codes) codes = values_.data();
    kernels_.quantize_scalars(rows, count * layout_.dim, tables_.thresholds(round),
                              tables_.values(round), layout_.thresholds, tables_.width(), flips,
                              digits_.data(), codes);
    return codes;
  }
  const int16_t* digits() const { return digits_.data(); }

  const T* stand_in(const T* rows, int64_t count, int round) {
    if (layout_.stand_in == StandIn::kSame) return rows;
    kernels_.stand_in(table(round), rows, count * layout_.dim, stand_in_.data());
    return stand_in_.data();
  }
  void stand_in_backward(const T* rows, int64_t count, int round, T* grad) const {
    if (layout_.stand_in == StandIn::kSame) return;
    kernels_.stand_in_backward(table(round), rows, count * layout_.dim, grad);
  }

 private:
  StandInTable<T> table(int round) const {
    return {layout_.stand_in, layout_.dim / layout_.groups, tables_.width(), tables_.curves(round)};
  }

  const ChannelKernels<T>& kernels_;
  const ScalarLayout& layout_;
  const WideTables<T>& tables_;
  const int64_t at_once_;
  std::vector<int16_t> digits_;
  std::vector<T> values_, stand_in_;
};

template <typename T>
WideTables<T> wide_tables(const ScalarTables<T>& tables, const ScalarLayout& layout) {
  return {tables, layout.rounds, layout.thresholds, layout.dim};
}

// task(first, count, work) for ranges of rows.
template <typename T, typename Task>
void for_rows(const ScalarLayout& layout, const ScalarTables<T>& narrow, int64_t num_rows,
              const Executor& executor, const Task& task) {
  const WideTables<T> tables = wide_tables(narrow, layout);
  const int64_t together = tables.together();
  const int64_t cost = int64_t{layout.rounds} * (layout.thresholds + 2) * tables.width();
  executor.for_ranges(ceil_div(num_rows, together), cost, [&](int64_t begin, int64_t end) {
    Rows<T> work(layout, tables);
    const int64_t first = begin * together;
    work.for_some(std::min(num_rows, end * together) - first,
                  [&](int64_t n, int64_t count) { task(first + n, count, work); });
  });
}

// Sums over the tokens of each map's scales, which are added up over maps in the maps' order: the
// same bits however many threads there are.
class MapSums {
 public:
  MapSums(const Pyramid& pyramid, int dim)
      : stride_(dim + 2),
        scales_(pyramid.num_scales),
        sums_(pyramid.batch * pyramid.num_scales * stride_) {}

  double* error(int64_t b, int s) { return sums_.data() + (b * scales_ + s) * stride_; }
  double* entropy(int64_t b, int s) { return error(b, s) + 1; }
  double* chances(int64_t b, int s) { return error(b, s) + 2; }

  // out [count] = the sums at `position` on of scale s, over maps, times a factor.
  template <typename T>
  void store(int s, int position, int count, double factor, T* out) const {
    for (int i = 0; i < count; ++i) {
      double sum = 0;
      for (size_t at = s * stride_ + position + i; at < sums_.size(); at += scales_ * stride_) {
        sum += sums_[at];
      }
      out[i] = static_cast<T>(sum * factor);
    }
  }

 private:
  const size_t stride_, scales_;
  std::vector<double> sums_;
};

}  // namespace

// A map's rows never leave the caches where they are not kept: a scale is pooled, and a few of its
// rows at a time become digits, indices, values and losses.
template <typename T>
void scalar_quantize(const ScalarQuantizeArgs<T>& args, const Executor& executor) {
  const Pyramid& pyramid = args.pyramid;
  const ScalarLayout& layout = args.layout;
  const int64_t tokens = tokens_per_image(pyramid);
  const int dim = layout.dim, groups = args.pack.groups;
  const bool losses = args.error || args.entropy;
  const Planes<T> planes(pyramid, dim, executor);
  const ChannelKernels<T>& kernels = channel_kernels<T>();
  const WideTables<T> tables = wide_tables(args.tables, layout);
  MapSums sums(pyramid, losses ? dim : 0);
  planes.each_map(args.rows ? 2 : 3, [&](int64_t b, T* scratch) {
    thread_local std::vector<T> residual, sum, chances;
    residual.resize(planes.plane_size());
    sum.assign(planes.plane_size(), T(0));
    T* codes = scratch + planes.scratch_size();
    Rows<T> work(layout, tables);
    planes.load(args.h, b, residual.data());
    for (int s = 0; s < pyramid.num_scales; ++s) {
      const int64_t before = pyramid.first_token[s], token = b * tokens + before;
      T* rows = args.rows ? args.rows + token * dim : codes + planes.scratch_size();
      planes.pool(residual.data(), s, rows);
      const T slope = static_cast<T>(layout.slope[s]);
      const int round = layout.round[s];
      work.for_some(area(pyramid.extent[s]), [&](int64_t n, int64_t count) {
        const int64_t at = n * dim;
        const bool* flips = args.flips ? args.flips + token * dim + at : nullptr;
        work.quantize(rows + at, count, round, flips, codes + at);
        kernels.pack_tokens(args.pack, work.digits(), count,
                            args.pack.indices + b * groups * tokens + before + n, 1);
        if (!losses) return;
        const T* z = work.stand_in(rows + at, count, round);
        if (args.error) {
          *sums.error(b, s) += kernels.squared_error(codes + at, z, count * dim);
        }
        if (args.entropy) {
          chances.assign(tables.width(), T(0));
          *sums.entropy(b, s) +=
              kernels.sign_choices(z, count * dim, tables.width(), slope, chances.data());
          double* total = sums.chances(b, s);
          for (int j = 0; j < tables.width(); ++j) total[j % dim] += chances[j];
        }
      });
      const bool last = s + 1 == pyramid.num_scales;
      planes.add(codes, s, scratch, sum.data(), last ? nullptr : residual.data());
    }
    planes.store(sum.data(), b, args.quantized);
  });
  for (int s = 0; s < pyramid.num_scales; ++s) {
    const double share = 1.0 / static_cast<double>(pyramid.batch * area(pyramid.extent[s]));
    if (args.error) sums.store(s, 0, 1, share / dim, args.error + s);
    if (args.entropy) sums.store(s, 1, 1, share, args.entropy + s);
    if (args.entropy) sums.store(s, 2, dim, share, args.chance + int64_t{s} * dim);
  }
}

template <typename T>
void scalar_quantize_backward(const ScalarQuantizeBackwardArgs<T>& args, const Executor& executor) {
  const Pyramid& pyramid = args.pyramid;
  const ScalarLayout& layout = args.layout;
  const int dim = layout.dim;
  const Planes<T> planes(pyramid, dim, executor);
  const ChannelKernels<T>& kernels = channel_kernels<T>();
  const WideTables<T> tables = wide_tables(args.tables, layout);
  // Of a mean's gradient what comes to one token.
  const auto share = [&](int s) {
    return T(1) / static_cast<T>(pyramid.batch * area(pyramid.extent[s]));
  };
  std::vector<T> by_chance;  // [scales, width]
  if (args.grad_entropy) {
    by_chance = side_by_side(args.grad_chance, pyramid.num_scales, dim, tables.together());
    for (int s = 0; s < pyramid.num_scales; ++s) {
      T* line = by_chance.data() + int64_t{s} * tables.width();
      for (int j = 0; j < tables.width(); ++j) line[j] *= share(s);
    }
  }
  planes.each_map(2, [&](int64_t b, T* scratch) {
    thread_local std::vector<T> plane, grad_plane;
    grad_plane.assign(planes.plane_size(), T(0));
    if (args.grad_quantized) {
      plane.resize(planes.plane_size());
      planes.load(args.grad_quantized, b, plane.data());
    }
    T* grad = scratch + planes.scratch_size();
    Rows<T> work(layout, tables);
    for (int s = 0; s < pyramid.num_scales; ++s) {
      const int64_t first = (b * tokens_per_image(pyramid) + pyramid.first_token[s]) * dim;
      if (args.grad_quantized) {
        planes.add_transpose(plane.data(), s, scratch, grad);
      } else {
        std::fill_n(grad, planes.row_size(s), T(0));
      }
      const int round = layout.round[s];
      const T by_error = args.grad_error ? args.grad_error[s] * 2 * share(s) / dim : T(0);
      work.for_some(area(pyramid.extent[s]), [&](int64_t n, int64_t count) {
        const int64_t at = n * dim, size = count * dim;
        const T* rows = args.rows + first + at;
        const T* z = rows;
        if (args.grad_error || args.grad_entropy) z = work.stand_in(rows, count, round);
        if (args.grad_error) {
          const T* values =
              work.quantize(rows, count, round, args.flips ? args.flips + first + at : nullptr);
          for (int64_t i = 0; i < size; ++i) grad[at + i] += by_error * (z[i] - values[i]);
        }
        if (args.grad_entropy) {
          kernels.sign_choices_backward(z, size, tables.width(), static_cast<T>(layout.slope[s]),
                                        args.grad_entropy[s] * share(s),
                                        by_chance.data() + int64_t{s} * tables.width(), grad + at);
        }
        work.stand_in_backward(rows, count, round, grad + at);
        for (int64_t i = 0; args.grad_rows && i < size; ++i) {
          grad[at + i] += args.grad_rows[first + at + i];
        }
      });
      planes.pool_transpose_add(grad, s, grad_plane.data());
    }
    planes.store(grad_plane.data(), b, args.grad_h);
  });
}

template <typename T>
void scalar_rows(const ScalarRowsArgs<T>& args, const Executor& executor) {
  const int64_t dim = args.layout.dim, rounds = args.layout.rounds;
  const ChannelKernels<T>& kernels = channel_kernels<T>();
  for_rows(args.layout, args.tables, args.num_rows, executor,
           [&](int64_t first, int64_t count, Rows<T>& work) {
             const T* rows = args.rows + first * dim;
             T* sum = args.quantized + first * dim;
             thread_local std::vector<T> rest;
             for (int64_t r = 0; r < rounds; ++r) {
               const T* codes = work.quantize(r == 0 ? rows : rest.data(), count,
                                              static_cast<int>(r), nullptr, r == 0 ? sum : nullptr);
               if (args.pack.indices) {
                 kernels.pack_tokens(args.pack, work.digits(), count,
                                     args.pack.indices + first * rounds + r, rounds);
               }
               for (int64_t n = 0; args.codes && n < count; ++n) {
                 std::copy_n(codes + n * dim, dim, args.codes + ((first + n) * rounds + r) * dim);
               }
               if (r == 0 && rounds > 1) rest.assign(rows, rows + count * dim);
               for (int64_t i = 0; r > 0 && i < count * dim; ++i) sum[i] += codes[i];
               for (int64_t i = 0; r + 1 < rounds && i < count * dim; ++i) rest[i] -= codes[i];
             }
           });
}

template <typename T>
void scalar_rows_backward(const ScalarRowsBackwardArgs<T>& args, const Executor& executor) {
  const int64_t dim = args.layout.dim, rounds = args.layout.rounds;
  for_rows(args.layout, args.tables, args.num_rows, executor,
           [&](int64_t first, int64_t count, Rows<T>& work) {
             const int64_t size = count * dim;
             const T *rows = args.rows + first * dim, *grad = args.grad_quantized + first * dim;
             T* total = args.grad_rows + first * dim;
             std::copy_n(grad, size, total);
             work.stand_in_backward(rows, count, 0, total);
             if (rounds == 1) return;
             thread_local std::vector<T> rest, part;
             rest.assign(rows, rows + size);
             for (int r = 1; r < rounds; ++r) {
               const T* codes = work.quantize(rest.data(), count, r - 1, nullptr);
               for (int64_t i = 0; i < size; ++i) rest[i] -= codes[i];
               part.assign(grad, grad + size);
               work.stand_in_backward(rest.data(), count, r, part.data());
               for (int64_t i = 0; i < size; ++i) total[i] += part[i];
             }
           });
}

void pack_digits(const PackDigitsArgs& args, const Executor& executor) {
  const auto pack = channel_kernels<float>().pack_tokens;
  executor.for_ranges(args.batch * args.tokens, args.groups * args.dim,
                      [&](int64_t begin, int64_t end) {
                        for (int64_t n = begin, count; n < end; n += count) {  // image by image
                          const int64_t b = n / args.tokens, t = n % args.tokens;
                          count = std::min(args.tokens - t, end - n);
                          pack(args, args.digits + n * args.groups * args.dim, count,
                               args.indices + b * args.groups * args.tokens + t, 1);
                        }
                      });
}

#define TOKENFLOW_INSTANTIATE(T)                                                   \
  template void scalar_quantize<T>(const ScalarQuantizeArgs<T>&, const Executor&); \
  template void scalar_quantize_backward<T>(const ScalarQuantizeBackwardArgs<T>&,  \
                                            const Executor&);                      \
  template void scalar_rows<T>(const ScalarRowsArgs<T>&, const Executor&);         \
  template void scalar_rows_backward<T>(const ScalarRowsBackwardArgs<T>&, const Executor&);

TOKENFLOW_INSTANTIATE(float)
TOKENFLOW_INSTANTIATE(double)

#undef TOKENFLOW_INSTANTIATE

}  // namespace tokenflow::cpu
