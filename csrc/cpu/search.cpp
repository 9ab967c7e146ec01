#include "search.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <utility>

#include "../common/normalize.h"
#include "instruction_set.h"

namespace tokenflow::cpu {
namespace {

// Rows that share a pass over the codebook: at least, so that reading it costs little beside the
// work, and at most, so that their tiles stay in the L1 and threads share evenly.
constexpr int64_t kFewestRows = 48;
constexpr int64_t kMostRows = 192;

// Channels up to which sums of 8-bit products, and a bias beside them, stay within 32 bits.
constexpr int kMostInt8Channels = 32768;

// Normalised codes have a bias of float64's rounding, but for those without a length. So small a
// one is not worth counting.
constexpr double kLeastBias = 0x1p-40;

// Beside no more rows than this, packing the codes is a good part of a search.
constexpr int64_t kFewRows = 1024;

// Scores coarser than float32 are tried on this many rows before what they leave to look at again
// is judged.
constexpr int64_t kTrialRows = 64;

// Codes in a block. A block that may hold the nearest code is scanned row by row, at a third of the
// speed of scoring: beside few codes that is much, beside many it is the maxima of small blocks.
int block_codes(int64_t codes) { return codes < 4096 ? 64 : codes < 16384 ? 128 : kMostBlockCodes; }

// The fastest coarse scores of this machine.
const CoarseScoreKernels& fastest_coarse_score(int dim) {
#if defined(__x86_64__)
  const InstructionSet set = detect_instruction_set();
  if (set == InstructionSet::kAmx && bf16_coarse_score_amx()) return *bf16_coarse_score_amx();
  if (dim <= kMostInt8Channels) {
    if (set >= InstructionSet::kAvx512Vnni) return int8_coarse_score_avx512vnni();
    if (set == InstructionSet::kAvx2) return int8_coarse_score_avx2();
  }
#elif defined(__aarch64__)
  if (detect_instruction_set() == InstructionSet::kDotprod && dim <= kMostInt8Channels) {
    return int8_coarse_score_dotprod();
  }
#endif
  return kernels().coarse_score;
}

// Threads raise a maximum together.
void raise(std::atomic<double>& to, double value) {
  double seen = to.load();
  while (seen < value && !to.compare_exchange_weak(seen, value)) {
  }
}

// Where more codes than this come near to a row they are a crowd. Comparing as many takes about as
// long as scoring the codebook.
int64_t crowd(int64_t codes) { return 64 + codes / 256; }

void prefetch(const float* values, int count) {
  constexpr int kLine = 64 / sizeof(float);
  for (int i = 0; i < count; i += kLine) __builtin_prefetch(values + i);
}

// A row's index while it is not known: it has too many candidates, or is zero and all are.
constexpr int64_t kCrowded = -1, kZeroRow = -2, kUndecided = -3;

// Codes whose lengths are within a factor of 8 are a class, and so many of one are compared without
// a search.
constexpr int kClassOctaves = 3;
constexpr size_t kFewCodes = 16;

bool is_zero(const float* row, int dim) {
  return std::all_of(row, row + dim, [](float value) { return value == 0; });
}

// Ascending numbers of the codes that equal none before them: the others are never the nearest.
std::vector<int64_t> different_codes(const float* codebook, int64_t codes, int dim) {
  std::vector<int64_t> table(size_t{2} << (64 - __builtin_clzll(codes)), -1), numbers;
  for (int64_t i = 0; i < codes; ++i) {
    const float* code = codebook + i * dim;
    uint64_t hash = 0;
    for (int d = 0; d < dim; ++d) {
      const float value = code[d] + 0.0f;  // -0 is 0
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
    for (size_t at = hash & (table.size() - 1);; at = (at + 1) & (table.size() - 1)) {
      if (table[at] < 0) {
        table[at] = i;
        numbers.push_back(i);
        break;
      }
      if (std::equal(code, code + dim, codebook + table[at] * dim)) break;
    }
  }
  return numbers;
}

// visit(d, value) for each channel of a code, normalised and times the square root of the weight.
template <typename Visit>
void each_weighted(const CodebookLayout& layout, const float* code, const Visit& visit) {
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = layout.begin[g], end = layout.begin[g + 1];
    const double scale =
        std::sqrt(layout.weight[g]) * inverse_norm(squared_norm(code, begin, end), layout.l2_norm);
    for (int d = begin; d < end; ++d) visit(d, static_cast<double>(code[d]) * scale);
  }
}

// The mean of up to kMeanCodes codes, normalised and times the square roots of the weights.
std::vector<double> mean_of_some(const CodebookLayout& layout, const float* codebook) {
  constexpr int64_t kMeanCodes = 1024;
  const int64_t count = std::min(layout.codes, kMeanCodes);
  std::vector<double> mean(layout.dim);
  for (int64_t i = 0; i < count; ++i) {
    each_weighted(layout, codebook + i * layout.codes / count * layout.dim,
                  [&](int d, double value) { mean[d] += value / count; });
  }
  return mean;
}

}  // namespace

const KernelTable& kernels() {
#if defined(__x86_64__)
  switch (detect_instruction_set()) {
    case InstructionSet::kAmx:
    case InstructionSet::kAvx512Vnni:
    case InstructionSet::kAvx512:
      return avx512_kernels();
    case InstructionSet::kAvx2:
      return avx2_kernels();
    default:
      break;
  }
#endif
  return portable_kernels();
}

// ---------------------------------------------------------------------------------------------
// float32
// ---------------------------------------------------------------------------------------------

// Packed rows.
struct Searcher<float>::Tiles {
  const float* rows;
  int64_t num_rows;
  std::byte* tiles;
  RowScale* scales;
  size_t row_bytes;
  int tile_rows;

