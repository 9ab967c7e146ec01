// Philox 4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3" (SC 2011): ten rounds of a bijection of the counter that the key selects. There is no
// state to keep, so a draw depends on (key, counter) alone and not on who makes it.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace tokenflow {

struct PhiloxBlock {
  uint32_t word[4];
};

TOKENFLOW_HOST_DEVICE PhiloxBlock philox_4x32_10(PhiloxBlock counter, uint32_t key0,
                                                 uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// 64 random bits for a position in a seed's stream.
TOKENFLOW_HOST_DEVICE uint64_t random_bits(uint64_t seed, uint64_t position) {
  const PhiloxBlock block = philox_4x32_10(
      {{static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0}},
      static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return uint64_t{block.word[1]} << 32 | block.word[0];
}

}  // namespace tokenflow
