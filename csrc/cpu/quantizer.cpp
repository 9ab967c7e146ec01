#include "quantizer.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "../common/normalize.h"
#include "instruction_set.h"
#include "kernels.h"

namespace tokenflow::cpu {
namespace {

// Rows whose block maxima are held at once: bounds the scratch of a search at this many times
// codes / kBlockCodes floats, whatever the number of rows.
constexpr int64_t kRowsAtOnce = 1536;

// Rows that share one pass over a block of codes; their tiles stay in the first-level cache.
constexpr int64_t kRowsPerTask = 192;

// Work items of fewer elements than this are not worth handing to another thread.
constexpr int64_t kGrain = 16384;

const KernelTable& kernels() {
  switch (detect_instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::kAvx512:
      return avx512_kernels();
    case InstructionSet::kAvx2:
      return avx2_kernels();
#endif
    default:
      return portable_kernels();
  }
}

template <typename T>
const PlaneKernels<T>& plane_kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return kernels().plane_float;
  } else {
    return kernels().plane_double;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// task(begin, end) over ranges of [0, count), each of at least kGrain / cost items.
template <typename Task>
void for_ranges(const Executor& executor, int64_t count, int64_t cost, const Task& task) {
  const int64_t smallest = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
  const int64_t range = std::max(smallest, ceil_div(count, 8 * std::max(1, executor.workers)));
  executor.for_each(ceil_div(count, range),
                    [&](int64_t i) { task(i * range, std::min(count, (i + 1) * range)); });
}

// ---------------------------------------------------------------------------------------------
// Search
// ---------------------------------------------------------------------------------------------

// Nearest codes of many rows in one codebook, packed once and searched as often as wanted.
template <typename T>
class Searcher;

template <>
class Searcher<float> {
 public:
  Searcher(const CodebookLayout& layout, const float* codebook, const Executor& executor)
      : layout_(layout), codebook_(codebook), executor_(executor), rank_(kernels().rank) {
    const int64_t panel_floats = static_cast<int64_t>(rank_.panel_width) * (layout.dim + 1);
    const int64_t panels = ceil_div(layout.codes, rank_.panel_width);
    panels_.reset(new float[panels * panel_floats]);
    std::vector<float> norm(panels), bias(panels);
    for_ranges(executor, panels, panel_floats, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        rank_.pack_panel(codebook, layout, p, panels_.get() + p * panel_floats, &norm[p], &bias[p]);
      }
    });
    codes_ = {panels_.get(), panels, *std::max_element(norm.begin(), norm.end()),
              *std::max_element(bias.begin(), bias.end())};
  }

