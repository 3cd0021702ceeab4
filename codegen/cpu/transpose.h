// out[c][r] = in[r][c] for rows x cols. A tile that is 16 x 16 stays in registers.
#ifdef __AVX512F__
#include <immintrin.h>
static inline void transpose16(const float* in, int64_t ldi, float* out, int64_t ldo) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + i * ldi);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_ps(out + i * ldo, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(out + (i + 4) * ldo, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_ps(out + (i + 8) * ldo, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_ps(out + (i + 12) * ldo, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
  }
}
#else
static inline void transpose16(const float* in, int64_t ldi, float* out, int64_t ldo) {
  for (int c = 0; c < 16; ++c)
    for (int r = 0; r < 16; ++r) out[c * ldo + r] = in[r * ldi + c];
}
#endif

static void transpose(const float* in, int64_t ldi, float* out, int64_t ldo, int64_t rows,
                      int64_t cols) {
  for (int64_t c = 0; c < cols; c += 16)
    for (int64_t r = 0; r < rows; r += 16) {
      const int64_t wide = least(16, cols - c), high = least(16, rows - r);
      if (wide == 16 && high == 16) {
        transpose16(in + r * ldi + c, ldi, out + c * ldo + r, ldo);
        continue;
      }
      for (int64_t j = 0; j < wide; ++j)
        for (int64_t i = 0; i < high; ++i) out[(c + j) * ldo + r + i] = in[(r + i) * ldi + c + j];
    }
}
