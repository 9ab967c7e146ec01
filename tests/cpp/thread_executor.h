// Plain threads for the CPU kernels' tests, where the operators pass torch's pool.
#pragma once

#include <thread>
#include <vector>

#include "cpu/executor.h"

namespace tokenflow::cpu {

// An executor of `workers` threads, started anew for each call.
inline Executor thread_executor(int workers) {
  return Executor{workers, [](int count, void (*body)(void*, int), void* context) {
                    std::vector<std::thread> threads;
                    for (int worker = 1; worker < count; ++worker) {
                      threads.emplace_back(body, context, worker);
                    }
                    body(context, 0);
                    for (std::thread& thread : threads) thread.join();
                  }};
}

}  // namespace tokenflow::cpu
