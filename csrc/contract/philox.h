// Philox4x32-10: ten rounds, four 32-bit words per counter.
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DROPOUT_EXT_HD __host__ __device__ __forceinline__
#else
#define DROPOUT_EXT_HD inline
#endif

namespace dropout_ext {

inline constexpr int kPhiloxRounds = 10;
inline constexpr uint32_t kPhiloxM0 = 0xD2511F53;
inline constexpr uint32_t kPhiloxM1 = 0xCD9E8D57;
inline constexpr uint32_t kPhiloxW0 = 0x9E3779B9;  // added to the key after every round
inline constexpr uint32_t kPhiloxW1 = 0xBB67AE85;

struct PhiloxWords {
  uint32_t w[4];
};

#if defined(__CUDA_ARCH__)
// The plain product of widened operands costs an add of zero besides: 18 of them in a call.
__device__ __forceinline__ uint64_t mul_wide(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}
#else
DROPOUT_EXT_HD constexpr uint64_t mul_wide(uint32_t a, uint32_t b) {
  return static_cast<uint64_t>(a) * b;
}
#endif

DROPOUT_EXT_HD constexpr PhiloxWords philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2,
                                                   uint32_t c3, uint32_t k0, uint32_t k1) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = mul_wide(kPhiloxM0, c0);
    const uint64_t p1 = mul_wide(kPhiloxM1, c2);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace dropout_ext
