// What the rounds of every block of a key have in common. The counter is (offset, block), so the
// first round's product with the offset's low word is one number, and with it that round's new c3
// and the key-dependent parts of c0 and c2.
#pragma once

#include "../mask.h"

namespace dropout_ext::cpu {

// Blocks count modulo 2^61, as element indices do modulo 2^64.
inline constexpr uint32_t kBlockHighMask = 0x1FFFFFFF;

struct PhiloxSchedule {
  uint32_t k0[kPhiloxRounds];
  uint32_t k1[kPhiloxRounds];
  uint32_t first_c0;  // round 1: c0 = hi(M1 * lo32(block)) ^ first_c0
  uint32_t first_c2;  //          c2 = (hi32(block) & kBlockHighMask) ^ first_c2
  uint32_t first_c3;  //          c3, the same for every block

  explicit PhiloxSchedule(Key key) {
    uint32_t a = lo32(key.seed), b = hi32(key.seed);
    for (int r = 0; r < kPhiloxRounds; ++r, a += kPhiloxW0, b += kPhiloxW1) k0[r] = a, k1[r] = b;
    const uint64_t product = static_cast<uint64_t>(kPhiloxM0) * lo32(key.offset);
    first_c0 = hi32(key.offset) ^ k0[0];
    first_c2 = hi32(product) ^ k1[0];
    first_c3 = lo32(product);
  }
};

}  // namespace dropout_ext::cpu
