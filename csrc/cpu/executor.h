// How the CPU kernels reach threads without knowing whose threads they are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace tokenflow::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

  // task(begin, end) over ranges of [0, count), none so small that handing it to another thread
  // costs more than the work; an item costs about `cost` operations.
  template <typename Task>
  void for_ranges(int64_t count, int64_t cost, const Task& task) const {
    constexpr int64_t kGrain = 16384;
    const int64_t smallest = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost));
    const int64_t range = std::max(smallest, ceil_div(count, 8 * std::max(1, workers)));
    for_each(ceil_div(count, range),
             [&](int64_t i) { task(i * range, std::min(count, (i + 1) * range)); });
  }
};

}  // namespace tokenflow::cpu
