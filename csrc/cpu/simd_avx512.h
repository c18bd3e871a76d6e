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

inline F32 splat(double x, F32) { return {_mm512_set1_ps(static_cast<float>(x))}; }
inline F64 splat(double x, F64) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }

inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F64 load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
inline F32 load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// The order of 16-bit lanes that moves lane i to lane 2 i + 1, and back: one permutation instead of
// a conversion and a shift.
struct HalfOrder {
  alignas(64) uint16_t widen[32], narrow[32];
};
constexpr HalfOrder half_order() {
  HalfOrder order{};
  for (int i = 0; i < 32; ++i) {
    order.widen[i] = static_cast<uint16_t>(i / 2);
    order.narrow[i] = static_cast<uint16_t>((2 * i + 1) % 32);
  }
  return order;
}
inline constexpr HalfOrder kHalfOrder = half_order();

inline F32 load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m512i order = _mm512_load_si512(kHalfOrder.widen);
  return {_mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xAAAAAAAA, order, _mm512_castsi256_si512(half)))};
}
inline __m256i upper_halves(__m512i x) {
  const __m512i order = _mm512_load_si512(kHalfOrder.narrow);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(order, x));
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
inline __m256i bfloat16_bits(F32 x) { return upper_halves(round_to_upper_half(x.v)); }
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
// Inlined early: a call of a function that does nothing else is taken for one without effect.
__attribute__((always_inline)) inline void prefetch(uintptr_t address) {
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
}

inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) {
  return {_mm512_fmadd_pd(a.lo, b.lo, c.lo), _mm512_fmadd_pd(a.hi, b.hi, c.hi)};
}

inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F64 operator+(F64 a, F64 b) {
  return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)};
}
inline F64 operator-(F64 a, F64 b) {
  return {_mm512_sub_pd(a.lo, b.lo), _mm512_sub_pd(a.hi, b.hi)};
}
inline F64 operator*(F64 a, F64 b) {
  return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)};
}

// Lane i with lane i + 8, then with i + 4, i + 2 and i + 1, as in all variants.
inline float sum_lanes(__m128 x) {
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline double sum_lanes(__m256d x) {
  const __m128d y = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
  return _mm_cvtsd_f64(_mm_add_sd(y, _mm_unpackhi_pd(y, y)));
}
inline float sum_lanes(F32 x) {
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  return sum_lanes(_mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
}
inline double sum_lanes(F64 x) {
  const __m512d y = _mm512_add_pd(x.lo, x.hi);
  return sum_lanes(_mm256_add_pd(_mm512_castpd512_pd256(y), _mm512_extractf64x4_pd(y, 1)));
}

inline F32 absolute(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline F32 if_greater(F32 a, F32 b, F32 x, F32 y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), x.v)};
}
inline F32 shift_exponent(F32 a, F32 r) {
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_castps_si512(r.v), 23)))};
}

inline F32 mul_or_zero(Keep k, F32 a, F32 b) { return {_mm512_maskz_mul_ps(k.mask, a.v, b.v)}; }
inline F64 mul_or_zero(Keep k, F64 a, F64 b) {
  return {_mm512_maskz_mul_pd(static_cast<__mmask8>(k.mask), a.lo, b.lo),
          _mm512_maskz_mul_pd(static_cast<__mmask8>(k.mask >> 8), a.hi, b.hi)};
}
inline F32 select(Keep k, F32 kept, F32 dropped) {
  return {_mm512_mask_mov_ps(dropped.v, k.mask, kept.v)};
}
inline F64 select(Keep k, F64 kept, F64 dropped) {
  return {_mm512_mask_mov_pd(dropped.lo, static_cast<__mmask8>(k.mask), kept.lo),
          _mm512_mask_mov_pd(dropped.hi, static_cast<__mmask8>(k.mask >> 8), kept.hi)};
}

// Results of arithmetic on values of any origin: as bfloat16, a NaN whose lowest bits are set would
// carry into its exponent. Not rounded, it stays one, since arithmetic has made it quiet.
template <class Elem, class V>
inline void store_any(Elem* p, const V& x) {
  store(p, x);
}
__attribute__((always_inline)) inline __m512i round_any(F32 x) {
  const __mmask16 number = _mm512_cmp_ps_mask(x.v, x.v, _CMP_ORD_Q);
  const __m512i u = _mm512_castps_si512(x.v);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, u, _mm512_set1_epi32(0x10000));
  const __m512i down = _mm512_mask_add_epi32(u, number, u, _mm512_set1_epi32(0x7FFF));
  return _mm512_mask_add_epi32(down, odd, down, _mm512_set1_epi32(1));
}
__attribute__((always_inline)) inline __m256i bfloat16_bits_any(F32 x) {
  return upper_halves(round_any(x));
}
// What loading it after store_any would give.
template <class Elem, class V>
inline V rounded(const V& x) {
  if constexpr (std::is_same_v<Elem, BFloat16>) {
    return {_mm512_castsi512_ps(_mm512_and_si512(round_any(x), _mm512_set1_epi32(~0xFFFF)))};
  } else if constexpr (std::is_same_v<Elem, Float16>) {
    return {_mm512_cvtph_ps(float16_bits(x))};
  } else {
    return x;
  }
}
__attribute__((always_inline)) inline void store_any(BFloat16* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits_any(x));
}
template <class Elem, class V>
inline void stream_any(Elem* p, const V& x) {
  stream(p, x);
}
inline void stream_any(BFloat16* p, F32 x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits_any(x));
}

