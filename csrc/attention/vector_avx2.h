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

inline F32 maximum(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F64 maximum(F64 a, F64 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_max_pd(a.v[i], b.v[i]);
  return a;
}

inline __m256 power_of_two(__m256 a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23));
}
inline F32 power_of_two(F32 a) { return {power_of_two(a.lo), power_of_two(a.hi)}; }
inline F64 power_of_two(F64 a) {
  for (int i = 0; i < 4; ++i) {
    a.v[i] = _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(a.v[i]), 52));
  }
  return a;
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