  int64_t num_tiles() const { return ceil_div(num_rows, tile_rows); }
  int64_t first_row(int64_t t) const { return t * tile_rows; }
  int count(int64_t t) const {
    return static_cast<int>(std::min<int64_t>(tile_rows, num_rows - first_row(t)));
  }
  std::byte* tile(int64_t t) const { return tiles + first_row(t) * row_bytes; }
};

// A thread's own memory, kept from call to call.
struct Searcher<float>::Scratch {
  AlignedBytes tiles = allocate(0);
  size_t tile_bytes = 0;
  std::vector<RowScale> scales;
  std::vector<float> block_max;

  // Of rows that are refined: the codes that may be the nearest, and the maxima that count.
  std::vector<std::vector<int64_t>> candidates;
  std::vector<float> thresholds;
  // The rows that a block has to be scanned for, as lists.
  struct Visit {
    int64_t row, next;
  };
  std::vector<Visit> visits;
  std::vector<int64_t> first_visit;
  std::vector<int> near;

  void start(int64_t num_rows, int blocks) {
    const size_t rows = num_rows;
    if (candidates.size() < rows) candidates.resize(rows);
    for (size_t n = 0; n < rows; ++n) candidates[n].clear();
    if (thresholds.size() < rows) thresholds.resize(rows);
    near.resize(blocks);
    visits.clear();
    first_visit.assign(blocks, -1);
  }

  void visit(int block, int64_t row) {
    visits.push_back({row, first_visit[block]});
    first_visit[block] = static_cast<int64_t>(visits.size()) - 1;
  }

