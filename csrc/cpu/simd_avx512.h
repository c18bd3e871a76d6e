// AVX-512 F, BW, DQ, VL. See kernel_body.h for what this defines.

struct Keep {
  __mmask16 mask;
};

inline Keep keep_from_bits(uint16_t bits) { return {bits}; }
inline uint16_t keep_to_bits(Keep keep) { return keep.mask; }

inline void store_bytes(uint8_t* out, Keep keep) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_maskz_set1_epi8(keep.mask, 1));
}

struct F32 {
  __m512 v;
};
struct F64 {
  __m512d lo, hi;
};

template <class V>
V splat(double x);
template <>
inline F32 splat<F32>(double x) {
  return {_mm512_set1_ps(static_cast<float>(x))};
}
template <>
inline F64 splat<F64>(double x) {
  return {_mm512_set1_pd(x), _mm512_set1_pd(x)};
}

inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F64 load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
inline F32 load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F32 load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}

inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
inline void store(double* p, F64 x) {
  _mm512_storeu_pd(p, x.lo);
  _mm512_storeu_pd(p + 8, x.hi);
}
// Rounded to nearest even by adding just under half, or half, of the last place that stays. A NaN
// made from a 16-bit one has zeros below that place, so nothing carries into its exponent. Not
// vcvtneps2bf16: that one flushes subnormals.
inline __m512i round_to_upper_half(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __m512i down = _mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF));
  return _mm512_mask_add_epi32(down, odd, down, _mm512_set1_epi32(1));
}
inline __m256i bfloat16_bits(F32 x) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_upper_half(x.v), 16));
}
inline __m256i float16_bits(F32 x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(Float16* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), float16_bits(x));
}
inline void store(BFloat16* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits(x));
}

// 32 bfloat16 at a time: as floats, elements of even position are a shift away and those of odd
// position a mask, so nothing is shuffled, and they are dropped as 16-bit lanes.
template <class Elem>
inline constexpr bool kHasPair = false;
template <>
inline constexpr bool kHasPair<BFloat16> = true;

inline __m512i scale_pair(const BFloat16* p, Keep first, Keep second, F32 scale) {
  const __m512i x = _mm512_loadu_si512(p);
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(~0xFFFF)));
  const __m512i even_bits =
      _mm512_srli_epi32(round_to_upper_half(_mm512_mul_ps(even, scale.v)), 16);
  const __m512i odd_bits = round_to_upper_half(_mm512_mul_ps(odd, scale.v));
  const __m512i all = _mm512_mask_blend_epi16(0xAAAAAAAA, even_bits, odd_bits);
  return _mm512_maskz_mov_epi16(_mm512_kunpackw(second.mask, first.mask), all);
}
inline void store_pair(BFloat16* p, __m512i x) { _mm512_storeu_si512(p, x); }
inline void stream_pair(BFloat16* p, __m512i x) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), x);
}

inline void stream(float* p, F32 x) { _mm512_stream_ps(p, x.v); }
inline void stream(double* p, F64 x) {
  _mm512_stream_pd(p, x.lo);
  _mm512_stream_pd(p + 8, x.hi);
}
inline void stream(Float16* p, F32 x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), float16_bits(x));
}
inline void stream(BFloat16* p, F32 x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits(x));
}
inline void fence() { _mm_sfence(); }
inline void prefetch(uintptr_t address) {
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
}

inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F64 mul(F64 a, F64 b) { return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) {
  return {_mm512_fmadd_pd(a.lo, b.lo, c.lo), _mm512_fmadd_pd(a.hi, b.hi, c.hi)};
}

inline F32 keep_or_zero(Keep k, F32 x) { return {_mm512_maskz_mov_ps(k.mask, x.v)}; }
inline F64 keep_or_zero(Keep k, F64 x) {
  return {_mm512_maskz_mov_pd(static_cast<__mmask8>(k.mask), x.lo),
          _mm512_maskz_mov_pd(static_cast<__mmask8>(k.mask >> 8), x.hi)};
}
inline F32 select(Keep k, F32 kept, F32 dropped) {
  return {_mm512_mask_mov_ps(dropped.v, k.mask, kept.v)};
}
inline F64 select(Keep k, F64 kept, F64 dropped) {
  return {_mm512_mask_mov_pd(dropped.lo, static_cast<__mmask8>(k.mask), kept.lo),
          _mm512_mask_mov_pd(dropped.hi, static_cast<__mmask8>(k.mask >> 8), kept.hi)};
}