  void search(const float* rows, int64_t num_rows, int64_t* indices) {
    for (int64_t first = 0; first < num_rows; first += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, num_rows - first);
      search_some(rows + first * layout_.dim, count, indices + first);
    }
  }

 private:
  void search_some(const float* rows, int64_t num_rows, int64_t* indices) {
    const int dim = layout_.dim;
    const int64_t tile_rows = rank_.tile_rows;
    const int64_t tiles = ceil_div(num_rows, tile_rows);
    const int64_t block_panels = kBlockCodes / rank_.panel_width;
    const int64_t blocks = ceil_div(codes_.num_panels, block_panels);
    tile_.resize(static_cast<size_t>(num_rows) * dim);
    norms_.resize(num_rows);
    block_max_.resize(static_cast<size_t>(num_rows) * blocks);
    const auto tile_count = [&](int64_t t) {
      return static_cast<int>(std::min(tile_rows, num_rows - t * tile_rows));
    };

    for_ranges(executor_, tiles, tile_rows * dim, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        rank_.pack_tile(rows + t * tile_rows * dim, tile_count(t), layout_,
                        tile_.data() + t * tile_rows * dim, norms_.data() + t * tile_rows);
      }
    });

    // Tasks are rows x ranges of codes: few rows are split along the codebook.
    const int64_t task_tiles = std::max<int64_t>(1, kRowsPerTask / tile_rows);
    const int64_t row_tasks = ceil_div(tiles, task_tiles);
    const int64_t wanted = std::max<int64_t>(1, ceil_div(8 * executor_.workers, row_tasks));
    const int64_t task_blocks = ceil_div(blocks, std::min(blocks, wanted));
    const int64_t code_tasks = ceil_div(blocks, task_blocks);
    executor_.for_each(row_tasks * code_tasks, [&](int64_t task) {
      const int64_t first_tile = task / code_tasks * task_tiles;
      const int64_t end_tile = std::min(tiles, first_tile + task_tiles);
      const int64_t first_block = task % code_tasks * task_blocks;
      const int64_t end_block = std::min(blocks, first_block + task_blocks);
      for (int64_t b = first_block; b < end_block; ++b) {
        const int64_t panel = b * block_panels;
        const int64_t panels = std::min(block_panels, codes_.num_panels - panel);
        for (int64_t t = first_tile; t < end_tile; ++t) {
          rank_.rank_tile(tile_.data() + t * tile_rows * dim, tile_count(t), dim,
                          codes_.panels + panel * (dim + 1) * rank_.panel_width, panels,
                          block_max_.data() + t * tile_rows * blocks + b, blocks);
        }
      }
    });

    const int64_t settle_cost = static_cast<int64_t>(kBlockCodes) * dim / 8;
    for_ranges(executor_, num_rows, settle_cost, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t t = n / tile_rows;
        indices[n] =
            rank_.settle_row(rows + n * dim, tile_.data() + t * tile_rows * dim, tile_count(t),
                             static_cast<int>(n % tile_rows), norms_[n],
                             block_max_.data() + n * blocks, blocks, codes_, codebook_, layout_);
      }
    });
  }

  const CodebookLayout& layout_;
  const float* codebook_;
  const Executor& executor_;
  const RankKernels& rank_;
  std::unique_ptr<float[]> panels_;
  PackedCodes codes_;
  std::vector<float> tile_, norms_, block_max_;
};

// float64: the definition itself, over rows and codes normalised once.
template <>
class Searcher<double> {
 public:
  Searcher(const CodebookLayout& layout, const double* codebook, const Executor& executor)
      : layout_(layout), executor_(executor), codes_(layout.codes * layout.dim) {
    for_ranges(executor, layout.codes, layout.dim, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        normalize_row(codebook + i * layout.dim, layout, codes_.data() + i * layout.dim);
      }
    });
  }

  void search(const double* rows, int64_t num_rows, int64_t* indices) {
    CodebookLayout unit = layout_;
    unit.l2_norm = false;
    for_ranges(executor_, num_rows, layout_.codes * layout_.dim, [&](int64_t begin, int64_t end) {
      std::vector<double> row(layout_.dim);
      for (int64_t n = begin; n < end; ++n) {
        normalize_row(rows + n * layout_.dim, layout_, row.data());
        double best = std::numeric_limits<double>::infinity();
        indices[n] = 0;
        for (int64_t i = 0; i < layout_.codes; ++i) {
          const double d = distance(row.data(), codes_.data() + i * layout_.dim, unit);
          if (d < best) {
            best = d;
            indices[n] = i;
          }
        }
      }
    });
  }

 private:
  const CodebookLayout& layout_;
  const Executor& executor_;
  std::vector<double> codes_;
};

// ---------------------------------------------------------------------------------------------
// Pyramid
// ---------------------------------------------------------------------------------------------

int64_t area(Extent e) { return static_cast<int64_t>(e.height) * e.width; }

// The residual loop of one call, whose images are walked in step: all of them through a scale
// before the next, because a scale's rows of every image are searched together.
template <typename T>
class Walk {
 public:
  Walk(const Pyramid& pyramid, const CodebookLayout& layout, const T* codebook,
       const Executor& executor)
      : pyramid_(pyramid),
        layout_(layout),
        codebook_(codebook),
        executor_(executor),
        plane_(plane_kernels<T>()),
        full_{pyramid.height, pyramid.width} {
    int64_t widest = 0;
    for (int s = 0; s < pyramid.num_scales; ++s) {
      const Extent e = pyramid.extent[s];
      widest = std::max({widest, area(e), static_cast<int64_t>(e.height) * full_.width});
    }
    scratch_size_ = widest * layout.dim;
  }

