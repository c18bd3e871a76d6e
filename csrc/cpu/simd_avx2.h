// AVX2, FMA, F16C. See kernel_body.h for what this defines.

struct Keep {
  __m256i lo, hi;  // all ones in the 32-bit lanes of kept elements
};

inline Keep keep_from_bits(uint16_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i lo = _mm256_and_si256(_mm256_set1_epi32(bits), lane);
  const __m256i hi = _mm256_and_si256(_mm256_set1_epi32(bits >> 8), lane);
  return {_mm256_cmpeq_epi32(lo, lane), _mm256_cmpeq_epi32(hi, lane)};
}
inline uint16_t keep_to_bits(Keep k) {
  return static_cast<uint16_t>(_mm256_movemask_ps(_mm256_castsi256_ps(k.lo)) |
                               _mm256_movemask_ps(_mm256_castsi256_ps(k.hi)) << 8);
}

// 16 lanes of 32 bits to 16 lanes of 16, by signed saturation.
inline __m256i pack_signed(__m256i lo, __m256i hi) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), _MM_SHUFFLE(3, 1, 2, 0));
}

inline void store_bytes(uint8_t* out, Keep k) {
  const __m256i half = pack_signed(k.lo, k.hi);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_and_si128(bytes, _mm_set1_epi8(1)));
}

struct F32 {
  __m256 lo, hi;
};
struct F64 {
  __m256d v[4];
};

inline F32 splat(double x, F32) {
  const __m256 v = _mm256_set1_ps(static_cast<float>(x));
  return {v, v};
}
inline F64 splat(double x, F64) {
  const __m256d v = _mm256_set1_pd(x);
  return {{v, v, v, v}};
}

inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F64 load(const double* p) {
  return {{_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8),
           _mm256_loadu_pd(p + 12)}};
}
inline __m128i load_8x16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline F32 load(const Float16* p) {
  return {_mm256_cvtph_ps(load_8x16(p)), _mm256_cvtph_ps(load_8x16(p + 8))};
}
inline F32 load(const BFloat16* p) {
  const __m256i lo = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_8x16(p)), 16);
  const __m256i hi = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_8x16(p + 8)), 16);
  return {_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)};
}

inline void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
inline void store(double* p, F64 x) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, x.v[i]);
}
inline __m256i float16_bits(F32 x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(x.hi, kNearest), _mm256_cvtps_ph(x.lo, kNearest));
}
// As in simd_avx512.h; the upper halves as signed numbers, so that the saturating pack keeps them.
inline __m256i bfloat16_upper(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
  return _mm256_srai_epi32(rounded, 16);
}
inline __m256i bfloat16_bits(F32 x) {
  return pack_signed(bfloat16_upper(x.lo), bfloat16_upper(x.hi));
}
inline void store(Float16* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), float16_bits(x));
}
inline void store(BFloat16* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits(x));
}

inline void stream(float* p, F32 x) {
  _mm256_stream_ps(p, x.lo);
  _mm256_stream_ps(p + 8, x.hi);
}
inline void stream(double* p, F64 x) {
  for (int i = 0; i < 4; ++i) _mm256_stream_pd(p + 4 * i, x.v[i]);
}
inline void stream(Float16* p, F32 x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), float16_bits(x));
}
inline void stream(BFloat16* p, F32 x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits(x));
}
template <class Elem>
inline constexpr bool kHasPair = false;

inline void fence() { _mm_sfence(); }
// Inlined early: a call of a function that does nothing else is taken for one without effect.
__attribute__((always_inline)) inline void prefetch(uintptr_t address) {
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
}

inline F32 fma(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F64 fma(F64 a, F64 b, F64 c) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_fmadd_pd(a.v[i], b.v[i], c.v[i]);
  return a;
}

