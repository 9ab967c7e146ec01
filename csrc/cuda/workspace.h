// Carves one allocation of the caller's into arrays. Run once without memory to learn the size
// and once with it for the pointers: the same code decides both.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenflow::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    const size_t begin = static_cast<size_t>(ceil_div(static_cast<int64_t>(bytes_), kAlignment)) *
                         static_cast<size_t>(kAlignment);
    bytes_ = begin + static_cast<size_t>(count) * sizeof(T);
    return memory_ ? reinterpret_cast<T*>(memory_ + begin) : nullptr;
  }

  size_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 256;
  unsigned char* memory_;
  size_t bytes_ = 0;
};

}  // namespace tokenflow::cuda