  Tiles pack(const Searcher& searcher, const float* rows, int64_t num_rows) {
    const CoarseScoreKernels& coarse = *searcher.packed_->coarse;
    const CodebookLayout& layout = searcher.layout_;
    const size_t row_bytes = coarse.row_bytes(layout.dim);
    const int64_t padded = ceil_div(num_rows, coarse.tile_rows) * coarse.tile_rows;
    if (tile_bytes < padded * row_bytes) {
      tile_bytes = padded * row_bytes;
      tiles = allocate(tile_bytes);
    }
    if (scales.size() < static_cast<size_t>(num_rows)) scales.resize(num_rows);
    const Tiles packed = {rows, num_rows, tiles.get(), scales.data(), row_bytes, coarse.tile_rows};
    for (int64_t t = 0; t < packed.num_tiles(); ++t) {
      coarse.pack_tile(rows + packed.first_row(t) * layout.dim, packed.count(t), layout,
                       searcher.packed_->bounds, packed.tile(t),
                       scales.data() + packed.first_row(t));
    }
    return packed;
  }
};

Searcher<float>::Scratch& Searcher<float>::scratch() {
  thread_local Scratch scratch;
  return scratch;
}

struct Searcher<float>::Class {
  std::vector<int64_t> numbers;  // of its codes in the codebook, ascending
  CodebookLayout layout;
  std::vector<float> codes;
  std::unique_ptr<Searcher> searcher;
};

Searcher<float>::Searcher(const CodebookLayout& layout, const float* codebook,
                          const Executor& executor, int64_t rows)
    : Searcher(layout, codebook, executor, Level::kPlain, rows) {}

Searcher<float>::Searcher(const CodebookLayout& layout, const float* codebook,
                          const Executor& executor, Level level, int64_t rows)
    : layout_(layout),
      codebook_(codebook),
      executor_(executor),
      block_codes_(block_codes(layout.codes)),
      level_(level),
      centre_(level == Level::kPlain ? std::vector<double>() : mean_of_some(layout, codebook)),
      is_kept_(level == Level::kPlain && rows <= kFewRows),
      packed_(packed_for(level == Level::kLast ? kernels().coarse_score
                                               : fastest_coarse_score(layout.dim))) {}

std::shared_ptr<const PackedCodebook> Searcher<float>::packed_for(
    const CoarseScoreKernels& coarse) const {
  if (!is_kept_) return pack(coarse);
  return PackedCodebooks::instance().get(layout_, codebook_, coarse, [&] { return pack(coarse); });
}

Searcher<float>::~Searcher() = default;

// A bound of the numbers among the codes, normalised, times the square root of the weight and less
// the centre.
double Searcher<float>::largest_entry() const {
  std::atomic<double> largest{0};
  if (!centre_.empty()) {
    executor_.for_ranges(layout_.codes, 2 * layout_.dim, [&](int64_t begin, int64_t end) {
      double most = 0;
      for (int64_t i = begin; i < end; ++i) {
        each_weighted(layout_, codebook_ + i * layout_.dim, [&](int d, double value) {
          most = std::max(most, std::abs(value - centre_[d]));
        });
      }
      raise(largest, most * (1 + 0x1p-40));  // packing may round otherwise
    });
    return largest;
  }
  bool same_weight = true;
  for (int g = 0; g < layout_.groups; ++g) {
    if (layout_.l2_norm) raise(largest, std::sqrt(layout_.weight[g]));
    same_weight &= layout_.weight[g] == layout_.weight[0];
  }
  if (layout_.l2_norm) return largest;
  const int64_t dim = layout_.dim;
  executor_.for_ranges(layout_.codes, dim, [&](int64_t begin, int64_t end) {
    if (same_weight) {
      const float most = kernels().largest_magnitude(codebook_ + begin * dim, (end - begin) * dim);
      raise(largest, static_cast<double>(most) * std::sqrt(layout_.weight[0]));
      return;
    }
    for (int g = 0; g < layout_.groups; ++g) {
      const int first = layout_.begin[g], count = layout_.begin[g + 1] - first;
      float most = 0;
      for (int64_t i = begin; i < end; ++i) {
        most = std::max(most, kernels().largest_magnitude(codebook_ + i * dim + first, count));
      }
      raise(largest, static_cast<double>(most) * std::sqrt(layout_.weight[g]));
    }
  });
  return largest;
}

std::shared_ptr<const PackedCodebook> Searcher<float>::pack(
    const CoarseScoreKernels& coarse) const {
  const int dim = layout_.dim, width = coarse.panel_width;
  const int64_t num_panels = ceil_div(layout_.codes, width);
  const size_t panel_bytes = coarse.panel_bytes(dim);
  PackedCodebook packed = {&coarse, allocate(num_panels * panel_bytes), panel_bytes, num_panels, {},
                           {}};
  int exponent = 0;
  const double largest = std::frexp(largest_entry(), &exponent);
  packed.bounds.scale = std::ldexp(1.0, -exponent);
  packed.bounds.step = coarse.step(largest);
  if (!centre_.empty()) {
    packed.centre = centre_;
    for (double& value : packed.centre) value *= packed.bounds.scale;
    packed.bounds.centre = packed.centre.data();
    const double square =
        std::inner_product(packed.centre.begin(), packed.centre.end(), packed.centre.begin(), 0.0);
    packed.bounds.centre_bias = centre_bias(square, layout_);
  }
  std::atomic<double> norm{0}, length{0}, error{0}, bias{0}, parts[kChunkSizes] = {};
  executor_.for_ranges(num_panels, int64_t{width} * dim, [&](int64_t begin, int64_t end) {
    CodeBounds bounds = packed.bounds;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * width;
      const int count = static_cast<int>(std::min<int64_t>(width, layout_.codes - first));
      coarse.pack_panel(codebook_ + first * dim, count, layout_,
                        packed.panels.get() + p * panel_bytes, &bounds);
    }
    raise(norm, bounds.norm);
    raise(length, bounds.length);
    raise(error, bounds.error);
    raise(bias, bounds.bias);
    for (int i = 0; i < kChunkSizes; ++i) raise(parts[i], bounds.parts[i]);
  });
  packed.bounds.norm = norm;
  packed.bounds.length = length;
  packed.bounds.error = error;
  packed.bounds.bias = bias;
  std::copy_n(parts, kChunkSizes, packed.bounds.parts);
  packed.bounds.has_bias = bias > kLeastBias;
  return std::make_shared<const PackedCodebook>(std::move(packed));
}

