// Build facts for `tokenflow_ext.build_info()`. The only source that knows Python; the operators
// are in a library of their own that does not.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "cpu/instruction_set.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __VERSION__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

// None where the build gave no value, as for everything about CUDA in a CPU build.
py::object optional(const char* value) {
  if (*value == '\0') return py::none();
  return py::str(value);
}

py::dict facts() {
  py::dict out;
  out["version"] = TOKENFLOW_VERSION;
  out["torch"] = TOKENFLOW_TORCH_VERSION;
  out["cuda"] = optional(TOKENFLOW_CUDA_VERSION);
  py::list architectures;
  const std::string text = TOKENFLOW_CUDA_ARCHITECTURES;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(';', begin), text.size());
    architectures.append(py::str(text.substr(begin, end - begin)));
    begin = end + 1;
  }
  out["cuda_architectures"] = architectures;
  out["cuda_reason"] = TOKENFLOW_CUDA_REASON;
  out["compiler"] = kCompiler;
  out["cpu_instruction_set"] = tokenflow::cpu::instruction_set();
  return out;
}

}  // namespace

PYBIND11_MODULE(_build_info, module) {
  module.doc() = "How the kernels were built and what they run on.";
  module.def("facts", &facts,
             "Version, torch, CUDA and compiler of the build; CPU instruction set in use.");
}
