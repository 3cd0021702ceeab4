// Values are bfloat16, sums are float32. Packed factors hold pairs of rows interleaved.
#include <immintrin.h>
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif
using T = uint16_t;
using Pairs = __m512bh;

static inline float widen(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
static inline Vector widen(const uint16_t* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Vector>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// To the nearest, ties to even; NaN stays NaN.
static inline void narrow(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) {
    const __m512 low = _mm512_loadu_ps(from + i), high = _mm512_loadu_ps(from + i + LANES);
    _mm512_storeu_si512(to + i, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
  for (; i < count; i += LANES) {
    const __mmask16 valid = count - i < LANES ? (1u << (count - i)) - 1u : 0xffffu;
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(valid, from + i));
    _mm256_mask_storeu_epi16(to + i, valid, reinterpret_cast<__m256i>(half));
  }
}

// Sums are no values yet.
static inline float* in_place(uint16_t*) { return nullptr; }

// Products take 32 values of a row at a time; packed factors are filled up with zeros.
static inline int64_t rounded(int64_t depth) { return ceil_div(depth, 32) * 32; }

// y (many x p) = x (p x many) transposed: pairs of rows become words, 16 x 16 words a block.
static inline void swap(int64_t p, int64_t many, const uint16_t* x, uint16_t* y) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                         7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const int64_t right = many / 16 * 16, down = p / 2 * 2;
  for (int64_t i = 0; i < down; i += 32) {
    const int64_t words = least(32, down - i) / 2;
    const __mmask16 valid = (1u << words) - 1u;
    for (int64_t g = 0; g < right; g += 16) {
      __m512i in[16], out[16];
      for (int64_t k = 0; k < 16; ++k) {
        if (k >= words) {
          in[k] = _mm512_setzero_si512();
          continue;
        }
        const uint16_t* row = x + (i + 2 * k) * many + g;
        const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
        const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + many));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
        in[k] = _mm512_permutexvar_epi16(order, both);
      }
      transpose(in, out);
      for (int64_t k = 0; k < 16; ++k) _mm512_mask_storeu_epi32(y + (g + k) * p + i, valid, out[k]);
    }
  }
  for (int64_t g = 0; g < many; ++g)
    for (int64_t i = g < right ? down : 0; i < p; ++i) y[g * p + i] = x[i * many + g];
}

// ------------------------------------------------------------------ vectors (AVX-512 BF16)

template <int HIGH, int WIDE, class Places>
static void block(const Places& places, int64_t deep, const uint16_t* A, int64_t lda, const uint16_t* B,
                  int64_t width, float* C) {
  __m512 sums[HIGH][WIDE];
  for (int i = 0; i < HIGH; ++i)
    for (int v = 0; v < WIDE; ++v) sums[i][v] = _mm512_setzero_ps();
  const int64_t padded = ceil_div(deep, 32) * 32;
  for (int64_t place = 0; place < places.count; ++place, B += padded * width) {
    const uint16_t* a = A + places[place];
    for (int64_t k = 0; k < deep; k += 2) {
      Pairs b[WIDE];
      for (int v = 0; v < WIDE; ++v)
        b[v] = reinterpret_cast<Pairs>(_mm512_loadu_si512(B + k * width + 2 * LANES * v));
      for (int i = 0; i < HIGH; ++i) {
        int32_t pair = 0;
        std::memcpy(&pair, a + i * lda + k, k + 1 < deep ? 4 : 2);
        const Pairs both = reinterpret_cast<Pairs>(_mm512_set1_epi32(pair));
        for (int v = 0; v < WIDE; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], both, b[v]);
      }
    }
  }
  for (int i = 0; i < HIGH; ++i)
    for (int v = 0; v < WIDE; ++v) _mm512_storeu_ps(C + i * width + LANES * v, sums[i][v]);
}

template <int WIDE, class Places>
static void column(int64_t rows, const Places& places, int64_t deep, const uint16_t* A, int64_t lda,
                   const uint16_t* B, int64_t width, float* C) {
  int64_t row = 0;
  for (; row + 6 <= rows; row += 6)
    block<6, WIDE>(places, deep, A + row * lda, lda, B, width, C + row * width);
  for (; row < rows; ++row)
    block<1, WIDE>(places, deep, A + row * lda, lda, B, width, C + row * width);
}

template <class Places>
static void by_vectors(int64_t rows, const Places& places, int64_t deep, const uint16_t* A, int64_t lda,
                       const uint16_t* B, int64_t width, float* C) {
  int64_t at = 0;
  for (; at + 64 <= width; at += 64) column<4>(rows, places, deep, A, lda, B + 2 * at, width, C + at);
  for (; at < width; at += 16) column<1>(rows, places, deep, A, lda, B + 2 * at, width, C + at);
}

// ------------------------------------------------------------------ tiles (AMX)

#ifdef __AMX_BF16__
// The kernel of the system saves tiles only for processes that asked for them.
static bool may_use_tiles() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
  return granted;
}

