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
  // A power of two moves the exponent's bias, and normalizes subnormals, exactly. Infinity and NaN
  // keep their mantissa under an exponent of ones.
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t ones = -static_cast<uint32_t>((h.bits & 0x7C00) == 0x7C00) & 0x7F800000;
  return std::bit_cast<float>(finite | ones | sign);
}

// Without branches, and signed, so that a loop over it becomes SIMD code even for SSE2.
inline Float16 to_float16(float f) {
  const int32_t u = std::bit_cast<int32_t>(f);
  const int32_t sign = u >> 16 & 0x8000;
  const int32_t magnitude = u & 0x7FFFFFFF;
  // Below 2^-14 the sum with 0.5 rounds to the subnormal's place and leaves its bits.
  const int32_t subnormal =
      std::bit_cast<int32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000;
  const int32_t normal = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  const int32_t special = 0x7C00 | (-(magnitude > 0x7F800000) & 0x200);
  const int32_t small = -(magnitude < 0x38800000);
  const int32_t large = -(magnitude >= 0x47800000);  // 2^16 and more, infinity, NaN
  const int32_t finite = (subnormal & small) | (normal & ~small);
  return {static_cast<uint16_t>(sign | (special & large) | (finite & ~large))};
}

}  // namespace dropout_ext::cpu
