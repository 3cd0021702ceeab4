// Values and sums are float32.
using T = float;
static inline void release() {}
static inline float widen(float v) { return v; }
static inline Vector widen(const float* from) { return *reinterpret_cast<const Vector*>(from); }
static inline void narrow(const float* from, int64_t count, float* to) {
  if (to != from) std::memcpy(to, from, count * sizeof(float));
}
// Where sums may be stored that are already values.
static inline float* in_place(float* to) { return to; }
static inline int64_t rounded(int64_t depth) { return depth; }

// y (many x p) = x (p x many) transposed.
static inline void swap(int64_t p, int64_t many, const float* x, float* y) {
  for (int64_t g = 0; g < many; ++g)
    for (int64_t i = 0; i < p; ++i) y[g * p + i] = x[i * many + g];
}

// C (HIGH x WIDE vectors) = sum over the places of A * B: sums stay in registers. At each place of A
// `deep` columns are taken, `step` apart.
template <int HIGH, int WIDE, class Places>
static void block(const Places& places, int64_t deep, int64_t step, const float* A, int64_t lda,
                  const float* B, int64_t width, float* C, int64_t ldc) {
  Vector sums[HIGH][WIDE] = {};
#pragma GCC unroll 16
  for (int i = 0; i < HIGH; ++i)  // C is written in the end: its lines come meanwhile
#pragma GCC unroll 8
    for (int v = 0; v < WIDE; ++v) __builtin_prefetch(C + i * ldc + LANES * v, 1, 3);
  for (int64_t place = 0; place < places.count; ++place) {
    const float* a = A + places[place];
    for (int64_t k = 0; k < deep; ++k, a += step, B += width) {
      Vector b[WIDE];
#pragma GCC unroll 8
      for (int v = 0; v < WIDE; ++v) {
        b[v] = *reinterpret_cast<const Vector*>(B + LANES * v);
        __builtin_prefetch(B + 8 * width + LANES * v, 0, 3);
      }
#pragma GCC unroll 16
      for (int i = 0; i < HIGH; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < WIDE; ++v) sums[i][v] += a[i * lda] * b[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < HIGH; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < WIDE; ++v) *reinterpret_cast<Vector*>(C + i * ldc + LANES * v) = sums[i][v];
}

// As many vectors in a row as there are registers for: 24 sums of 32, or 12 of 16.
constexpr int WIDEST = LANES == 16 ? 4 : 2;
constexpr int HIGHEST[] = {0, LANES == 16 ? 12 : 8, LANES == 16 ? 12 : 6, 8, 6};

template <int HIGH, int WIDE, class Places>
static inline int64_t blocks(int64_t row, int64_t rows, const Places& places, int64_t deep,
                             int64_t step, const float* A, int64_t lda, const float* B,
                             int64_t width, float* C, int64_t ldc) {
  for (; row + HIGH <= rows; row += HIGH)
    block<HIGH, WIDE>(places, deep, step, A + row * lda, lda, B, width, C + row * ldc, ldc);
  return row;
}

template <int WIDE, class Places>
static void column(int64_t rows, const Places& places, int64_t deep, int64_t step, const float* A,
                   int64_t lda, const float* B, int64_t width, float* C, int64_t ldc) {
  int64_t row = blocks<HIGHEST[WIDE], WIDE>(0, rows, places, deep, step, A, lda, B, width, C, ldc);
  row = blocks<4, WIDE>(row, rows, places, deep, step, A, lda, B, width, C, ldc);
  row = blocks<2, WIDE>(row, rows, places, deep, step, A, lda, B, width, C, ldc);
  blocks<1, WIDE>(row, rows, places, deep, step, A, lda, B, width, C, ldc);
}

// out (rows x cols) = tail(A * B); B is packed, `width` columns in a row.
template <class Tail, class Places>
static inline void multiply(int64_t rows, int64_t cols, const Places& places, int64_t deep,
                            int64_t step, const float* A, int64_t lda, const float* B,
                            int64_t width, float* out, int64_t ldo, const float* bias) {
  static thread_local Scratch memory;
  for (int64_t at = 0; at < cols;) {
    const int64_t vectors = ceil_div(cols - at, LANES);
    const int64_t wide = ceil_div(vectors, ceil_div(vectors, WIDEST));
    const int64_t left = least(wide * LANES, cols - at);
    const bool edge = left < wide * LANES;  // the last vector reaches past the columns
    float* C = edge ? memory.get<float>(rows * wide * LANES) : out + at;
    const int64_t ldc = edge ? wide * LANES : ldo;
    switch (wide) {
      case 1: column<1>(rows, places, deep, step, A, lda, B + at, width, C, ldc); break;
      case 2: column<2>(rows, places, deep, step, A, lda, B + at, width, C, ldc); break;
#ifdef __AVX512F__
      case 3: column<3>(rows, places, deep, step, A, lda, B + at, width, C, ldc); break;
      case 4: column<4>(rows, places, deep, step, A, lda, B + at, width, C, ldc); break;
#endif
    }
    if (edge || Tail::any)
      for (int64_t t = 0; t < rows; ++t)
        finish<Tail>(C + t * ldc, left, bias + at, out + t * ldo + at);
    at += left;
  }
}
