// How the CPU kernels reach threads without knowing whose threads they are.
#pragma once

#include <atomic>
#include <cstdint>

namespace tokenflow::cpu {

// Runs body(context, worker) once for every worker in [0, workers), in parallel, and returns when
// all are done. The operators pass torch's thread pool, the C++ tests plain threads.
struct Executor {
  int workers;
  void (*run)(int workers, void (*body)(void* context, int worker), void* context);

  // task(i) for every i in [0, count); a free worker takes the next i, so uneven tasks balance.
  template <typename Task>
  void for_each(int64_t count, const Task& task) const {
    if (count <= 0) return;
    if (workers <= 1 || count == 1) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    struct Shared {
      const Task* task;
      int64_t count;
      std::atomic<int64_t> next;
    } shared{&task, count, {0}};
    run(
        static_cast<int>(count < workers ? count : workers),
        [](void* context, int) {
          Shared& s = *static_cast<Shared*>(context);
          for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) {
            (*s.task)(i);
          }
        },
        &shared);
  }
};

}  // namespace tokenflow::cpu