// Eight blocks, one per 64-bit lane. Only the low half of a lane counts: _mm512_mul_epu32 reads no
// more, so neither the products' upper halves in c1 and c3 nor what they leave in c0 and c2 need
// clearing, and a round is two multiplies, two shifts and two three-way xors.
struct PhiloxLanes {
  __m512i c0, c1, c2, c3;

  PhiloxLanes(const PhiloxSchedule& s, __m512i block) {
    const __m512i p1 = _mm512_mul_epu32(block, m1());
    c0 = _mm512_xor_si512(_mm512_srli_epi64(p1, 32), word(s.first_c0));
    c1 = p1;
    const __m512i high = _mm512_and_si512(_mm512_srli_epi64(block, 32), word(kBlockHighMask));
    c2 = _mm512_xor_si512(high, word(s.first_c2));
    c3 = word(s.first_c3);
  }
  void round(const PhiloxSchedule& s, int r) {
    const __m512i p0 = _mm512_mul_epu32(c0, m0());
    const __m512i p1 = _mm512_mul_epu32(c2, m1());
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, word(s.k0[r]), 0x96);
    c1 = p1;
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, word(s.k1[r]), 0x96);
    c3 = p0;
  }
  static __m512i word(uint32_t w) { return _mm512_set1_epi32(static_cast<int>(w)); }
  static __m512i m0() { return word(kPhiloxM0); }
  static __m512i m1() { return word(kPhiloxM1); }
};

// Low halves of a into the even, of b into the odd 32-bit lanes.
inline __m512i interleave_low(__m512i a, __m512i b) {
  return _mm512_mask_shuffle_epi32(a, 0xAAAA, b, _MM_PERM_CCAA);
}

inline void keep_group(const PhiloxSchedule& s, uint64_t block, uint32_t threshold,
                       Keep (&keep)[8]) {
  // Blocks are dealt so that after the transpose 128-bit lane L of word set k holds block 4k + L:
  // even 32-bit lanes come from a, odd ones from b.
  const __m512i base = _mm512_set1_epi64(static_cast<long long>(block));
  PhiloxLanes a(s, _mm512_add_epi64(base, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11)));
  PhiloxLanes b(s, _mm512_add_epi64(base, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15)));
#pragma GCC unroll 9
  for (int r = 1; r < kPhiloxRounds; ++r) {
    a.round(s, r);
    b.round(s, r);
  }
  const __m512i w0 = interleave_low(a.c0, b.c0), w1 = interleave_low(a.c1, b.c1);
  const __m512i w2 = interleave_low(a.c2, b.c2), w3 = interleave_low(a.c3, b.c3);
  const __m512i w01lo = _mm512_unpacklo_epi32(w0, w1), w01hi = _mm512_unpackhi_epi32(w0, w1);
  const __m512i w23lo = _mm512_unpacklo_epi32(w2, w3), w23hi = _mm512_unpackhi_epi32(w2, w3);
  const __m512i words[4] = {
      _mm512_unpacklo_epi64(w01lo, w23lo), _mm512_unpackhi_epi64(w01lo, w23lo),
      _mm512_unpacklo_epi64(w01hi, w23hi), _mm512_unpackhi_epi64(w01hi, w23hi)};
  const __m512i t = _mm512_set1_epi32(static_cast<int>(threshold));
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int k = 0; k < 4; ++k) {
    const __m512i rotated = _mm512_rol_epi32(words[k], 16);
    keep[2 * k].mask =
        _mm512_cmpge_epu32_mask(_mm512_permutex2var_epi64(words[k], first, rotated), t);
    keep[2 * k + 1].mask =
        _mm512_cmpge_epu32_mask(_mm512_permutex2var_epi64(words[k], second, rotated), t);
  }
}