void Searcher<float>::search(const float* rows, int64_t num_rows, int64_t* indices) {
  int64_t done = 0;
  const int faster = packed_->coarse->times_float;
  if (faster > 1 && rows_seen_ < kTrialRows) done = std::min(num_rows, kTrialRows);
  search_some(rows, done, indices);
  if (2 * std::count(indices, indices + done, kCrowded) > done) {
    std::fill(indices + done, indices + num_rows, kCrowded);
    done = num_rows;
  } else if (faster > 1 && rows_seen_ >= kTrialRows) {
    // In units of one code's score in float32: scanning a code again takes about one, and comparing
    // it in float64 16. Scores in float32 leave a block to scan.
    const int64_t saved = rows_seen_ * (layout_.codes - layout_.codes / faster + block_codes_);
    if (block_codes_ * blocks_scanned_ + 16 * codes_compared_ > saved) {
      packed_ = packed_for(kernels().coarse_score);
    }
  }
  search_some(rows + done * layout_.dim, num_rows - done, indices + done);
  search_crowded(rows, num_rows, indices);
}

// The rows whose index is not known yet.
void Searcher<float>::search_crowded(const float* rows, int64_t num_rows, int64_t* indices) {
  const int dim = layout_.dim;
  std::vector<int64_t> numbers;
  std::vector<float> crowded;
  for (int64_t n = 0; n < num_rows; ++n) {
    if (indices[n] == kZeroRow) {
      if (nearest_to_zero_ < 0) nearest_to_zero_ = nearest_to_zero();
      indices[n] = nearest_to_zero_;
    }
    if (indices[n] != kCrowded) continue;
    const float* row = rows + n * dim;
    numbers.push_back(n);
    crowded.insert(crowded.end(), row, row + dim);
  }
  if (numbers.empty()) return;
  if (classes_.empty()) set_classes();
  const auto count = static_cast<int64_t>(numbers.size());
  std::vector<std::vector<int64_t>> found(classes_.size());
  for (size_t c = 0; c < classes_.size(); ++c) {
    found[c].resize(count);
    classes_[c]->searcher->search(crowded.data(), count, found[c].data());
  }
  executor_.for_ranges(count, 64 * dim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::vector<int64_t> candidates = few_;
      for (size_t c = 0; c < classes_.size(); ++c) {
        candidates.push_back(classes_[c]->numbers[found[c][i]]);
      }
      std::sort(candidates.begin(), candidates.end());
      indices[numbers[i]] =
          candidates.size() == 1 ? candidates[0] : nearest_of(crowded.data() + i * dim, candidates);
    }
  });
}

