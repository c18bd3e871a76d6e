// The mask contract, version 1 (docs/numerics.md): which elements a key keeps.
// A keep decision is a pure function of (key, element index, p). Changing any bit of it is a new
// contract version.
#pragma once

#include "philox.h"

namespace dropout_ext {

inline constexpr int kMaskContractVersion = 1;
inline constexpr int kBlock = 8;  // elements that share one Philox call

struct Key {
  uint64_t seed;
  uint64_t offset;
};

DROPOUT_EXT_HD constexpr uint32_t lo32(uint64_t x) { return static_cast<uint32_t>(x); }
DROPOUT_EXT_HD constexpr uint32_t hi32(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

// The four Philox words of a block (= element index >> 3).
DROPOUT_EXT_HD constexpr PhiloxWords block_words(Key key, uint64_t block) {
  return philox4x32_10(lo32(key.offset), hi32(key.offset), lo32(block), hi32(block), lo32(key.seed),
                       hi32(key.seed));
}

// Lanes 4 to 7 reuse the words with their halves exchanged, so that each of the eight elements is
// compared at 32 bits. Cov(lane l, lane l + 4) <= 2^-17; docs/numerics.md derives it.
DROPOUT_EXT_HD constexpr uint32_t lane_word(const PhiloxWords& words, int lane) {
  const uint32_t w = words.w[lane & 3];
  return lane < 4 ? w : (w << 16 | w >> 16);
}

DROPOUT_EXT_HD constexpr uint32_t element_word(Key key, uint64_t index) {
  return lane_word(block_words(key, index >> 3), static_cast<int>(index & 7));
}

// T = floor(p * 2^32 + 0.5), 0 <= T <= 2^32, for 0 <= p <= 1. An element is dropped when its word
// is below T. T = 2^32 keeps nothing and does not fit in 32 bits: callers of the kernels handle it
// first (keeps_nothing), so that kernels compare 32-bit words.
DROPOUT_EXT_HD constexpr uint64_t threshold(double p) {
  return static_cast<uint64_t>(p * 4294967296.0 + 0.5);
}

DROPOUT_EXT_HD constexpr bool keeps_nothing(uint64_t threshold) { return threshold >> 32 != 0; }

DROPOUT_EXT_HD constexpr bool keep(Key key, uint64_t index, uint64_t threshold) {
  return element_word(key, index) >= threshold;
}

// A key for step, rank or slice n, as jax.random.fold_in and torch.func._random derive theirs.
DROPOUT_EXT_HD constexpr Key fold_in(Key key, uint64_t n) {
  const uint64_t counter = key.offset + n;
  const PhiloxWords words =
      philox4x32_10(lo32(counter), hi32(counter), 0, 0, lo32(key.seed), hi32(key.seed));
  return {static_cast<uint64_t>(words.w[1]) << 32 | words.w[0],
          static_cast<uint64_t>(words.w[3]) << 32 | words.w[2]};
}

}  // namespace dropout_ext