  int64_t plane_size() const { return area(full_) * layout_.dim; }

  // residual = h, in channels-last planes.
  void load(const T* h, std::vector<T>* planes) const {
    planes->resize(pyramid_.batch * plane_size());
    each_image([&](int64_t b, T*) {
      plane_.to_channels_last(h + b * plane_size(), layout_.dim, area(full_),
                              planes->data() + b * plane_size());
    });
  }

  void store(const std::vector<T>& planes, T* out) const {
    each_image([&](int64_t b, T*) {
      plane_.to_channels_first(planes.data() + b * plane_size(), layout_.dim, area(full_),
                               out + b * plane_size());
    });
  }

  // rows [batch, extent[s], dim] = the residual pooled to scale s, not normalised.
  void pool(const std::vector<T>& residual, int s, T* rows) const {
    each_image([&](int64_t b, T*) {
      plane_.pool(residual.data() + b * plane_size(), layout_.dim, full_, pyramid_.extent[s],
                  rows + b * row_floats(s));
    });
  }

  // sum += u, residual -= u for the upsampled codes of scale s; either may be null.
  // indices [batch, tokens]; visit(b, rows) sees an image's codes [extent[s], dim] on the way.
  template <typename Visit>
  void add_codes(const int64_t* indices, int s, T* sum, T* residual, const Visit& visit) const {
    each_image([&](int64_t b, T* scratch) {
      const Extent extent = pyramid_.extent[s];
      T* rows = scratch + scratch_size_;
      const int64_t* index = indices + b * tokens_per_image(pyramid_) + pyramid_.first_token[s];
      for (int64_t n = 0; n < area(extent); ++n) gather(index[n], rows + n * layout_.dim);
      visit(b, rows);
      plane_.upsample(rows, layout_.dim, extent, full_, scratch,
                      sum ? sum + b * plane_size() : nullptr,
                      residual ? residual + b * plane_size() : nullptr);
    });
  }

  // A normalised codebook row, or zeros for a dropped token.
  void gather(int64_t index, T* row) const {
    if (index < 0) {
      std::fill_n(row, layout_.dim, T(0));
    } else {
      normalize_row(codebook_ + index * layout_.dim, layout_, row);
    }
  }

  // task(b, scratch) for every image; scratch holds two areas of scratch_size().
  template <typename Task>
  void each_image(const Task& task) const {
    executor_.for_each(pyramid_.batch, [&](int64_t b) {
      thread_local std::vector<T> scratch;
      scratch.resize(2 * scratch_size_);
      task(b, scratch.data());
    });
  }

  int64_t scratch_size() const { return scratch_size_; }
  int64_t row_floats(int s) const { return area(pyramid_.extent[s]) * layout_.dim; }
  const PlaneKernels<T>& plane() const { return plane_; }

 private:
  const Pyramid& pyramid_;
  const CodebookLayout& layout_;
  const T* codebook_;
  const Executor& executor_;
  const PlaneKernels<T>& plane_;
  const Extent full_;
  int64_t scratch_size_ = 0;
};

bool is_dropped(const int64_t* indices, const Pyramid& pyramid, int s) {
  return indices[pyramid.first_token[s]] < 0;
}

struct NoVisit {
  template <typename T>
  void operator()(int64_t, const T*) const {}
};

}  // namespace