int64_t Searcher<float>::codes_compared() const {
  int64_t compared = codes_compared_;
  for (const auto& one : classes_) compared += one->searcher->codes_compared();
  return compared;
}

void Searcher<float>::set_classes() {
  const int dim = layout_.dim;
  std::map<int, std::vector<int64_t>> by_length;
  if (level_ == Level::kCentred) {
    by_length[0].resize(layout_.codes);
    std::iota(by_length[0].begin(), by_length[0].end(), 0);
  } else {
    for (const int64_t i : different_codes(codebook_, layout_.codes, dim)) {
      double squared = 0;
      for (int g = 0; g < layout_.groups && !layout_.l2_norm; ++g) {
        squared += layout_.weight[g] *
                   squared_norm(codebook_ + i * dim, layout_.begin[g], layout_.begin[g + 1]);
      }
      const int exponent = squared > 0 ? std::ilogb(squared) : -2048;
      by_length[(exponent + 2048) / (2 * kClassOctaves)].push_back(i);
    }
  }
  for (auto& [length, numbers] : by_length) {
    if (by_length.size() > 1 && numbers.size() <= kFewCodes) {
      few_.insert(few_.end(), numbers.begin(), numbers.end());
      continue;
    }
    auto one = std::make_unique<Class>();
    one->numbers = std::move(numbers);
    one->layout = layout_;
    one->layout.codes = static_cast<int64_t>(one->numbers.size());
    one->codes.reserve(one->numbers.size() * dim);
    for (const int64_t i : one->numbers) {
      one->codes.insert(one->codes.end(), codebook_ + i * dim, codebook_ + (i + 1) * dim);
    }
    one->searcher.reset(new Searcher(one->layout, one->codes.data(), executor_,
                                     level_ == Level::kPlain ? Level::kCentred : Level::kLast, 0));
    classes_.push_back(std::move(one));
  }
}

// A row of zeros is as far from all codes of unit length, but for rounding.
int64_t Searcher<float>::nearest_to_zero() const {
  if (layout_.metric == Metric::kDot) return 0;  // all tie
  const std::vector<float> zeros(layout_.dim);
  std::vector<double> distances(layout_.codes);
  executor_.for_ranges(layout_.codes, 8 * layout_.dim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      distances[i] = distance(zeros.data(), codebook_ + i * layout_.dim, layout_);
    }
  });
  return std::min_element(distances.begin(), distances.end()) - distances.begin();
}

void Searcher<float>::search_some(const float* rows, int64_t num_rows, int64_t* indices) {
  if (num_rows == 0) return;
  const int64_t blocks = num_blocks();
  const int64_t workers = std::max(1, executor_.workers);
  const int64_t tile_rows = packed_->coarse->tile_rows;

  if (num_rows >= kFewestRows * workers || workers == 1) {
    const int64_t share = ceil_div(num_rows, 8 * workers);
    const int64_t task_rows =
        ceil_div(std::min(std::max(share, kFewestRows), kMostRows), tile_rows) * tile_rows;
    executor_.for_each(ceil_div(num_rows, task_rows), [&](int64_t task) {
      const int64_t first = task * task_rows, count = std::min(task_rows, num_rows - first);
      Scratch& mine = scratch();
      const Tiles tiles = mine.pack(*this, rows + first * layout_.dim, count);
      mine.block_max.resize(std::max<size_t>(mine.block_max.size(), count * blocks));
      score_blocks(tiles, 0, blocks, mine.block_max.data());
      refine_rows(tiles, mine.block_max.data(), indices + first);
    });
    return;
  }
  // Few rows: the codebook is shared out instead, and whoever scores the last part refines.
  Scratch& mine = scratch();
  const Tiles tiles = mine.pack(*this, rows, num_rows);
  mine.block_max.resize(std::max<size_t>(mine.block_max.size(), num_rows * blocks));
  float* block_max = mine.block_max.data();
  const int64_t tasks = std::min(blocks, 4 * workers), task_blocks = ceil_div(blocks, tasks);
  std::atomic<int64_t> left{ceil_div(blocks, task_blocks)};
  executor_.for_each(left, [&](int64_t task) {
    const int64_t first = task * task_blocks;
    score_blocks(tiles, first, std::min(blocks, first + task_blocks), block_max);
    if (left.fetch_sub(1) == 1) refine_rows(tiles, block_max, indices);
  });
}

