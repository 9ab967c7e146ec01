#include "quantizer.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "../common/normalize.h"
#include "planes.h"
#include "search.h"

namespace tokenflow::cpu {
namespace {

// A searcher for each codebook, packed once.
template <typename T>
class Searchers {
 public:
  // For about so many rows of each.
  Searchers(const CodebookLayout& layout, const T* codebook, const Executor& executor,
            int64_t rows) {
    for (int64_t book = 0; book < layout.books; ++book) {
      searchers_.push_back(std::make_unique<Searcher<T>>(
          layout, codebook + book * layout.codes * layout.dim, executor, rows));
    }
  }

  Searcher<T>& operator[](int64_t book) { return *searchers_[book]; }

 private:
  std::vector<std::unique_ptr<Searcher<T>>> searchers_;
};

// The residual pyramid of one call, whose maps take turns in the codebooks.
template <typename T>
class ResidualPass : public Planes<T> {
 public:
  ResidualPass(const Pyramid& pyramid, const CodebookLayout& layout, const T* codebook,
               const Executor& executor)
      : Planes<T>(pyramid, layout.dim, executor),
        pyramid_(pyramid),
        layout_(layout),
        codebook_(codebook) {}

  // The codebook of map b, and the map's number among those of its codebook.
  int64_t book(int64_t b) const { return b % layout_.books; }
  int64_t within_book(int64_t b) const { return b / layout_.books; }
  int64_t maps_per_book() const { return pyramid_.batch / layout_.books; }

  // rows [extent[s], dim] = normalised codebook rows of a map's tokens, zeros for a dropped one.
  // indices [batch, tokens].
  void gather(const int64_t* indices, int64_t b, int s, T* rows) const {
    const int64_t* index = indices + b * tokens_per_image(pyramid_) + pyramid_.first_token[s];
    const T* codes = codebook_ + book(b) * layout_.codes * layout_.dim;
    for (int64_t n = 0; n < area(pyramid_.extent[s]); ++n, rows += layout_.dim) {
      if (index[n] < 0) {
        std::fill_n(rows, layout_.dim, T(0));
      } else {
        normalize_row(codes + index[n] * layout_.dim, layout_, rows);
      }
    }
  }

