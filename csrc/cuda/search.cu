// Nearest codes of rows. The matrix of scores is never in memory.
//
// Several codebooks, each with an index and rows of its own, share every launch.
//
//   measure       once a call: reciprocal lengths, and the range of the codebook
//   judge         once a call: which codes get a coarse score
//   pack          once a call: codes (and rows) in half precision, as the tensor cores take them
//   coarse_score  scores of rows x codes in registers; a record for a row and a few tiles of codes
//   refine        a warp a row: looks again at the few codes that may be the nearest, and decides
//                 by the score in float64, or by the distance where that cannot tell
#include "quantizer.h"
#include "search.cuh"

namespace tokenflow::cuda {
namespace {

struct NearestCodeScratch {
  PackedCodes codes;
  PackedRows rows;
  ScoreRecord* records;

  NearestCodeScratch(Workspace& workspace, const NearestCodeArgs<float>& args)
      : codes(take_packed_codes(workspace, args.layout)),
        rows(take_packed_rows(workspace, args.layout,
                              args.num_rows < kRowsAtOnce ? args.num_rows : kRowsAtOnce, codes)),
        records(take_records(workspace, args.layout, args.num_rows)) {}
};

}  // namespace

cudaError_t launch_search(const SearchArgs& args, cudaStream_t stream) {
  for (int64_t first = 0; first < args.num_rows; first += kRowsAtOnce) {
    const int64_t left = args.num_rows - first;
    const int64_t count = left < kRowsAtOnce ? left : kRowsAtOnce;
    const ScoreRuns runs(args, count);
    TOKENFLOW_CUDA_TRY(launch_coarse_score(args, first, count, runs, stream));
    TOKENFLOW_CUDA_TRY(launch_refine(args, first, count, runs, stream));
  }
  return cudaSuccess;
}

size_t nearest_code_workspace_bytes(const NearestCodeArgs<float>& args) {
  Workspace workspace(nullptr);
  NearestCodeScratch(workspace, args);
  return workspace.bytes();
}

cudaError_t launch_nearest_code(const NearestCodeArgs<float>& args, void* workspace_memory,
                                cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  const CodebookLayout& layout = args.layout;
  if (args.num_rows < 0 || unsupported_reason(layout)) return cudaErrorInvalidValue;
  int multiprocessors = 0;
  TOKENFLOW_CUDA_TRY(num_multiprocessors(&multiprocessors));
  Workspace workspace(workspace_memory);
  NearestCodeScratch scratch(workspace, args);
  TOKENFLOW_CUDA_TRY(choose_order(layout, &scratch.codes.order));
  for (int64_t first = 0; first < args.num_rows; first += kRowsAtOnce) {
    const int64_t left = args.num_rows - first;
    const int64_t count = left < kRowsAtOnce ? left : kRowsAtOnce;
    const float* rows = args.rows + first * layout.dim;
    const TokenMap map = {args.num_rows, 0, count, layout.books};
    if (first == 0) {
      TOKENFLOW_CUDA_TRY(launch_pack(layout, args.codebook, scratch.codes, rows, map, count,
                                     scratch.rows, stream));
    } else {
      TOKENFLOW_CUDA_TRY(launch_pack_rows(layout, rows, map, count, scratch.rows, stream));
    }
    SearchArgs search = {};
    search.layout = layout;
    search.codebook = args.codebook;
    search.codes = scratch.codes;
    search.rows = rows;
    search.packed = scratch.rows;
    search.map = map;
    search.num_rows = count;
    search.multiprocessors = multiprocessors;
    search.records = scratch.records;
    search.indices = args.indices + first;
    TOKENFLOW_CUDA_TRY(launch_search(search, stream));
  }
  return cudaSuccess;
}

}  // namespace tokenflow::cuda
