// One row of the sampler, compiled once for each instruction set and called through a pointer that
// is picked at run time.
#pragma once

#include <cstddef>

#include "../common/sampling.h"

namespace tokenflow::cpu {

// Memory that a row is drawn in.
size_t sampler_scratch_bytes(int64_t codes);

// Draws row `row`; `scratch` is aligned to 64 bytes.
using SampleRow = void (*)(const SampleArgs& args, int64_t row, std::byte* scratch);

void sample_row_portable(const SampleArgs& args, int64_t row, std::byte* scratch);
void sample_row_avx2(const SampleArgs& args, int64_t row, std::byte* scratch);
void sample_row_avx512(const SampleArgs& args, int64_t row, std::byte* scratch);

// Groups that a row's codes are cut into: the codes of a block of kGroupCodes * kBlockGroups whose
// positions are the same modulo kBlockGroups.
constexpr int64_t kBlockGroups = 16;
constexpr int64_t kGroupCodes = 8;
constexpr int64_t kBlockOfKeys = kBlockGroups * kGroupCodes;

}  // namespace tokenflow::cpu
