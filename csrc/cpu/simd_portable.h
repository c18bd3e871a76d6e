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
inline V splat(double x) {
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
inline V mul(V a, const V& b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
template <class V>
inline V fma(V a, const V& b, const V& c) {
  for (int i = 0; i < 16; ++i) a.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
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
template <class V>
inline V keep_or_zero(const Keep& k, const V& x) {
  return select(k, x, V{});
}

inline void keep_group(const PhiloxSchedule& s, uint64_t block, uint32_t threshold,
                       Keep (&keep)[8]) {
  for (int b = 0; b < 16; ++b, ++block) {
    const uint64_t first = static_cast<uint64_t>(kPhiloxM1) * lo32(block);
    uint32_t c0 = hi32(first) ^ s.first_c0, c1 = lo32(first);
    uint32_t c2 = (hi32(block) & kBlockHighMask) ^ s.first_c2, c3 = s.first_c3;
    for (int r = 1; r < kPhiloxRounds; ++r) {
      const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
      const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
      c0 = hi32(p1) ^ c1 ^ s.k0[r], c1 = lo32(p1);
      c2 = hi32(p0) ^ c3 ^ s.k1[r], c3 = lo32(p0);
    }
    const PhiloxWords words{{c0, c1, c2, c3}};
    uint32_t* lane = keep[b / 2].lane + b % 2 * 8;
    for (int i = 0; i < 8; ++i) lane[i] = -static_cast<uint32_t>(lane_word(words, i) >= threshold);
  }
}