// block_max [rows, blocks] for some blocks.
void Searcher<float>::score_blocks(const Tiles& tiles, int64_t first_block, int64_t end_block,
                                   float* block_max) const {
  const int64_t block_panels = block_codes_ / packed_->coarse->panel_width;
  const int64_t blocks = num_blocks();
  if (packed_->coarse->begin) packed_->coarse->begin(layout_.dim);
  for (int64_t b = first_block; b < end_block; ++b) {
    const int64_t panel = b * block_panels;
    for (int64_t t = 0; t < tiles.num_tiles(); ++t) {
      packed_->coarse->score_tile(tiles.tile(t), tiles.count(t), layout_.dim,
                                  tiles.scales + tiles.first_row(t), packed_->bounds.has_bias,
                                  packed_->panels.get() + panel * packed_->panel_bytes,
                                  std::min(block_panels, packed_->num_panels - panel),
                                  block_max + tiles.first_row(t) * blocks + b, blocks);
    }
  }
  if (packed_->coarse->end) packed_->coarse->end();
}

void Searcher<float>::refine_rows(const Tiles& tiles, const float* block_max, int64_t* indices) {
  // At last a row may have any number of candidates, so few rows are refined at once.
  const int64_t group = level_ == Level::kLast ? tiles.tile_rows : tiles.num_rows;
  for (int64_t first = 0; first < tiles.num_rows; first += group) {
    refine_group(tiles, first, std::min(group, tiles.num_rows - first), block_max, indices);
  }
}

void Searcher<float>::refine_group(const Tiles& tiles, int64_t first, int64_t count,
                                   const float* block_max, int64_t* indices) {
  const int dim = layout_.dim;
  const int blocks = static_cast<int>(num_blocks());
  const int64_t block_panels = block_codes_ / packed_->coarse->panel_width;
  const size_t most = level_ == Level::kLast ? layout_.codes : crowd(layout_.codes);
  Scratch& mine = scratch();
  mine.start(count, blocks);
  int64_t scanned = 0, compared = 0;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t n = first + r;
    const float* row = tiles.rows + n * dim;
    std::vector<int64_t>& candidates = mine.candidates[r];
    if ((layout_.metric == Metric::kDot || layout_.l2_norm) && is_zero(row, dim)) {
      indices[n] = kZeroRow;
      continue;
    }
    const int found = kernels().near_blocks(block_max + n * blocks, blocks, tiles.scales[n].margin,
                                            mine.near.data(), &mine.thresholds[r]);
    indices[n] = kUndecided;
    if (std::isfinite(mine.thresholds[r])) {
      scanned += found;
      for (int k = 0; k < found; ++k) mine.visit(mine.near[k], r);
    } else if (!std::isfinite(squared_norm(row, 0, dim))) {
      indices[n] = 0;
    } else if (static_cast<size_t>(layout_.codes) > most) {
      indices[n] = kCrowded;
    } else {
      // The row is too long for scores in float32: every code is compared.
      candidates.resize(layout_.codes);
      std::iota(candidates.begin(), candidates.end(), int64_t{0});
    }
  }
  // A block is read once for all rows that it may hold the nearest code of.
  for (int b = 0; b < blocks; ++b) {
    const int64_t panel = b * block_panels;
    for (int64_t v = mine.first_visit[b]; v >= 0; v = mine.visits[v].next) {
      const int64_t n = first + mine.visits[v].row, t = n / tiles.tile_rows;
      std::vector<int64_t>& candidates = mine.candidates[mine.visits[v].row];
      if (candidates.size() > most) continue;
      int codes[kMostBlockCodes];
      const int near = packed_->coarse->scan_block(
          tiles.tile(t), tiles.count(t), static_cast<int>(n - tiles.first_row(t)), dim,
          tiles.scales + tiles.first_row(t), packed_->bounds.has_bias,
          packed_->panels.get() + panel * packed_->panel_bytes,
          std::min(block_panels, packed_->num_panels - panel), mine.thresholds[mine.visits[v].row],
          codes);
      for (int i = 0; i < near; ++i) {
        const int64_t code = int64_t{b} * block_codes_ + codes[i];
        if (code >= layout_.codes) continue;
        candidates.push_back(code);
        prefetch(codebook_ + code * dim, dim);  // to be compared when all blocks are scanned
      }
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t n = first + r;
    const std::vector<int64_t>& candidates = mine.candidates[r];
    compared += static_cast<int64_t>(candidates.size());
    if (indices[n] != kUndecided) continue;
    indices[n] = candidates.size() > most ? kCrowded
                 : candidates.size() == 1 ? candidates[0]
                                          : nearest_of(tiles.rows + n * dim, candidates);
  }
  rows_seen_ += count;
  blocks_scanned_ += scanned;
  codes_compared_ += compared;
}

