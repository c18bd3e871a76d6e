// The 16-bit formats as the CPU kernels store them, and their conversions in plain C++, which round
// to nearest even as the instructions of the SIMD variants do.
#pragma once

#include <bit>
#include <cstdint>

namespace dropout_ext::cpu {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 h) {
  return std::bit_cast<float>(static_cast<uint32_t>(h.bits) << 16);
}

inline BFloat16 to_bfloat16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f);
  const uint32_t rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
  const bool nan = (u & 0x7FFFFFFF) > 0x7F800000;
  return {static_cast<uint16_t>(nan ? 0x7FC0 : rounded)};
}

inline float to_float(Float16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h.bits & 0x7FFF) << 13;
  // Infinity and NaN keep their mantissa under an exponent of ones. All else is rescaled by a power
  // of two, which also normalizes subnormals, exactly.
  const float finite = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7F800000;
  const uint32_t u = (h.bits & 0x7C00) == 0x7C00 ? special : std::bit_cast<uint32_t>(finite);
  return std::bit_cast<float>(u | sign);
}

inline Float16 to_float16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f);
  const uint32_t sign = u >> 16 & 0x8000;
  const uint32_t magnitude = u & 0x7FFFFFFF;
  uint32_t h;
  if (magnitude >= 0x47800000) {  // 2^16 and more, infinity, NaN
    h = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: the sum with 0.5 leaves the subnormal's bits
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    h = std::bit_cast<uint32_t>(shifted) - 0x3F000000;
  } else {
    h = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | h)};
}

}  // namespace dropout_ext::cpu
