// Division of positions by a dimension's size.
#pragma once

#include "dtypes.cuh"

namespace dropout_ext::cuda {

// By multiplication, for dividends below 2^31 or 2^63, as Index is wide. A 64-bit division would be
// a call with a stack frame.
struct Divisor {
  uint64_t size, magic;
  uint32_t shift;
};

template <typename Index>
__device__ __forceinline__ Index split(Index& n, const Divisor& divisor) {
  const Index magic = static_cast<Index>(divisor.magic);
  Index quotient;
  if constexpr (sizeof(Index) == 4) {
    quotient = (__umulhi(n, magic) + n) >> divisor.shift;
  } else {
    quotient = (__umul64hi(n, magic) + n) >> divisor.shift;
  }
  const Index remainder = n - quotient * static_cast<Index>(divisor.size);
  n = quotient;
  return remainder;
}

// Granlund, Montgomery, "Division by invariant integers using multiplication", 1994: the magic
// number is floor(2^w * (2^shift - size) / size) + 1, w the width of the dividend.
inline Divisor divisor(uint64_t size, bool wide) {
  uint32_t shift = 0;
  while (shift < 63 && uint64_t{1} << shift < size) ++shift;
  uint64_t remainder = (uint64_t{1} << shift) - size;
  uint64_t quotient = 0;
  for (int bit = wide ? 64 : 32; bit > 0; --bit) {  // size <= 2^63: no overflow
    remainder <<= 1;
    quotient = quotient << 1 | (remainder >= size);
    if (remainder >= size) remainder -= size;
  }
  return {size, quotient + 1, shift};
}

}  // namespace dropout_ext::cuda
