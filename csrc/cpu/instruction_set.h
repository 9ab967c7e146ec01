// Which instruction set the CPU kernels run with, decided once at run time.
#pragma once

namespace tokenflow::cpu {

enum class InstructionSet { kPortable, kAvx2, kAvx512, kAvx512Vnni, kAmx, kDotprod };

// The best one that this machine has. TOKENFLOW_CPU, one of the names below, asks for a lesser one,
// to test or compare it; throws std::runtime_error where it names none that this machine has.
InstructionSet detect_instruction_set();

// "portable", "avx2", "avx512", "avx512_vnni" or "amx" on x86, "portable" or "dotprod" on aarch64.
const char* instruction_set();

}  // namespace tokenflow::cpu
