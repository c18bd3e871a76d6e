// What attention needs beyond cpu/simd_avx512.h. See kernel_body.h for what this defines.

// 24 sums, 2 of B: A comes out of memory.
inline constexpr int kTileRows32 = 12, kTilePanels32 = 2;
inline constexpr int kTileRows64 = 12, kTilePanels64 = 1;

inline F32 broadcast(const float* p) { return {_mm512_set1_ps(*p)}; }
inline F64 broadcast(const double* p) {
  const __m512d v = _mm512_set1_pd(*p);
  return {v, v};
}

inline F32 multiply_add(F32 a, F32 b, F32 c) { return fma(a, b, c); }
inline F64 multiply_add(F64 a, F64 b, F64 c) { return fma(a, b, c); }

inline F32 maximum(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F64 maximum(F64 a, F64 b) { return {_mm512_max_pd(a.lo, b.lo), _mm512_max_pd(a.hi, b.hi)}; }

inline F32 power_of_two(F32 a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
inline __m512d power_of_two(__m512d a) {
  return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(a), 52));
}
inline F64 power_of_two(F64 a) { return {power_of_two(a.lo), power_of_two(a.hi)}; }

inline F32 zero_where_less(F32 a, F32 b, F32 x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), x.v)};
}
inline F64 zero_where_less(F64 a, F64 b, F64 x) {
  return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a.lo, b.lo, _CMP_NLT_UQ), x.lo),
          _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a.hi, b.hi, _CMP_NLT_UQ), x.hi)};
}

inline F32 keep_or_zero(Keep k, F32 x) { return {_mm512_maskz_mov_ps(k.mask, x.v)}; }
inline F64 keep_or_zero(Keep k, F64 x) {
  return {_mm512_maskz_mov_pd(static_cast<__mmask8>(k.mask), x.lo),
          _mm512_maskz_mov_pd(static_cast<__mmask8>(k.mask >> 8), x.hi)};
}