// Where the 16-bit lanes of a vector of decisions come from: two blocks out of four, whose
// words lie in the order 1, 0, 3, 2; each block's words, then the same rotated.
struct WordOrder {
  alignas(64) uint16_t source[2][32];
};
constexpr WordOrder word_order() {
  WordOrder order{};
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 32; ++i) {
      const int block = 2 * half + i / 16, word = i / 2 % 4, rotated = i / 8 % 2;
      order.source[half][i] = static_cast<uint16_t>(8 * block + 2 * (word ^ 1) + (i % 2 ^ rotated));
    }
  }
  return order;
}
inline constexpr WordOrder kWordOrder = word_order();

// Eight blocks, one per 64-bit lane. Only the low half of a lane counts: _mm512_mul_epu32 reads no
// more, so neither the products' upper halves in c1 and c3 nor what they leave in c0 and c2 need
// clearing, and a round is two multiplies, two shifts and two three-way xors.
struct PhiloxLanes {
  __m512i c0, c1, c2, c3;

  PhiloxLanes() = default;
  // After two rounds. Of `block`, only the low halves count.
  PhiloxLanes(const PhiloxSchedule& s, __m512i block) {
    const __m512i p1 = _mm512_mul_epu32(block, m1());
    const __m512i first_c0 = _mm512_xor_si512(_mm512_srli_epi64(p1, 32), word(s.first_c0));
    const __m512i p0 = _mm512_mul_epu32(first_c0, m0());
    c0 = _mm512_xor_si512(p1, word(s.second_c0));
    c1 = word(s.second_c1);
    c2 = _mm512_xor_si512(_mm512_srli_epi64(p0, 32), word(s.second_c2));
    c3 = p0;
  }
  void round(const PhiloxSchedule& s, int r) {
    const __m512i p0 = _mm512_mul_epu32(c0, m0());
    const __m512i p1 = _mm512_mul_epu32(c2, m1());
    c0 = xor3(_mm512_srli_epi64(p1, 32), c1, word(s.k0[r]));
    c1 = p1;
    c2 = xor3(_mm512_srli_epi64(p0, 32), c3, word(s.k1[r]));
    c3 = p0;
  }
  // The last round and the comparison, into keep[0] to keep[3]. A product already holds two words
  // side by side, but for what is xored to its upper half: (w1, w0) and (w3, w2). One permutation
  // of 16-bit lanes then puts two blocks in order, their words and their words rotated.
  void finish(const PhiloxSchedule& s, __m512i threshold, Keep* keep) const {
    const __m512i p0 = _mm512_mul_epu32(c0, m0());
    const __m512i p1 = _mm512_mul_epu32(c2, m1());
    const __m512i w10 = xor3(p1, _mm512_slli_epi64(c1, 32), word64(s.last_k0));
    const __m512i w32 = xor3(p0, _mm512_slli_epi64(c3, 32), word64(s.last_k1));
    const __m512i even = _mm512_unpacklo_epi64(w10, w32), odd = _mm512_unpackhi_epi64(w10, w32);
    keep[0] = at_least(even, 0, threshold);
    keep[1] = at_least(even, 1, threshold);
    keep[2] = at_least(odd, 0, threshold);
    keep[3] = at_least(odd, 1, threshold);
  }

 private:
  static Keep at_least(__m512i words, int half, __m512i threshold) {
    const __m512i order = _mm512_load_si512(kWordOrder.source[half]);
    const __m512i ordered = _mm512_permutexvar_epi16(order, words);
    return {_mm512_cmpge_epu32_mask(ordered, threshold)};
  }
  static __m512i xor3(__m512i a, __m512i b, __m512i c) {
    return _mm512_ternarylogic_epi32(a, b, c, 0x96);
  }
  static __m512i word(uint32_t w) { return _mm512_set1_epi32(static_cast<int>(w)); }
  static __m512i word64(uint64_t w) { return _mm512_set1_epi64(static_cast<long long>(w)); }
  static __m512i m0() { return word(kPhiloxM0); }
  static __m512i m1() { return word(kPhiloxM1); }
};

// A round waits for the one before: two groups, four sets of lanes side by side, hide that. On Zen
// 4 one group at a time took a fifth longer.
inline constexpr int kGroupsAtATime = 2;

template <int groups>
inline void keep_groups(const PhiloxSchedule& s, uint64_t block, uint32_t threshold,
                        Keep (&keep)[8 * groups]) {
  constexpr int kSets = 2 * groups;
  PhiloxLanes sets[kSets];
#pragma GCC unroll 4
  for (int i = 0; i < kSets; ++i) {
    // As finish() takes them: the blocks of even lanes before those of odd ones.
    const __m512i lanes = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i first = _mm512_set1_epi64(static_cast<long long>(block + 8 * i));
    sets[i] = PhiloxLanes(s, _mm512_add_epi64(first, lanes));
  }
#pragma GCC unroll 8
  for (int r = 2; r + 1 < kPhiloxRounds; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kSets; ++i) sets[i].round(s, r);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kSets; ++i) {
    sets[i].finish(s, _mm512_set1_epi32(static_cast<int>(threshold)), keep + 4 * i);
  }
}
