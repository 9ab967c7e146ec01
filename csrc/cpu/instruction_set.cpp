#include "instruction_set.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace tokenflow::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_vnni", "amx", "dotprod"};

#if defined(__x86_64__)
// AMX and AVX-512 in bfloat16, and the system's leave to use the former.
bool has_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  if ((a & kAvx512Bf16) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // <asm/prctl.h>
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

InstructionSet best_available() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
    if (!__builtin_cpu_supports("avx512vnni")) return InstructionSet::kAvx512;
    return has_amx() ? InstructionSet::kAmx : InstructionSet::kAvx512Vnni;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::kAvx2;
#endif
#if defined(__aarch64__) && defined(__APPLE__)
  return InstructionSet::kDotprod;  // every one has it
#elif defined(__aarch64__) && defined(__linux__)
  if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) return InstructionSet::kDotprod;
#endif
  return InstructionSet::kPortable;
}

InstructionSet choose() {
  const InstructionSet best = best_available();
  const char* wanted = std::getenv("TOKENFLOW_CPU");
  if (!wanted || *wanted == '\0') return best;
  std::string supported;
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    const bool is_arm = static_cast<InstructionSet>(i) == InstructionSet::kDotprod;
    if (i > 0 && is_arm != (best == InstructionSet::kDotprod)) continue;  // another processor's
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