 private:
  const Pyramid& pyramid_;
  const CodebookLayout& layout_;
  const T* codebook_;
};

}  // namespace

template <typename T>
int64_t first_nonfinite_code(const CodebookLayout& layout, const T* codebook,
                             const Executor& executor) {
  const int64_t codes = all_codes(layout);
  std::atomic<int64_t> first{codes};
  executor.for_ranges(codes, layout.dim, [&](int64_t begin, int64_t end) {
    const int64_t numbers = (end - begin) * layout.dim;
    if (channel_kernels<T>().all_finite(codebook + begin * layout.dim, numbers)) return;
    for (int64_t i = begin; i < end; ++i) {
      // x * 0 is NaN for a NaN or an infinity and 0 otherwise; one test a row.
      T sum = 0;
      for (int d = 0; d < layout.dim; ++d) sum += codebook[i * layout.dim + d] * T(0);
      if (sum == T(0)) continue;
      int64_t seen = first.load();
      while (i < seen && !first.compare_exchange_weak(seen, i)) {
      }
      return;
    }
  });
  return first == codes ? -1 : first.load();
}

template <typename T>
void nearest_code(const NearestCodeArgs<T>& args, const Executor& executor) {
  Searchers<T> searchers(args.layout, args.codebook, executor, args.num_rows);
  for (int64_t book = 0; book < args.layout.books; ++book) {
    searchers[book].search(args.rows + book * args.num_rows * args.layout.dim, args.num_rows,
                           args.indices + book * args.num_rows);
  }
}

// The maps go through a scale together, because its rows are searched together, those of a codebook
// at a time: a scale is one parallel search a codebook and one parallel step of the pyramid.
template <typename T>
void quantize(const QuantizeArgs<T>& args, const Executor& executor) {
  const Pyramid& pyramid = args.pyramid;
  const int dim = args.layout.dim;
  const int64_t tokens = tokens_per_image(pyramid);
  const ResidualPass<T> pass(pyramid, args.layout, args.codebook, executor);
  const int64_t plane = pass.plane_size();
  const int64_t books = args.layout.books, maps = pass.maps_per_book();
  Searchers<T> searchers(args.layout, args.codebook, executor, maps * tokens);
  std::vector<T> residual(pyramid.batch * plane), sum(pyramid.batch * plane), rows, next_rows;
  std::vector<int64_t> found;
  std::vector<double> error(pyramid.batch);

  // A scale's rows lie book after book.
  const auto place = [&](int64_t b) { return pass.book(b) * maps + pass.within_book(b); };
  const auto size_rows = [&](int s) { next_rows.resize(pyramid.batch * pass.row_size(s)); };
  const auto pool = [&](int64_t b, int s) {
    pass.pool(residual.data() + b * plane, s, next_rows.data() + place(b) * pass.row_size(s));
  };
  if (pyramid.num_scales > 0) size_rows(0);
  pass.each_map(0, [&](int64_t b, T*) {
    pass.load(args.h, b, residual.data() + b * plane);
    if (pyramid.num_scales > 0) pool(b, 0);
  });
  for (int s = 0; s < pyramid.num_scales; ++s) {
    const int64_t count = area(pyramid.extent[s]), first = pyramid.first_token[s];
    const bool is_dropped = args.dropped && *args.dropped == s;
    const bool is_last = s + 1 == pyramid.num_scales;
    rows.swap(next_rows);
    if (!is_last) size_rows(s + 1);
    if (!is_dropped) {
      found.resize(pyramid.batch * count);
      for (int64_t book = 0; book < books; ++book) {
        searchers[book].search(rows.data() + book * maps * pass.row_size(s), maps * count,
                               found.data() + book * maps * count);
      }
    }
    pass.each_map(2, [&](int64_t b, T* scratch) {
      int64_t* indices = args.indices + b * tokens + first;
      error[b] = 0;
      if (is_dropped) {
        std::fill_n(indices, count, int64_t{-1});
      } else {
        std::copy_n(found.data() + place(b) * count, count, indices);
        T* codes = scratch + pass.scratch_size();
        pass.gather(args.indices, b, s, codes);
        T* row = rows.data() + place(b) * pass.row_size(s);
        for (int64_t n = 0; n < count; ++n, row += dim) {
          normalize_row(row, args.layout, row);
          for (int d = 0; d < dim; ++d) {
            const double difference = static_cast<double>(codes[n * dim + d]) - row[d];
            error[b] += difference * difference;
          }
        }
        pass.add(codes, s, scratch, sum.data() + b * plane, residual.data() + b * plane);
      }
      if (!is_last) pool(b, s + 1);
    });
    for (int64_t book = 0; book < books; ++book) {
      double total = 0;
      for (int64_t b = book; b < pyramid.batch; b += books) total += error[b];
      args.squared_error[book * pyramid.num_scales + s] =
          is_dropped ? T(0) : static_cast<T>(total / (maps * count * dim));
    }
  }
  pass.each_map(0, [&](int64_t b, T*) { pass.store(sum.data() + b * plane, b, args.quantized); });
  std::fill_n(args.hits, all_codes(args.layout), int64_t{0});
  for (int64_t n = 0; n < pyramid.batch * tokens; ++n) {
    if (args.indices[n] < 0) continue;
    ++args.hits[pass.book(n / tokens) * args.layout.codes + args.indices[n]];
  }
}

template <typename T>
void quantize_backward(const QuantizeBackwardArgs<T>& args, const Executor& executor) {
  const Pyramid& pyramid = args.pyramid;
  const CodebookLayout& layout = args.layout;
  const int dim = layout.dim;
  const int64_t tokens = tokens_per_image(pyramid);
  const ResidualPass<T> pass(pyramid, layout, args.codebook, executor);
  const int64_t plane = pass.plane_size();
  const bool want_codes = args.grad_codebook && args.grad_code_error;
  const bool want_h = args.grad_h != nullptr;
  std::vector<T> code_rows;  // gradient of each token's (normalised) codebook row
  if (want_codes) code_rows.resize(pyramid.batch * tokens * dim);

  if (want_h || want_codes) {
    pass.each_map(4, [&](int64_t b, T* scratch) {
      thread_local std::vector<T> planes, unit;
      planes.resize(3 * plane);
      unit.resize(dim);
      T* residual = planes.data();
      T* grad_quantized = residual + plane;
      T* grad_h = grad_quantized + plane;
      T* codes = scratch + pass.scratch_size();
      T* rows = codes + pass.scratch_size();
      T* grad_rows = rows + pass.scratch_size();
      pass.load(args.h, b, residual);
      if (args.grad_quantized) pass.load(args.grad_quantized, b, grad_quantized);
      std::fill_n(grad_h, plane, T(0));
      for (int s = 0; s < pyramid.num_scales; ++s) {
        if (args.indices[pyramid.first_token[s]] < 0) continue;  // dropped
        const int64_t count = area(pyramid.extent[s]);
        const T share = T(2) / static_cast<T>(pass.maps_per_book() * count * dim);
        const int64_t mean = pass.book(b) * pyramid.num_scales + s;
        const T row_share = args.grad_row_error ? share * args.grad_row_error[mean] : T(0);
        const T code_share = args.grad_code_error ? share * args.grad_code_error[mean] : T(0);
        pass.pool(residual, s, rows);
        pass.gather(args.indices, b, s, codes);
        pass.add(codes, s, scratch, static_cast<T*>(nullptr), residual);
        if (want_h && args.grad_quantized) {
          pass.add_transpose(grad_quantized, s, scratch, grad_rows);
        } else {
          std::fill_n(grad_rows, pass.row_size(s), T(0));
        }
        T* code_grad =
            want_codes ? code_rows.data() + (b * tokens + pyramid.first_token[s]) * dim : nullptr;
        for (int64_t n = 0; n < count; ++n) {
          const T* row = rows + n * dim;
          T* grad = grad_rows + n * dim;
          normalize_row(row, layout, unit.data());
          for (int d = 0; d < dim; ++d) {
            const T difference = unit[d] - codes[n * dim + d];
            grad[d] += row_share * difference;
            if (code_grad) code_grad[n * dim + d] = -code_share * difference;
          }
          if (want_h) normalize_row_backward(row, grad, layout, grad);
        }
        if (want_h) pass.pool_transpose_add(grad_rows, s, grad_h);
      }
      if (want_h) pass.store(grad_h, b, args.grad_h);
    });
  }
  if (args.grad_codebook && !want_codes) {
    std::fill_n(args.grad_codebook, all_codes(layout) * dim, T(0));
  }
  if (want_codes) {
    const int64_t codes = all_codes(layout);
    std::vector<int64_t> counts(codes), numbers;  // of codes among those of all codebooks
    if (layout.books > 1) {
      numbers.assign(args.indices, args.indices + pyramid.batch * tokens);
      for (int64_t n = 0; n < pyramid.batch * tokens; ++n) {
        if (numbers[n] >= 0) numbers[n] += pass.book(n / tokens) * layout.codes;
      }
    }
    segment_sum<T>(
        {codes, dim, pyramid.batch * tokens, code_rows.data(),
         layout.books > 1 ? numbers.data() : args.indices, args.grad_codebook, counts.data()},
        executor);
    executor.for_ranges(codes, dim, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (counts[i] == 0) continue;
        T* grad = args.grad_codebook + i * dim;
        normalize_row_backward(args.codebook + i * dim, grad, layout, grad);
      }
    });
  }
}

