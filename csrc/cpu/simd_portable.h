// Plain C++ for every other CPU. See kernel_body.h for what this defines.

struct Keep {
  uint32_t lane[16];  // all ones where kept
};

inline Keep keep_from_bits(uint16_t bits) {
  Keep k;
  for (int i = 0; i < 16; ++i) k.lane[i] = -(bits >> i & 1u);
  return k;
}
inline uint16_t keep_to_bits(const Keep& k) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= (k.lane[i] & 1) << i;
  return static_cast<uint16_t>(bits);
}
inline void store_bytes(uint8_t* out, const Keep& k) {
  for (int i = 0; i < 16; ++i) out[i] = k.lane[i] & 1;
}

struct F32 {
  float v[16];
};
struct F64 {
  double v[16];
};

template <class V>
inline V splat(double x, V) {
  V r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<std::remove_reference_t<decltype(r.v[0])>>(x);
  return r;
}

inline F32 load(const float* p) {
  F32 r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline F64 load(const double* p) {
  F64 r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline F32 load(const Float16* p) {
  F32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = to_float(p[i]);
  return r;
}
inline F32 load(const BFloat16* p) {
  F32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = to_float(p[i]);
  return r;
}
inline void store(float* p, const F32& x) { std::memcpy(p, x.v, sizeof(x.v)); }
inline void store(double* p, const F64& x) { std::memcpy(p, x.v, sizeof(x.v)); }
inline void store(Float16* p, const F32& x) {
  for (int i = 0; i < 16; ++i) p[i] = to_float16(x.v[i]);
}
inline void store(BFloat16* p, const F32& x) {
  for (int i = 0; i < 16; ++i) p[i] = to_bfloat16(x.v[i]);
}

template <class Elem, class V>
inline void stream(Elem* p, const V& x) {
  store(p, x);
}
template <class Elem>
inline constexpr bool kHasPair = false;

inline void fence() {}
inline void prefetch(uintptr_t) {}

template <class V>
inline V fma(V a, const V& b, const V& c) {
  for (int i = 0; i < 16; ++i) a.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
  return a;
}

template <class V>
inline V operator+(V a, const V& b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
template <class V>
inline V operator-(V a, const V& b) {
  for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
  return a;
}
template <class V>
inline V operator*(V a, const V& b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
inline F32 operator/(F32 a, const F32& b) {
  for (int i = 0; i < 16; ++i) a.v[i] /= b.v[i];
  return a;
}

// As in simd_avx512.h.
template <class V>
inline double sum_lanes(V x) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x.v[i] += x.v[i + width];
  }
  return x.v[0];
}

inline F32 absolute(F32 a) {
  for (int i = 0; i < 16; ++i) a.v[i] = std::fabs(a.v[i]);
  return a;
}
inline F32 if_greater(const F32& a, const F32& b, F32 x, const F32& y) {
  for (int i = 0; i < 16; ++i) x.v[i] = a.v[i] > b.v[i] ? x.v[i] : y.v[i];
  return x;
}
inline F32 shift_exponent(F32 a, const F32& r) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(a.v[i]) + (std::bit_cast<uint32_t>(r.v[i]) << 23);
    a.v[i] = std::bit_cast<float>(bits);
  }
  return a;
}

inline F32 select(const Keep& k, F32 kept, const F32& dropped) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t a = std::bit_cast<uint32_t>(kept.v[i]);
    const uint32_t b = std::bit_cast<uint32_t>(dropped.v[i]);
    kept.v[i] = std::bit_cast<float>((a & k.lane[i]) | (b & ~k.lane[i]));
  }
  return kept;
}
inline F64 select(const Keep& k, F64 kept, const F64& dropped) {
  for (int i = 0; i < 16; ++i) kept.v[i] = k.lane[i] ? kept.v[i] : dropped.v[i];
  return kept;
}
inline F32 mul_or_zero(const Keep& k, F32 a, const F32& b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  for (int i = 0; i < 16; ++i) {
    a.v[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(a.v[i]) & k.lane[i]);
  }
  return a;
}
inline F64 mul_or_zero(const Keep& k, const F64& a, const F64& b) {
  F64 r;
  for (int i = 0; i < 16; ++i) r.v[i] = k.lane[i] ? a.v[i] * b.v[i] : 0;
  return r;
}

template <class Elem, class V>
inline void store_any(Elem* p, const V& x) {
  store(p, x);
}
// What loading it after store_any would give.
template <class Elem, class V>
inline V rounded(const V& x) {
  Elem stored[16];
  store_any(stored, x);
  return load(stored);
}
template <class Elem, class V>
inline void stream_any(Elem* p, const V& x) {
  store(p, x);
}

inline constexpr int kGroupsAtATime = 1;

template <int groups>
inline void keep_groups(const PhiloxSchedule& s, uint64_t block, uint32_t threshold,
                        Keep (&keep)[8 * groups]) {
  // Blocks side by side, because a round waits for the one before; more need too many registers.
  constexpr int kSide = 4;
  for (int first = 0; first < 16 * groups; first += kSide) {
    uint32_t c0[kSide], c1[kSide], c2[kSide], c3[kSide];
    for (int i = 0; i < kSide; ++i) {
      const uint64_t p1 = mul_wide(kPhiloxM1, lo32(block) + first + i);
      const uint64_t p0 = mul_wide(kPhiloxM0, hi32(p1) ^ s.first_c0);
      c0[i] = lo32(p1) ^ s.second_c0, c1[i] = s.second_c1;
      c2[i] = hi32(p0) ^ s.second_c2, c3[i] = lo32(p0);
    }
    for (int r = 2; r < kPhiloxRounds; ++r) {
      for (int i = 0; i < kSide; ++i) {
        const uint64_t p0 = mul_wide(kPhiloxM0, c0[i]);
        const uint64_t p1 = mul_wide(kPhiloxM1, c2[i]);
        c0[i] = hi32(p1) ^ c1[i] ^ s.k0[r], c1[i] = lo32(p1);
        c2[i] = hi32(p0) ^ c3[i] ^ s.k1[r], c3[i] = lo32(p0);
      }
    }
    for (int i = 0; i < kSide; ++i) {
      uint32_t* lane = keep[(first + i) / 2].lane + (first + i) % 2 * 8;
      lane[0] = c0[i], lane[1] = c1[i], lane[2] = c2[i], lane[3] = c3[i];
    }
  }
  // On their own, for compilers to make SIMD code of.
  for (int v = 0; v < 8 * groups; ++v) {
    for (int half = 0; half < 16; half += 8) {
      uint32_t* lane = keep[v].lane + half;
      for (int l = 0; l < 4; ++l) lane[l + 4] = lane[l] << 16 | lane[l] >> 16;
      for (int l = 0; l < 8; ++l) lane[l] = -static_cast<uint32_t>(lane[l] >= threshold);
    }
  }
}
