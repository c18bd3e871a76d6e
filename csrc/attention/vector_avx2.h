// What attention needs beyond cpu/simd_avx2.h. See kernel_body.h for what this defines.

inline constexpr int kTileRows32 = 6, kTilePanels32 = 1;  // 12 sums, 2 of B, 1 of A: 15 registers
inline constexpr int kTileRows64 = 3, kTilePanels64 = 1;

inline F32 broadcast(const float* p) {
  const __m256 v = _mm256_broadcast_ss(p);
  return {v, v};
}
inline F64 broadcast(const double* p) {
  const __m256d v = _mm256_broadcast_sd(p);
  return {{v, v, v, v}};
}

inline F32 multiply_add(F32 a, F32 b, F32 c) { return fma(a, b, c); }
inline F64 multiply_add(F64 a, F64 b, F64 c) { return fma(a, b, c); }

#define DROPOUT_EXT_ELEMENTWISE(name, op32, op64)                                \
  inline F32 name(F32 a, F32 b) { return {op32(a.lo, b.lo), op32(a.hi, b.hi)}; } \
  inline F64 name(F64 a, F64 b) {                                                \
    for (int i = 0; i < 4; ++i) a.v[i] = op64(a.v[i], b.v[i]);                   \
    return a;                                                                    \
  }
DROPOUT_EXT_ELEMENTWISE(add, _mm256_add_ps, _mm256_add_pd)
DROPOUT_EXT_ELEMENTWISE(subtract, _mm256_sub_ps, _mm256_sub_pd)
DROPOUT_EXT_ELEMENTWISE(multiply, _mm256_mul_ps, _mm256_mul_pd)
DROPOUT_EXT_ELEMENTWISE(maximum, _mm256_max_ps, _mm256_max_pd)
#undef DROPOUT_EXT_ELEMENTWISE

inline __m256 add_exponent(__m256 x, __m256 n) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), shifted));
}
inline F32 add_exponent(F32 x, F32 n) {
  return {add_exponent(x.lo, n.lo), add_exponent(x.hi, n.hi)};
}
inline F64 add_exponent(F64 x, F64 n) {
  for (int i = 0; i < 4; ++i) {
    const __m256i shifted = _mm256_slli_epi64(_mm256_castpd_si256(n.v[i]), 52);
    x.v[i] = _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(x.v[i]), shifted));
  }
  return x;
}

inline F32 zero_where_less(F32 a, F32 b, F32 x) {
  return {_mm256_andnot_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), x.lo),
          _mm256_andnot_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ), x.hi)};
}
inline F64 zero_where_less(F64 a, F64 b, F64 x) {
  for (int i = 0; i < 4; ++i) {
    x.v[i] = _mm256_andnot_pd(_mm256_cmp_pd(a.v[i], b.v[i], _CMP_LT_OQ), x.v[i]);
  }
  return x;
}

inline F32 keep_or_zero(Keep k, F32 x) {
  return {_mm256_and_ps(x.lo, _mm256_castsi256_ps(k.lo)),
          _mm256_and_ps(x.hi, _mm256_castsi256_ps(k.hi))};
}
inline F64 keep_or_zero(Keep k, F64 x) {
  for (int i = 0; i < 4; ++i) x.v[i] = _mm256_and_pd(x.v[i], keep_64(k, i));
  return x;
}
