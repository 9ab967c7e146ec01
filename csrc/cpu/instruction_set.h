// Which instruction set the CPU kernels run with, decided once at run time.
#pragma once

namespace tokenflow::cpu {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// The best one that this machine has and this library was built with. TOKENFLOW_CPU
// ("portable", "avx2" or "avx512") asks for a lesser one, to test or compare it.
InstructionSet detect_instruction_set();

// "portable", "avx2" or "avx512".
const char* instruction_set();

}  // namespace tokenflow::cpu
