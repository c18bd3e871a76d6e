// The words and masks of csrc/contract/mask.h for the statistics, and of copies of it that were broken on
// purpose. Plain host code: no kernel of the product takes part. `first` and `n` are multiples of
// eight; written as block << 3 | lane, the compiler sees that eight elements share a Philox call.
#include <cstdint>

#include "mask.h"

using namespace dropout_ext;

namespace {

template <typename F>
void for_each_element(uint64_t first, uint64_t n, F f) {
  const uint64_t begin = first >> 3;
  for (uint64_t block = 0; block < n >> 3; ++block) {
#pragma GCC unroll 8
    for (int lane = 0; lane < kBlock; ++lane) f(block << 3 | lane, (begin + block) << 3 | lane);
  }
}

}  // namespace

extern "C" {

// The words of elements first to first + n - 1.
void words(const uint64_t* key, uint64_t first, uint64_t n, uint32_t* out) {
  const Key k{key[0], key[1]};
  for_each_element(first, n, [=](uint64_t at, uint64_t i) { out[at] = element_word(k, i); });
}

// Their upper halves: all bits that the generator made, each once.
void upper_halves(const uint64_t* key, uint64_t first, uint64_t n, uint16_t* out) {
  const Key k{key[0], key[1]};
  for_each_element(first, n, [=](uint64_t at, uint64_t i) {
    out[at] = static_cast<uint16_t>(element_word(k, i) >> 16);
  });
}

// Eight elements a byte, the first in the lowest bit, 1 where dropped.
void dropped(const uint64_t* key, uint64_t first, uint64_t n, double p, uint8_t* out) {
  const Key k{key[0], key[1]};
  const uint64_t t = threshold(p);
  for_each_element(first, n, [=](uint64_t at, uint64_t i) {
    const unsigned bit = keep(k, i, t) ? 0 : 1U << (i & 7);
    out[at >> 3] = static_cast<uint8_t>((i & 7) == 0 ? bit : out[at >> 3] | bit);
  });
}

void derive(const uint64_t* key, uint64_t n, uint64_t* out) {
  const Key derived = fold_in({key[0], key[1]}, n);
  out[0] = derived.seed;
  out[1] = derived.offset;
}
}