template <typename T>
int64_t first_nonfinite_code(const CodebookLayout& layout, const T* codebook,
                             const Executor& executor) {
  std::atomic<int64_t> first{layout.codes};
  for_ranges(executor, layout.codes, layout.dim, [&](int64_t begin, int64_t end) {
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
  return first == layout.codes ? -1 : first.load();
}

template <typename T>
void nearest_code(const NearestCodeArgs<T>& args, const Executor& executor) {
  Searcher<T>(args.layout, args.codebook, executor).search(args.rows, args.num_rows, args.indices);
}

template <typename T>
void quantize(const QuantizeArgs<T>& args, const Executor& executor) {
  const Pyramid& pyramid = args.pyramid;
  const int dim = args.layout.dim;
  const int64_t tokens = tokens_per_image(pyramid);
  Walk<T> walk(pyramid, args.layout, args.codebook, executor);
  Searcher<T> searcher(args.layout, args.codebook, executor);
  std::vector<T> residual, sum(pyramid.batch * walk.plane_size()), rows;
  std::vector<int64_t> found;
  std::vector<double> error(pyramid.batch);
  walk.load(args.h, &residual);

  for (int s = 0; s < pyramid.num_scales; ++s) {
    const int64_t count = area(pyramid.extent[s]);
    if (args.dropped && *args.dropped == s) {
      for (int64_t b = 0; b < pyramid.batch; ++b) {
        std::fill_n(args.indices + b * tokens + pyramid.first_token[s], count, int64_t{-1});
      }
      args.squared_error[s] = 0;
      continue;
    }
    rows.resize(pyramid.batch * walk.row_floats(s));
    found.resize(pyramid.batch * count);
    walk.pool(residual, s, rows.data());
    searcher.search(rows.data(), pyramid.batch * count, found.data());
    for (int64_t b = 0; b < pyramid.batch; ++b) {
      std::copy_n(found.data() + b * count, count,
                  args.indices + b * tokens + pyramid.first_token[s]);
    }
    walk.add_codes(args.indices, s, sum.data(), residual.data(), [&](int64_t b, const T* codes) {
      double total = 0;
      for (int64_t n = 0; n < count; ++n) {
        T* row = rows.data() + (b * count + n) * dim;
        normalize_row(row, args.layout, row);
        for (int d = 0; d < dim; ++d) {
          const double difference = static_cast<double>(codes[n * dim + d]) - row[d];
          total += difference * difference;
        }
      }
      error[b] = total;
    });
    double total = 0;
    for (double e : error) total += e;
    args.squared_error[s] = static_cast<T>(total / (pyramid.batch * count * dim));
  }

  walk.store(sum, args.quantized);
  std::fill_n(args.hits, args.layout.codes, int64_t{0});
  for (int64_t n = 0; n < pyramid.batch * tokens; ++n) {
    if (args.indices[n] >= 0) ++args.hits[args.indices[n]];
  }
}

template <typename T>
void quantize_backward(const QuantizeBackwardArgs<T>& args, const Executor& executor) {
  const Pyramid& pyramid = args.pyramid;
  const CodebookLayout& layout = args.layout;
  const int dim = layout.dim;
  const int64_t tokens = tokens_per_image(pyramid);
  Walk<T> walk(pyramid, layout, args.codebook, executor);
  const int64_t plane = walk.plane_size();
  std::vector<T> residual, grad_quantized, grad_h, rows;
  std::vector<T> code_rows;  // gradient of each token's (normalised) codebook row
  const bool want_codes = args.grad_codebook && args.grad_code_error;
  walk.load(args.h, &residual);
  if (args.grad_quantized) walk.load(args.grad_quantized, &grad_quantized);
  if (args.grad_h) grad_h.resize(pyramid.batch * plane);
  if (want_codes) code_rows.resize(pyramid.batch * tokens * dim);

  for (int s = 0; s < pyramid.num_scales; ++s) {
    if (is_dropped(args.indices, pyramid, s)) continue;
    const Extent extent = pyramid.extent[s], full = {pyramid.height, pyramid.width};
    const int64_t count = area(extent);
    const T share = T(2) / static_cast<T>(pyramid.batch * count * dim);
    const T row_share = args.grad_row_error ? share * args.grad_row_error[s] : T(0);
    const T code_share = args.grad_code_error ? share * args.grad_code_error[s] : T(0);
    rows.resize(pyramid.batch * walk.row_floats(s));
    walk.pool(residual, s, rows.data());
    walk.add_codes(
        args.indices, s, static_cast<T*>(nullptr), residual.data(), [&](int64_t b, const T* codes) {
          thread_local std::vector<T> buffer;
          buffer.resize(walk.scratch_size() + walk.row_floats(s) + dim);
          T* scratch = buffer.data();
          T* grad_rows = scratch + walk.scratch_size();
          T* unit = grad_rows + walk.row_floats(s);
          if (args.grad_h && args.grad_quantized) {
            walk.plane().upsample_transpose(grad_quantized.data() + b * plane, dim, extent, full,
                                            scratch, grad_rows);
          } else {
            std::fill_n(grad_rows, walk.row_floats(s), T(0));
          }
          for (int64_t n = 0; n < count; ++n) {
            const T* row = rows.data() + (b * count + n) * dim;
            normalize_row(row, layout, unit);
            T* grad = grad_rows + n * dim;
            T* code_grad = want_codes
                               ? code_rows.data() + (b * tokens + pyramid.first_token[s] + n) * dim
                               : nullptr;
            for (int d = 0; d < dim; ++d) {
              const T difference = unit[d] - codes[n * dim + d];
              grad[d] += row_share * difference;
              if (code_grad) code_grad[d] = -code_share * difference;
            }
            normalize_row_backward(row, grad, layout, grad);
          }
          if (args.grad_h) {
            walk.plane().pool_transpose_add(grad_rows, dim, full, extent,
                                            grad_h.data() + b * plane);
          }
        });
  }
  if (args.grad_h) walk.store(grad_h, args.grad_h);
  if (args.grad_codebook && !want_codes) {
    std::fill_n(args.grad_codebook, layout.codes * dim, T(0));
  }
  if (want_codes) {
    std::vector<int64_t> counts(layout.codes);
    segment_sum<T>({layout.codes, dim, pyramid.batch * tokens, code_rows.data(), args.indices,
                    args.grad_codebook, counts.data()},
                   executor);
    for_ranges(executor, layout.codes, dim, [&](int64_t begin, int64_t end) {
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
  Walk<T> walk(pyramid, args.layout, args.codebook, executor);
  std::vector<T> residual, rows;
  walk.load(args.h, &residual);
  for (int s = 0; s < pyramid.num_scales; ++s) {
    const int64_t count = area(pyramid.extent[s]);
    rows.resize(pyramid.batch * walk.row_floats(s));
    walk.pool(residual, s, rows.data());
    walk.add_codes(
        args.indices, s, static_cast<T*>(nullptr), residual.data(), [&](int64_t b, const T*) {
          T* out = args.rows + (b * tokens_per_image(pyramid) + pyramid.first_token[s]) * dim;
          for (int64_t n = 0; n < count; ++n) {
            normalize_row(rows.data() + (b * count + n) * dim, args.layout, out + n * dim);
          }
        });
  }
}

template <typename T>
void decode(const DecodeArgs<T>& args, const Executor& executor) {
  Walk<T> walk(args.pyramid, args.layout, args.codebook, executor);
  std::vector<T> sum(args.pyramid.batch * walk.plane_size());
  for (int s = 0; s < args.pyramid.num_scales; ++s) {
    walk.add_codes(args.indices, s, sum.data(), static_cast<T*>(nullptr), NoVisit{});
  }
  walk.store(sum, args.quantized);
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
  for_ranges(executor, args.codes, args.dim, [&](int64_t first, int64_t last) {
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

#define TF_INSTANTIATE(T)                                                                     \
  template int64_t first_nonfinite_code<T>(const CodebookLayout&, const T*, const Executor&); \
  template void nearest_code<T>(const NearestCodeArgs<T>&, const Executor&);                  \
  template void quantize<T>(const QuantizeArgs<T>&, const Executor&);                         \
  template void quantize_backward<T>(const QuantizeBackwardArgs<T>&, const Executor&);        \
  template void pyramid_rows<T>(const PyramidRowsArgs<T>&, const Executor&);                  \
  template void decode<T>(const DecodeArgs<T>&, const Executor&);                             \
  template void segment_sum<T>(const SegmentSumArgs<T>&, const Executor&);

TF_INSTANTIATE(float)
TF_INSTANTIATE(double)

#undef TF_INSTANTIATE

}  // namespace tokenflow::cpu
