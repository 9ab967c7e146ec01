#include "search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "../common/normalize.h"
#include "instruction_set.h"

namespace tokenflow::cpu {
namespace {

// Rows that share a pass over the codebook: at least, so that reading it costs little beside the
// work, and at most, so that their tiles stay in the L1 and threads share evenly.
constexpr int64_t kFewestRows = 48;
constexpr int64_t kMostRows = 192;

// Scores coarser than float32 are tried on this many rows before what they leave to look at again
// is judged.
constexpr int64_t kTrialRows = 64;

// Where more codes than this come near to a row they are a crowd. Comparing as many takes about as
// long as scoring the codebook.
int64_t crowd(int64_t codes) { return 64 + codes / 256; }

void prefetch(const float* values, int count) {
  constexpr int kLine = 64 / sizeof(float);
  for (int i = 0; i < count; i += kLine) __builtin_prefetch(values + i);
}

bool is_zero(const float* row, int dim) {
  return std::all_of(row, row + dim, [](float value) { return value == 0; });
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
