// What the rounds of many blocks have in common. A block's counter is (offset, block number): of
// the first round's two products one is the offset's, and of the second round's one is that of a
// word which only the upper half of the block number changes. Blocks with the same upper half share
// both.
#pragma once

#include "../contract/mask.h"

namespace dropout_ext::cpu {

// The upper half of a block number. Blocks count modulo 2^61, as element indices do modulo 2^64.
constexpr uint32_t block_high(uint64_t block) { return hi32(block) & 0x1FFFFFFF; }

// For blocks of one upper half, the state after two rounds is, with p1 = M1 * lo32(block) and
// p0 = M0 * (hi32(p1) ^ first_c0),
//   c0 = lo32(p1) ^ second_c0, c1 = second_c1, c2 = hi32(p0) ^ second_c2, c3 = lo32(p0).
struct PhiloxSchedule {
  uint32_t k0[kPhiloxRounds];
  uint32_t k1[kPhiloxRounds];
  uint64_t last_k0;  // of the last round, in the upper half
  uint64_t last_k1;
  uint32_t first_c0;
  uint32_t first_c2;  // but for the block number's upper half, which is xored to it
  uint32_t second_c0;
  uint32_t second_c1;
  uint32_t second_c2;

  PhiloxSchedule(Key key, uint32_t high) {
    uint32_t a = lo32(key.seed), b = hi32(key.seed);
    for (int r = 0; r < kPhiloxRounds; ++r, a += kPhiloxW0, b += kPhiloxW1) k0[r] = a, k1[r] = b;
    last_k0 = static_cast<uint64_t>(k0[kPhiloxRounds - 1]) << 32;
    last_k1 = static_cast<uint64_t>(k1[kPhiloxRounds - 1]) << 32;
    const uint64_t product = mul_wide(kPhiloxM0, lo32(key.offset));
    first_c0 = hi32(key.offset) ^ k0[0];
    first_c2 = hi32(product) ^ k1[0];
    second_c2 = lo32(product) ^ k1[1];
    set_block_high(high);
  }

  void set_block_high(uint32_t high) {
    const uint64_t product = mul_wide(kPhiloxM1, high ^ first_c2);
    second_c0 = hi32(product) ^ k0[1];
    second_c1 = lo32(product);
  }
};

}  // namespace dropout_ext::cpu
