// Philox4x32-10 (Salmon et al., SC 2011): a counter-based generator. The same key and counter give the same four
// words on every device, so randomness can belong to an image instead of to a batch, a thread or a moment.
#pragma once

#include <cstdint>

#include "activation.h"

namespace sparta {

struct PhiloxWords {
  uint32_t word[4];
};

SPARTA_INLINE PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// What a stream of numbers is for; it is part of the counter, beside the restart.
enum class Purpose : uint32_t { start = 0, target = 1, augment = 2 };

// The words for elements 4*block ... 4*block+3 of image `index`.
SPARTA_INLINE PhiloxWords image_words(uint64_t seed, int64_t index, Purpose purpose, uint32_t restart, uint32_t block) {
  const uint64_t unsigned_index = static_cast<uint64_t>(index);
  return philox4x32({{block, static_cast<uint32_t>(purpose) | restart << 8, static_cast<uint32_t>(unsigned_index),
                      static_cast<uint32_t>(unsigned_index >> 32)}},
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// 24 bits, exact in float: [0, 1) in steps of 2^-24.
SPARTA_INLINE float uniform(uint32_t word) { return static_cast<float>(word >> 8) * 5.9604644775390625e-8f; }

}  // namespace sparta