template <typename T>
void pyramid_rows(const PyramidRowsArgs<T>& args, const Executor& executor) {
  const Pyramid& pyramid = args.pyramid;
  const int dim = args.layout.dim;
  const ResidualPass<T> pass(pyramid, args.layout, args.codebook, executor);
  pass.each_map(3, [&](int64_t b, T* scratch) {
    thread_local std::vector<T> residual;
    residual.resize(pass.plane_size());
    T* codes = scratch + pass.scratch_size();
    T* rows = codes + pass.scratch_size();
    pass.load(args.h, b, residual.data());
    for (int s = 0; s < pyramid.num_scales; ++s) {
      pass.pool(residual.data(), s, rows);
      T* out = args.rows + (b * tokens_per_image(pyramid) + pyramid.first_token[s]) * dim;
      for (int64_t n = 0; n < area(pyramid.extent[s]); ++n) {
        normalize_row(rows + n * dim, args.layout, out + n * dim);
      }
      pass.gather(args.indices, b, s, codes);
      pass.add(codes, s, scratch, static_cast<T*>(nullptr), residual.data());
    }
  });
}

template <typename T>
void decode(const DecodeArgs<T>& args, const Executor& executor) {
  const ResidualPass<T> pass(args.pyramid, args.layout, args.codebook, executor);
  pass.each_map(2, [&](int64_t b, T* scratch) {
    thread_local std::vector<T> sum;
    sum.assign(pass.plane_size(), T(0));
    T* codes = scratch + pass.scratch_size();
    for (int s = 0; s < args.pyramid.num_scales; ++s) {
      pass.gather(args.indices, b, s, codes);
      pass.add(codes, s, scratch, sum.data(), static_cast<T*>(nullptr));
    }
    pass.store(sum.data(), b, args.quantized);
  });
}

