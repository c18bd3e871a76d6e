// Conversions of the 16-bit float told otherwise than in csrc/cpu/half.h: by the machine itself.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__aarch64__)
inline float half_to_float(uint16_t bits) {
  __fp16 half;
  std::memcpy(&half, &bits, 2);
  return half;
}
inline uint16_t float_to_half(float f) {
  const __fp16 half = static_cast<__fp16>(f);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
#else
#include <immintrin.h>

[[gnu::target("f16c")]] inline float half_to_float(uint16_t bits) { return _cvtsh_ss(bits); }
[[gnu::target("f16c")]] inline uint16_t float_to_half(float f) {
  return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
}
#endif