inline F32 operator+(F32 a, F32 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F32 operator-(F32 a, F32 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F32 operator*(F32 a, F32 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F32 operator/(F32 a, F32 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline F64 operator+(F64 a, F64 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_add_pd(a.v[i], b.v[i]);
  return a;
}
inline F64 operator-(F64 a, F64 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_sub_pd(a.v[i], b.v[i]);
  return a;
}
inline F64 operator*(F64 a, F64 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_mul_pd(a.v[i], b.v[i]);
  return a;
}

// As in simd_avx512.h.
inline float sum_lanes(F32 x) {
  const __m256 y = _mm256_add_ps(x.lo, x.hi);
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
inline double sum_lanes(F64 x) {
  const __m256d y = _mm256_add_pd(_mm256_add_pd(x.v[0], x.v[2]), _mm256_add_pd(x.v[1], x.v[3]));
  const __m128d z = _mm_add_pd(_mm256_castpd256_pd128(y), _mm256_extractf128_pd(y, 1));
  return _mm_cvtsd_f64(_mm_add_sd(z, _mm_unpackhi_pd(z, z)));
}

inline F32 absolute(F32 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F32 if_greater(F32 a, F32 b, F32 x, F32 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}
inline __m256 shift_exponent(__m256 a, __m256 r) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(r), 23)));
}
inline F32 shift_exponent(F32 a, F32 r) {
  return {shift_exponent(a.lo, r.lo), shift_exponent(a.hi, r.hi)};
}

// The decisions of elements 4i to 4i + 3, in 64-bit lanes.
inline __m256d keep_64(Keep k, int i) {
  const __m256i half = i < 2 ? k.lo : k.hi;
  const __m128i quarter = i & 1 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half);
  return _mm256_castsi256_pd(_mm256_cvtepi32_epi64(quarter));
}
inline F32 mul_or_zero(Keep k, F32 a, F32 b) {
  return {_mm256_and_ps(_mm256_mul_ps(a.lo, b.lo), _mm256_castsi256_ps(k.lo)),
          _mm256_and_ps(_mm256_mul_ps(a.hi, b.hi), _mm256_castsi256_ps(k.hi))};
}
inline F64 mul_or_zero(Keep k, F64 a, F64 b) {
  for (int i = 0; i < 4; ++i) a.v[i] = _mm256_and_pd(_mm256_mul_pd(a.v[i], b.v[i]), keep_64(k, i));
  return a;
}
inline F32 select(Keep k, F32 kept, F32 dropped) {
  return {_mm256_blendv_ps(dropped.lo, kept.lo, _mm256_castsi256_ps(k.lo)),
          _mm256_blendv_ps(dropped.hi, kept.hi, _mm256_castsi256_ps(k.hi))};
}
inline F64 select(Keep k, F64 kept, F64 dropped) {
  for (int i = 0; i < 4; ++i) kept.v[i] = _mm256_blendv_pd(dropped.v[i], kept.v[i], keep_64(k, i));
  return kept;
}

// As in simd_avx512.h.
template <class Elem, class V>
inline void store_any(Elem* p, const V& x) {
  store(p, x);
}
inline __m256i bfloat16_upper_any(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
  const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q));
  return _mm256_srai_epi32(_mm256_add_epi32(u, _mm256_and_si256(half, number)), 16);
}
__attribute__((always_inline)) inline __m256i bfloat16_bits_any(F32 x) {
  return pack_signed(bfloat16_upper_any(x.lo), bfloat16_upper_any(x.hi));
}
__attribute__((always_inline)) inline void store_any(BFloat16* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits_any(x));
}
// What loading it after store_any would give.
template <class Elem, class V>
inline V rounded(const V& x) {
  if constexpr (std::is_same_v<Elem, BFloat16>) {
    const __m256i lo = _mm256_slli_epi32(bfloat16_upper_any(x.lo), 16);
    const __m256i hi = _mm256_slli_epi32(bfloat16_upper_any(x.hi), 16);
    return {_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)};
  } else if constexpr (std::is_same_v<Elem, Float16>) {
    const __m256i bits = float16_bits(x);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(bits)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
  } else {
    return x;
  }
}
template <class Elem, class V>
inline void stream_any(Elem* p, const V& x) {
  stream(p, x);
}
inline void stream_any(BFloat16* p, F32 x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits_any(x));
}

// Four blocks, one per 64-bit lane, as in simd_avx512.h.
struct PhiloxLanes {
  __m256i c0, c1, c2, c3;

