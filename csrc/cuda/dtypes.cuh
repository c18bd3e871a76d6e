// The element types, and Lane, the vector of one number on which the functors of csrc/epilogue work
// here.
#pragma once

#include <cmath>
#include <cstdint>

#include "../epilogue/epilogue.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace dropout_ext::cuda {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
template <typename Real>
struct Complex {  // aligned as its parts: views of real tensors need no more
  Real real, imag;
};

template <typename Real>
struct Lane {
  Real x;
};

template <typename Real>
DROPOUT_EXT_HD Lane<Real> splat(double x, Lane<Real>) {
  return {static_cast<Real>(x)};
}
template <typename Real>
__device__ __forceinline__ Lane<Real> operator+(Lane<Real> a, Lane<Real> b) {
  return {a.x + b.x};
}
template <typename Real>
__device__ __forceinline__ Lane<Real> operator-(Lane<Real> a, Lane<Real> b) {
  return {a.x - b.x};
}
template <typename Real>
__device__ __forceinline__ Lane<Real> operator*(Lane<Real> a, Lane<Real> b) {
  return {a.x * b.x};
}
template <typename Real>
__device__ __forceinline__ Lane<Real> operator/(Lane<Real> a, Lane<Real> b) {
  return {a.x / b.x};
}
__device__ __forceinline__ Lane<float> fma(Lane<float> a, Lane<float> b, Lane<float> c) {
  return {fmaf(a.x, b.x, c.x)};
}
__device__ __forceinline__ Lane<double> fma(Lane<double> a, Lane<double> b, Lane<double> c) {
  return {::fma(a.x, b.x, c.x)};
}
template <typename Real>
__device__ __forceinline__ Lane<Real> select(bool keep, Lane<Real> a, Lane<Real> b) {
  return {keep ? a.x : b.x};
}
// Computed outside the choice, so that it is a select and no branch.
template <typename Real>
__device__ __forceinline__ Lane<Real> mul_or_zero(bool keep, Lane<Real> a, Lane<Real> b) {
  const Real product = a.x * b.x;
  return {keep ? product : Real{0}};
}
__device__ __forceinline__ Lane<float> absolute(Lane<float> a) { return {fabsf(a.x)}; }
__device__ __forceinline__ Lane<float> if_greater(Lane<float> a, Lane<float> b, Lane<float> x,
                                                  Lane<float> y) {
  return {a.x > b.x ? x.x : y.x};
}
__device__ __forceinline__ Lane<float> shift_exponent(Lane<float> a, Lane<float> r) {
  return {__uint_as_float(__float_as_uint(a.x) + (__float_as_uint(r.x) << 23))};
}

__device__ __forceinline__ Lane<float> to_lane(Float16 x) {
  return {__half2float(__ushort_as_half(x.bits))};
}
__device__ __forceinline__ Lane<float> to_lane(BFloat16 x) {
  return {__uint_as_float(static_cast<uint32_t>(x.bits) << 16)};
}
__device__ __forceinline__ Lane<float> to_lane(float x) { return {x}; }
__device__ __forceinline__ Lane<double> to_lane(double x) { return {x}; }

__device__ __forceinline__ void from_lane(Float16& to, Lane<float> x) {
  to = {__half_as_ushort(__float2half_rn(x.x))};
}
__device__ __forceinline__ void from_lane(BFloat16& to, Lane<float> x) {
  to = {__bfloat16_as_ushort(__float2bfloat16_rn(x.x))};
}
__device__ __forceinline__ void from_lane(float& to, Lane<float> x) { to = x.x; }
__device__ __forceinline__ void from_lane(double& to, Lane<double> x) { to = x.x; }

// Two at a time is one instruction; element 0 goes into the lower half.
__device__ __forceinline__ uint32_t pack(Float16, Lane<float> x0, Lane<float> x1) {
  const __half2 packed = __floats2half2_rn(x0.x, x1.x);
  return *reinterpret_cast<const uint32_t*>(&packed);
}
__device__ __forceinline__ uint32_t pack(BFloat16, Lane<float> x0, Lane<float> x1) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(x0.x, x1.x);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

// What the kernels know of each dtype. kUnroll: groups of blocks per lane in a flat tile, for four
// independent 16-byte loads in flight (complex128 has eight in one group).
template <typename RealType, typename VectorType, int unroll, int bits = 0>
struct TraitsOf {
  using Real = RealType;
  using Vector = VectorType;
  static constexpr int kUnroll = unroll;
  static constexpr bool kIs16Bit = bits == 16;
  static constexpr bool kReadsInput = bits != 1;
};
template <typename T>
struct Traits;
template <>
struct Traits<double> : TraitsOf<double, double2, 1> {};
template <>
struct Traits<Complex<double>> : TraitsOf<double, double2, 1> {};
template <>
struct Traits<Complex<float>> : TraitsOf<float, float4, 1> {};
template <>
struct Traits<float> : TraitsOf<float, float4, 2> {};
template <>
struct Traits<Float16> : TraitsOf<float, uint4, 4, 16> {};
template <>
struct Traits<BFloat16> : TraitsOf<float, uint4, 4, 16> {};
template <>
struct Traits<bool> : TraitsOf<float, uint4, 1, 1> {};

}  // namespace dropout_ext::cuda
