// Nearest codes of many rows in one codebook, packed once and searched as often as wanted.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "../common/codebook.h"
#include "executor.h"
#include "kernels.h"
#include "packed_codebook.h"

namespace tokenflow::cpu {

// The kernels of the instruction set in use.
const KernelTable& kernels();

template <typename T>
class Searcher;

// float32: a tile of rows gets its coarse scores with every code (CoarseScoreKernels), in
// bfloat16 or 8-bit integers where the machine is fast at them. What is kept of the scores is one
// maximum for a row and a block of codes. Codes of the blocks that may hold the nearest one are
// scored again; of those that may be it, nearly always one to five, the distance in float64
// decides.
//
// Rows that so many codes come near to that comparing them would take longer than all the rest go
// another way (`search_crowded`): copies of a code are left out, codes of very different lengths
// are searched apart, and their mean is taken from those that lie close together.
template <>
class Searcher<float> {
 public:
  // codebook [codes, dim]: one, if there are several. Beside so few rows that packing the codes
  // would take long, what an earlier searcher packed of the same codes is used (see
  // PackedCodebooks).
  Searcher(const CodebookLayout& layout, const float* codebook, const Executor& executor,
           int64_t rows);
  ~Searcher();

  // indices[n] = the nearest code of rows[n], 0 for a row that is not finite.
  void search(const float* rows, int64_t num_rows, int64_t* indices);

  // How many codes so far came so near to a row that more than a coarse score had to decide.
  int64_t codes_compared() const;

 private:
  struct Tiles;
  struct Scratch;
  struct Class {
    std::vector<int64_t> numbers;  // of its codes in the codebook, ascending
    CodebookLayout layout;
    std::vector<float> codes;
    std::unique_ptr<Searcher> searcher;
  };

  // A row's index while it is not known: it has too many candidates, or is zero and all are, or has
  // candidates yet to be compared.
  static constexpr int64_t kCrowded = -1, kZeroRow = -2, kUndecided = -3;

  // Each for the rows that the one before it has too many candidates for: the codes as they are;
  // those of a class, around their mean; the same in float32, whatever it takes.
  enum class Level { kPlain, kCentred, kLast };
  Searcher(const CodebookLayout& layout, const float* codebook, const Executor& executor,
           Level level, int64_t rows);

  std::shared_ptr<const PackedCodebook> pack(const CoarseScoreKernels& coarse) const;
  std::shared_ptr<const PackedCodebook> packed_for(const CoarseScoreKernels& coarse) const;
  void search_some(const float* rows, int64_t num_rows, int64_t* indices);
  void search_crowded(const float* rows, int64_t num_rows, int64_t* indices);
  void set_classes();
  int64_t nearest_to_zero() const;
  double largest_entry() const;
  int64_t num_blocks() const { return ceil_div(layout_.codes, int64_t{block_codes_}); }
  void score_blocks(const Tiles& tiles, int64_t first_block, int64_t end_block,
                    float* block_max) const;
  void refine_rows(const Tiles& tiles, const float* block_max, int64_t* indices);
  void refine_group(const Tiles& tiles, int64_t first, int64_t count, const float* block_max,
                    int64_t* indices);
  int64_t nearest_of(const float* row, const std::vector<int64_t>& candidates) const;
  static Scratch& scratch();

  const CodebookLayout& layout_;
  const float* codebook_;
  const Executor& executor_;
  const int block_codes_;
  const Level level_;
  const std::vector<double> centre_;  // before the scale; empty: none
  const bool is_kept_;                // whether what is packed is kept for later searchers
  std::shared_ptr<const PackedCodebook> packed_;
  // Whether scores coarser than float32 pay: what they have left to look at again so far.
  std::atomic<int64_t> rows_seen_{0}, blocks_scanned_{0}, codes_compared_{0};
  // For crowded rows, made when first wanted.
  std::vector<std::unique_ptr<Class>> classes_;
  std::vector<int64_t> few_;  // codes of classes too small to be searched
  int64_t nearest_to_zero_ = -1;
};

// float64: the definition itself, over rows and codes normalised once.
template <>
class Searcher<double> {
 public:
  Searcher(const CodebookLayout& layout, const double* codebook, const Executor& executor,
           int64_t rows);

  void search(const double* rows, int64_t num_rows, int64_t* indices);

 private:
  const CodebookLayout& layout_;
  const Executor& executor_;
  std::vector<double> codes_;
};

}  // namespace tokenflow::cpu
