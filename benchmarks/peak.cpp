// What the arithmetic of this CPU can do at best: multiply-adds and int8 dot products from
// registers alone. Compiled for the machine it runs on and loaded by roofline.py.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// As many independent chains as hide the latency of 4 cycles at 2 instructions a cycle, and more;
// all of them stay in registers (16 of 32 bytes, or 32 of 64).
constexpr int kChains = 12;
constexpr int kSteps = 1 << 14;

// Makes the compiler believe that a value is needed and may have changed.
template <typename T>
inline void keep(T& value) {
#if defined(__x86_64__)
  asm volatile("" : "+x"(value));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(value));
#else
  asm volatile("" : "+m"(value));
#endif
}

// Each unit's `run` does kChains * kSteps instructions; `kOperations` is what one of them counts.
struct FloatMultiplyAdd {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr double kOperations = 2.0 * kVectorBytes / sizeof(float);

  static void run() {
    Vector sum[kChains] = {};
    for (Vector& value : sum) keep(value);  // equal chains would be computed once
    Vector a = Vector{} + 0.5f, b = Vector{} + 1.0f;
    keep(a);
    keep(b);
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int chain = 0; chain < kChains; ++chain) sum[chain] = sum[chain] * a + b;
    }
    for (Vector& value : sum) keep(value);
  }
};

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
struct ByteDotProduct {
  static constexpr double kOperations = 2.0 * 64;

  static void run() {
    __m512i sum[kChains] = {};
    for (__m512i& value : sum) keep(value);
    __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    keep(a);
    keep(b);
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int chain = 0; chain < kChains; ++chain) {
        sum[chain] = _mm512_dpbusd_epi32(sum[chain], a, b);
      }
    }
    for (__m512i& value : sum) keep(value);
  }
};
#elif defined(__AVXVNNI__)
struct ByteDotProduct {
  static constexpr double kOperations = 2.0 * 32;

  static void run() {
    __m256i sum[kChains] = {};
    for (__m256i& value : sum) keep(value);
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
    keep(a);
    keep(b);
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int chain = 0; chain < kChains; ++chain) {
        sum[chain] = _mm256_dpbusd_avx_epi32(sum[chain], a, b);
      }
    }
    for (__m256i& value : sum) keep(value);
  }
};
#endif

// Operations a second of all threads together. They begin together, after each has run long enough
// to have been given a core and for its clock to settle.
template <typename Unit>
double rate(int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  std::atomic<int> waiting{threads};
  std::vector<double> rates(threads);
  const auto work = [&](int thread) {
    for (const auto begin = Clock::now(); since(begin) < 0.1 * seconds;) Unit::run();
    --waiting;
    while (waiting > 0) Unit::run();
    std::int64_t runs = 0;
    const auto begin = Clock::now();
    double elapsed = 0;
    while (elapsed < seconds) {
      Unit::run();
      ++runs;
      elapsed = since(begin);
    }
    rates[thread] = Unit::kOperations * kChains * kSteps * static_cast<double>(runs) / elapsed;
  };
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) pool.emplace_back(work, thread);
  for (std::thread& thread : pool) thread.join();
  double total = 0;
  for (double value : rates) total += value;
  return total;
}

}  // namespace

extern "C" double float_multiply_add_rate(int threads, double seconds) {
  return rate<FloatMultiplyAdd>(threads, seconds);
}

// 0 where the CPU has no such instruction.
extern "C" double byte_dot_product_rate(int threads, double seconds) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  return rate<ByteDotProduct>(threads, seconds);
#else
  static_cast<void>(threads);
  static_cast<void>(seconds);
  return 0;
#endif
}