template <typename T>
void segment_sum(const SegmentSumArgs<T>& args, const Executor& executor) {
  // Stable counting sort of the rows by index, then one pass of each code over its own rows.
  std::vector<int64_t> end(args.codes + 1), order(args.num_rows);
  for (int64_t n = 0; n < args.num_rows; ++n) {
    if (args.indices[n] >= 0) ++end[args.indices[n] + 1];
  }
  for (int64_t i = 0; i < args.codes; ++i) {
    args.counts[i] = end[i + 1];
    end[i + 1] += end[i];
  }
  for (int64_t n = 0; n < args.num_rows; ++n) {
    if (args.indices[n] >= 0) order[end[args.indices[n]]++] = n;  // end[i] moves up to end[i + 1]
  }
  executor.for_ranges(args.codes, args.dim, [&](int64_t first, int64_t last) {
    std::vector<double> sum(args.dim);
    for (int64_t i = first; i < last; ++i) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t k = end[i] - args.counts[i]; k < end[i]; ++k) {
        const T* row = args.rows + order[k] * args.dim;
        for (int64_t d = 0; d < args.dim; ++d) sum[d] += static_cast<double>(row[d]);
      }
      for (int64_t d = 0; d < args.dim; ++d) args.sums[i * args.dim + d] = static_cast<T>(sum[d]);
    }
  });
}

#define TOKENFLOW_INSTANTIATE(T)                                                              \
  template int64_t first_nonfinite_code<T>(const CodebookLayout&, const T*, const Executor&); \
  template void nearest_code<T>(const NearestCodeArgs<T>&, const Executor&);                  \
  template void quantize<T>(const QuantizeArgs<T>&, const Executor&);                         \
  template void quantize_backward<T>(const QuantizeBackwardArgs<T>&, const Executor&);        \
  template void pyramid_rows<T>(const PyramidRowsArgs<T>&, const Executor&);                  \
  template void decode<T>(const DecodeArgs<T>&, const Executor&);                             \
  template void segment_sum<T>(const SegmentSumArgs<T>&, const Executor&);

TOKENFLOW_INSTANTIATE(float)
TOKENFLOW_INSTANTIATE(double)

#undef TOKENFLOW_INSTANTIATE

}  // namespace tokenflow::cpu
