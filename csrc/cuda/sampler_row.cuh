// A row of logits as keys (common/sampling.h), 16 bytes of each input at a time where they are
// aligned.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "sampler.h"

namespace tokenflow::cuda {

template <LogitType kType>
struct Row {
  static constexpr bool kFloat = kType == LogitType::kFloat;
  using Element = std::conditional_t<kFloat, float, uint16_t>;
  static constexpr int kPack = 16 / static_cast<int>(sizeof(Element));

  // kPack elements as they lie in memory.
  struct Pack {
    uint32_t words[4];
  };

  const Element* logits;
  const Element* uncond;  // without guidance the logits, which are not read
  int codes;
  bool aligned;  // both, to 16 bytes
  Guidance guidance;

  __device__ __forceinline__ Row(const SampleArgs& args, int64_t number)
      : logits(begin_of(args.logits, args.inner, number)),
        codes(static_cast<int>(args.codes)),
        guidance(guidance_of(args, number)) {
    uncond = guidance.on ? begin_of(args.uncond, args.inner, number) : logits;
    const uintptr_t bits =
        reinterpret_cast<uintptr_t>(logits) | reinterpret_cast<uintptr_t>(uncond);
    aligned = bits % 16 == 0;
  }

  static __device__ __forceinline__ const Element* begin_of(const LogitRows& rows, int64_t inner,
                                                            int64_t number) {
    return static_cast<const Element*>(rows.data) + first_of_row(rows, inner, number);
  }

  static __device__ __forceinline__ float as_float(Element element) {
    if constexpr (kFloat) {
      return element;
    } else {
      return kType == LogitType::kHalf ? from_half(element) : from_bfloat16(element);
    }
  }

  static __device__ __forceinline__ float element_of(const Pack& pack, int i) {
    if constexpr (kFloat) {
      return int_as_float(static_cast<int>(pack.words[i]));
    } else {
      const uint32_t word = pack.words[i / 2];
      return as_float(static_cast<uint16_t>(i % 2 == 0 ? word & 0xffffu : word >> 16));
    }
  }

  // Elements from code `first` on, all of them in the row and the first aligned.
  static __device__ __forceinline__ Pack load_whole(const Element* data, int first) {
    const uint4 vector = load_vector<uint4>(data + first);
    return {{vector.x, vector.y, vector.z, vector.w}};
  }

  // Elements from code `first` on, -infinity beyond the row's end.
  __device__ __forceinline__ Pack load_part(const Element* data, int first) const {
    Pack pack;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (kFloat) {
        const int i = first + w;
        pack.words[w] = static_cast<uint32_t>(float_as_int(i < codes ? data[i] : -INFINITY));
      } else {
        constexpr uint32_t kMinusInfinity = kType == LogitType::kHalf ? 0xfc00u : 0xff80u;
        const int i = first + 2 * w;
        const uint32_t low = i < codes ? data[i] : kMinusInfinity;
        const uint32_t high = i + 1 < codes ? data[i + 1] : kMinusInfinity;
        pack.words[w] = low | high << 16;
      }
    }
    return pack;
  }

  // Calls use(n, first, codes) with the codes from `first` on, combined, for this thread's share of
  // the row. There are kUnroll packs on their way at once, of which n is the number. All threads
  // call it equally often. Beyond the row's end codes are masked.
  template <int kThreads, int kUnroll, typename Use>
  __device__ __forceinline__ void visit_packs(const Use& use) const {
    constexpr int kStride = kThreads * kPack;
    for (int begin = 0; begin < codes; begin += kUnroll * kStride) {
      const int first = begin + static_cast<int>(threadIdx.x) * kPack;
      Pack logit[kUnroll], unconditional[kUnroll] = {};
      if (aligned && first + (kUnroll - 1) * kStride + kPack <= codes) {
#pragma unroll
        for (int n = 0; n < kUnroll; ++n) {
          logit[n] = load_whole(logits, first + n * kStride);
          if (guidance.on) unconditional[n] = load_whole(uncond, first + n * kStride);
        }
      } else {
#pragma unroll
        for (int n = 0; n < kUnroll; ++n) {
          logit[n] = load_part(logits, first + n * kStride);
          if (guidance.on) unconditional[n] = load_part(uncond, first + n * kStride);
        }
      }
      // The branch is taken once for all packs, or both of its ways would run for every code.
      const auto combine = [&](const auto& combined) {
#pragma unroll
        for (int n = 0; n < kUnroll; ++n) {
          Combined code[kPack];
#pragma unroll
          for (int j = 0; j < kPack; ++j) {
            code[j] = combined(element_of(logit[n], j), element_of(unconditional[n], j));
          }
          use(n, first + n * kStride, code);
        }
      };
      if (guidance.on) {
        combine([&](float cond, float uncond) { return guided<kType>(cond, uncond, guidance); });
      } else {
        combine([&](float cond, float) { return unguided<kType>(cond); });
      }
    }
  }

  // Keys of codes anywhere in the row, with all loads on their way at once; 0 where a position is
  // negative.
  template <int kCount>
  __device__ __forceinline__ void keys_at(const int (&position)[kCount],
                                          uint32_t (&key)[kCount]) const {
    float logit[kCount], unconditional[kCount];
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const bool wanted = position[n] >= 0;
      logit[n] = wanted ? as_float(logits[position[n]]) : 0.0f;
      unconditional[n] = wanted && guidance.on ? as_float(uncond[position[n]]) : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const Combined code = guidance.on ? guided<kType>(logit[n], unconditional[n], guidance)
                                        : unguided<kType>(logit[n]);
      key[n] = position[n] < 0 ? 0 : key_of(code);
    }
  }
};

}  // namespace tokenflow::cuda
