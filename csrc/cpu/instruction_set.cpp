#include "instruction_set.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace tokenflow::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_vnni"};

InstructionSet best_available() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
    return __builtin_cpu_supports("avx512vnni") ? InstructionSet::kAvx512Vnni
                                                : InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kPortable;
}

InstructionSet choose() {
  const InstructionSet best = best_available();
  const char* wanted = std::getenv("TOKENFLOW_CPU");
  if (!wanted || *wanted == '\0') return best;
  std::string supported;
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<InstructionSet>(i);
    supported += (i ? ", " : "") + std::string(kNames[i]);
  }
  throw std::runtime_error("TOKENFLOW_CPU must be one of what this machine runs (" + supported +
                           "), got " + wanted);
}

}  // namespace

InstructionSet detect_instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

const char* instruction_set() { return kNames[static_cast<int>(detect_instruction_set())]; }

}  // namespace tokenflow::cpu
