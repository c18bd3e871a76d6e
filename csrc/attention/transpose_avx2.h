// 16 x 16 by AVX2, for the sets that have it.

inline void transpose_8x8(const float* from, float* to) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * kLanes);
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * kLanes, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * kLanes, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
inline void transpose_16x16(const float* from, float* to) {
  for (int i = 0; i < kLanes; i += 8) {
    for (int j = 0; j < kLanes; j += 8) transpose_8x8(from + i * kLanes + j, to + j * kLanes + i);
  }
}
inline void transpose_16x16(const double* from, double* to) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) to[j * kLanes + i] = from[i * kLanes + j];
  }
}
