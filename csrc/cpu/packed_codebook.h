// A codebook as it is packed for coarse scores, and those that are kept for later calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "../common/codebook.h"
#include "kernels.h"

namespace tokenflow::cpu {

using AlignedBytes = std::unique_ptr<std::byte[], void (*)(std::byte*)>;

// Memory aligned to kAlignment.
AlignedBytes allocate(size_t bytes);

struct PackedCodebook {
  const CoarseScoreKernels* coarse;
  AlignedBytes panels;
  size_t panel_bytes;
  int64_t num_panels;
  CodeBounds bounds;
  std::vector<double> centre;  // of the bounds
};

// The last few codebooks that were searched with few rows, as they were packed and as they are: a
// codebook is compared with its copy before what was packed of it is used again. It is kept the
// second time it seems to be the same, so that one in training is not copied at every step.
class PackedCodebooks {
 public:
  using Packed = std::shared_ptr<const PackedCodebook>;

  static PackedCodebooks& instance();

  // What pack() returns, or returned for the same codes and kernels.
  Packed get(const CodebookLayout& layout, const float* codebook, const CoarseScoreKernels& coarse,
             const std::function<Packed()>& pack);

 private:
  using Codes = std::vector<float>;

  struct Entry {
    CodebookLayout layout;
    const CoarseScoreKernels* coarse;
    uint64_t fingerprint;
    std::shared_ptr<const Codes> codes;
    Packed packed;
  };

  std::mutex lock_;
  std::list<Entry> entries_;  // the last used first
};

}  // namespace tokenflow::cpu