struct alignas(64) Palette {
  uint8_t id = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
static thread_local int64_t configured = 0;  // rows of both A tiles, or 0

static inline void configure(int64_t rows) {
  if (configured == rows) return;
  Palette p;
  const uint8_t upper = least(rows, 16), lower = rows - upper;
  const uint8_t high[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
  for (int i = 0; i < 8; ++i)
    if (high[i]) p.rows[i] = high[i], p.bytes[i] = 64;
  _tile_loadconfig(&p);
  configured = rows;
}
static inline void release() {
  if (configured) _tile_release();
  configured = 0;
}

// One step of 32 columns of A: sums 0 1 / 2 3 += A 4 / 5 * B 6 7. The next step's B is asked for: no
// hardware sees the rows of a tile coming, and loads of tiles wait for each other.
template <bool LOWER, bool RIGHT>
static inline void step32(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t width) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    __builtin_prefetch(b + (32 + 2 * i) * width, 0, 3);
    if (RIGHT) __builtin_prefetch(b + (32 + 2 * i) * width + 32, 0, 3);
  }
  _tile_loadd(4, a, 2 * lda);
  _tile_loadd(6, b, 4 * width);
  _tile_dpbf16ps(0, 4, 6);
  if (RIGHT) {
    _tile_loadd(7, b + 32, 4 * width);
    _tile_dpbf16ps(1, 4, 7);
  }
  if (LOWER) {
    _tile_loadd(5, a + 16 * lda, 2 * lda);
    _tile_dpbf16ps(2, 5, 6);
    if (RIGHT) _tile_dpbf16ps(3, 5, 7);
  }
}

// C (rows <= 32 x 16 or 32 columns). What is left of a place's columns is brought to 32 with zeros:
// what lies behind them in memory may be NaN, or nobody's.
template <bool LOWER, bool RIGHT, class Places>
static void tiles(int64_t rows, const Places& places, int64_t deep, const uint16_t* A, int64_t lda,
                  const uint16_t* B, int64_t width, float* C) {
  alignas(64) uint16_t edge[32 * 32];
  const __mmask32 valid = (1u << deep % 32) - 1u;
  _tile_zero(0);
  if (RIGHT) _tile_zero(1);
  if (LOWER) _tile_zero(2);
  if (LOWER && RIGHT) _tile_zero(3);
  for (int64_t place = 0; place < places.count; ++place) {
    const uint16_t* a = A + places[place];
    for (int64_t k = 0; k + 32 <= deep; k += 32, B += 32 * width)
      step32<LOWER, RIGHT>(a + k, lda, B, width);
    if (valid) {
      const uint16_t* last = a + deep / 32 * 32;
      for (int64_t i = 0; i < rows; ++i)
        _mm512_store_si512(edge + 32 * i, _mm512_maskz_loadu_epi16(valid, last + i * lda));
      step32<LOWER, RIGHT>(edge, 32, B, width);
      B += 32 * width;
    }
  }
  _tile_stored(0, C, 128);
  if (RIGHT) _tile_stored(1, C + 16, 128);
  if (LOWER) _tile_stored(2, C + 512, 128);
  if (LOWER && RIGHT) _tile_stored(3, C + 528, 128);
}

template <class Tail, class Places>
static inline void by_tiles(int64_t rows, int64_t cols, const Places& places, int64_t deep,
                            const uint16_t* A, int64_t lda, const uint16_t* B, int64_t width,
                            uint16_t* out, int64_t ldo, const float* bias) {
  alignas(64) float C[32 * 32];
  for (int64_t row = 0; row < rows; row += 32) {
    const int64_t high = least(32, rows - row);
    configure(high);
    for (int64_t at = 0; at < cols; at += 32) {
      const int64_t left = least(32, cols - at);
      const uint16_t *a = A + row * lda, *b = B + 2 * at;
      for (int64_t t = 0; t < high; ++t)  // its lines come while the tiles are busy
        __builtin_prefetch(out + (row + t) * ldo + at, 1, 3);
      if (high > 16 && left > 16) tiles<true, true>(high, places, deep, a, lda, b, width, C);
      else if (high > 16) tiles<true, false>(high, places, deep, a, lda, b, width, C);
      else if (left > 16) tiles<false, true>(high, places, deep, a, lda, b, width, C);
      else tiles<false, false>(high, places, deep, a, lda, b, width, C);
      for (int64_t t = 0; t < high; ++t)
        finish<Tail>(C + 32 * t, left, bias + at, out + (row + t) * ldo + at);
    }
  }
}
#else
static inline void release() {}
#endif

// out (rows x cols) = tail(A * B); B is packed, `width` columns in a row; columns of A lie side by side.
template <class Tail, class Places>
static inline void multiply(int64_t rows, int64_t cols, const Places& places, int64_t deep, int64_t,
                            const uint16_t* A, int64_t lda, const uint16_t* B, int64_t width,
                            uint16_t* out, int64_t ldo, const float* bias) {
#ifdef __AMX_BF16__
  if (may_use_tiles())
    return by_tiles<Tail>(rows, cols, places, deep, A, lda, B, width, out, ldo, bias);
#endif
  static thread_local Scratch memory;
  float* sums = memory.get<float>(rows * width);
  by_vectors(rows, places, deep, A, lda, B, width, sums);
  for (int64_t t = 0; t < rows; ++t) finish<Tail>(sums + t * width, cols, bias, out + t * ldo);
}