// The nearest of several codes, which come in ascending order; the lowest on a tie.
int64_t Searcher<float>::nearest_of(const float* row,
                                    const std::vector<int64_t>& candidates) const {
  thread_local std::vector<double> unit, scores;
  unit.resize(layout_.dim);
  scores.resize(candidates.size());
  double squared_length = 0;  // with the weights
  for (int g = 0; g < layout_.groups; ++g) {
    const int begin = layout_.begin[g], end = layout_.begin[g + 1];
    const double squared = squared_norm(row, begin, end);
    const double scale = inverse_norm(squared, layout_.l2_norm);
    squared_length += layout_.weight[g] * squared * scale * scale;
    for (int d = begin; d < end; ++d) unit[d] = static_cast<double>(row[d]) * scale;
  }
  kernels().scores(unit.data(), codebook_, layout_, candidates.data(),
                   static_cast<int64_t>(candidates.size()), scores.data());
  // The definition decides between scores that are closer than their rounding and its own.
  const double code_length = packed_->bounds.length / packed_->bounds.scale;
  const double bias = 0.5 * code_length * code_length;  // at most
  const double threshold =
      *std::max_element(scores.begin(), scores.end()) -
      (layout_.dim + 16) * 0x1p-50 * (std::sqrt(squared_length) * code_length + bias) -
      2 * distance_error(layout_.dim, squared_length + code_length * code_length);
  double least = std::numeric_limits<double>::infinity();
  int64_t index = 0, near = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    if (!(scores[i] >= threshold)) continue;
    ++near;
    index = candidates[i];
  }
  if (near == 1) return index;
  index = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    if (!(scores[i] >= threshold)) continue;
    const double d = distance(row, codebook_ + candidates[i] * layout_.dim, layout_);
    if (d < least) {
      least = d;
      index = candidates[i];
    }
  }
  return index;
}

// ---------------------------------------------------------------------------------------------
// float64
// ---------------------------------------------------------------------------------------------

Searcher<double>::Searcher(const CodebookLayout& layout, const double* codebook,
                           const Executor& executor, int64_t /*rows*/)
    : layout_(layout), executor_(executor), codes_(layout.codes * layout.dim) {
  executor.for_ranges(layout.codes, layout.dim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      normalize_row(codebook + i * layout.dim, layout, codes_.data() + i * layout.dim);
    }
  });
}

void Searcher<double>::search(const double* rows, int64_t num_rows, int64_t* indices) {
  CodebookLayout unit = layout_;
  unit.l2_norm = false;
  executor_.for_ranges(num_rows, layout_.codes * layout_.dim, [&](int64_t begin, int64_t end) {
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

}  // namespace tokenflow::cpu
