#include "sampler.h"

#include <memory>
#include <new>

#include "instruction_set.h"
#include "sampler_kernels.h"

namespace tokenflow::cpu {
namespace {

SampleRow sample_row() {
#if defined(__x86_64__)
  switch (detect_instruction_set()) {
    case InstructionSet::kAmx:
    case InstructionSet::kAvx512Vnni:
    case InstructionSet::kAvx512:
      return sample_row_avx512;
    case InstructionSet::kAvx2:
      return sample_row_avx2;
    default:
      break;
  }
#endif
  return sample_row_portable;
}

// A thread's own memory, kept from call to call.
std::byte* scratch(size_t bytes) {
  constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, kAlignment); }
  };
  thread_local std::unique_ptr<std::byte[], Free> memory;
  thread_local size_t held = 0;
  if (held < bytes) {
    memory.reset();
    held = 0;
    memory.reset(static_cast<std::byte*>(::operator new[](bytes, kAlignment)));
    held = bytes;
  }
  return memory.get();
}

}  // namespace

void sample(const SampleArgs& args, const Executor& executor) {
  const SampleRow draw = sample_row();
  const size_t bytes = sampler_scratch_bytes(args.codes);
  executor.for_ranges(args.rows, args.codes, [&](int64_t begin, int64_t end) {
    std::byte* mine = scratch(bytes);
    for (int64_t row = begin; row < end; ++row) draw(args, row, mine);
  });
}

size_t sampler_scratch_bytes(int64_t codes) {
  const size_t keys = static_cast<size_t>(ceil_div(codes, kBlockOfKeys) * kBlockOfKeys);
  const size_t with_a_vector = keys + kBlockGroups;  // room for one that is stored whole
  // Keys of all codes and the maxima of groups; candidates' keys, positions and weights; open
  // weights.
  return with_a_vector * (4 + 4 + 4 + 8 + 8) + keys / kGroupCodes * 4;
}

}  // namespace tokenflow::cpu