  PhiloxLanes() = default;
  PhiloxLanes(const PhiloxSchedule& s, __m256i block) {
    const __m256i p1 = _mm256_mul_epu32(block, m1());
    const __m256i first_c0 = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), word(s.first_c0));
    const __m256i p0 = _mm256_mul_epu32(first_c0, m0());
    c0 = _mm256_xor_si256(p1, word(s.second_c0));
    c1 = word(s.second_c1);
    c2 = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), word(s.second_c2));
    c3 = p0;
  }
  void round(const PhiloxSchedule& s, int r) {
    const __m256i p0 = _mm256_mul_epu32(c0, m0());
    const __m256i p1 = _mm256_mul_epu32(c2, m1());
    c0 = xor3(_mm256_srli_epi64(p1, 32), c1, word(s.k0[r]));
    c1 = p1;
    c2 = xor3(_mm256_srli_epi64(p0, 32), c3, word(s.k1[r]));
    c3 = p0;
  }
  // Into keep[0] and keep[1].
  void finish(const PhiloxSchedule& s, __m256i threshold, Keep* keep) const {
    const __m256i p0 = _mm256_mul_epu32(c0, m0());
    const __m256i p1 = _mm256_mul_epu32(c2, m1());
    const __m256i w10 = xor3(p1, _mm256_slli_epi64(c1, 32), word64(s.last_k0));
    const __m256i w32 = xor3(p0, _mm256_slli_epi64(c3, 32), word64(s.last_k1));
    keep[0] = at_least(_mm256_unpacklo_epi64(w10, w32), threshold);
    keep[1] = at_least(_mm256_unpackhi_epi64(w10, w32), threshold);
  }
  static __m256i word(uint32_t w) { return _mm256_set1_epi32(static_cast<int>(w)); }

 private:
  // Two blocks, of each the words in the order 1, 0, 3, 2.
  static Keep at_least(__m256i words, __m256i threshold) {
    const __m256i rotated_order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(6, 7, 4, 5, 2, 3, 0, 1, 14, 15, 12, 13, 10, 11, 8, 9));
    const __m256i ordered = _mm256_shuffle_epi32(words, _MM_SHUFFLE(2, 3, 0, 1));
    const __m256i rotated = _mm256_shuffle_epi8(words, rotated_order);
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32(ordered, threshold), ordered);
    const __m256i kept_rotated = _mm256_cmpeq_epi32(_mm256_max_epu32(rotated, threshold), rotated);
    return {_mm256_permute2x128_si256(kept, kept_rotated, 0x20),
            _mm256_permute2x128_si256(kept, kept_rotated, 0x31)};
  }
  static __m256i xor3(__m256i a, __m256i b, __m256i c) {
    return _mm256_xor_si256(a, _mm256_xor_si256(b, c));
  }
  static __m256i word64(uint64_t w) { return _mm256_set1_epi64x(static_cast<long long>(w)); }
  static __m256i m0() { return word(kPhiloxM0); }
  static __m256i m1() { return word(kPhiloxM1); }
};

inline constexpr int kGroupsAtATime = 1;

template <int groups>
inline void keep_groups(const PhiloxSchedule& s, uint64_t block, uint32_t threshold,
                        Keep (&keep)[8 * groups]) {
  // Four sets of lanes side by side, for the latency of a round, although their state fills all 16
  // registers: on Zen 4 two sets took a fifth longer.
  constexpr int kSets = 4;
  for (int first = 0; first < 4 * groups; first += kSets) {
    const __m256i at = _mm256_set1_epi64x(static_cast<long long>(block + 4 * first));
    PhiloxLanes sets[kSets];
#pragma GCC unroll 4
    for (int i = 0; i < kSets; ++i) {
      const __m256i lanes = _mm256_setr_epi64x(4 * i, 4 * i + 2, 4 * i + 1, 4 * i + 3);
      sets[i] = PhiloxLanes(s, _mm256_add_epi64(at, lanes));
    }
#pragma GCC unroll 8
    for (int r = 2; r + 1 < kPhiloxRounds; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kSets; ++i) sets[i].round(s, r);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kSets; ++i) {
      sets[i].finish(s, PhiloxLanes::word(threshold), keep + 2 * (first + i));
    }
  }
}
