// What attention needs beyond cpu/simd_portable.h. See kernel_body.h for what this defines.

inline constexpr int kTileRows32 = 4, kTilePanels32 = 1;
inline constexpr int kTileRows64 = 2, kTilePanels64 = 1;

inline F32 broadcast(const float* p) { return splat(*p, F32{}); }
inline F64 broadcast(const double* p) { return splat(*p, F64{}); }

// Without an instruction, std::fma is a call.
template <class V>
inline V multiply_add(V a, const V& b, const V& c) {
#if defined(FP_FAST_FMA) && defined(FP_FAST_FMAF)
  return fma(a, b, c);
#else
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] * b.v[i] + c.v[i];
  return a;
#endif
}
template <class V>
inline V maximum(V a, const V& b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}

inline F32 power_of_two(F32 a) {
  for (int i = 0; i < 16; ++i) a.v[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(a.v[i]) << 23);
  return a;
}
inline F64 power_of_two(F64 a) {
  for (int i = 0; i < 16; ++i) {
    a.v[i] = std::bit_cast<double>(std::bit_cast<uint64_t>(a.v[i]) << 52);
  }
  return a;
}

template <class V>
inline V zero_where_less(const V& a, const V& b, V x) {
  for (int i = 0; i < 16; ++i) x.v[i] = a.v[i] < b.v[i] ? 0 : x.v[i];
  return x;
}
template <class V>
inline V keep_or_zero(const Keep& k, V x) {
  for (int i = 0; i < 16; ++i) x.v[i] = k.lane[i] != 0 ? x.v[i] : 0;
  return x;
}

template <class T>
inline void transpose_16x16(const T* from, T* to) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to[j * 16 + i] = from[i * 16 + j];
  }
}
