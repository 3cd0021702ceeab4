// structc tile kernel feature_2p_bias_gelu_tanh: y = shuffle(x W1) W2 + bias, then gelu_tanh; float32.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

// The micro-kernel C (M x N) = A (M x K) * B (K x N) [+ C], row-major, is oneDNN's JIT batch-reduce
// GEMM as PyTorch exports it. It is declared here because the header that declares it takes twenty
// seconds to compile; a self-test at load notices when it is not what we think it is.
namespace at::native::cpublas {
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C,
            const float* A, const float* B, float* C, bool is_vnni);
}
using at::native::cpublas::brgemm;

// PyTorch's own thread pool, so that torch.set_num_threads holds and no second OpenMP is loaded.
// Exceptions inside the loop come back as a nonzero result.
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t, int64_t, void*), void* context);

template <class Body>
static int32_t parallel(int64_t tasks, const Body& body) {
  return torch_parallel_for(
      0, tasks, 1,
      [](int64_t begin, int64_t end, void* context) {
        const Body& run = *static_cast<const Body*>(context);
        for (int64_t task = begin; task < end; ++task) run(task);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Ask for floats that will be read soon, one cache line after the other.
static inline void fetch(const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(from + i, 0, 2);
}

// Memory of one thread that outlives the call: a fresh allocation would fault in its pages each time.
struct Scratch {
  float* data = nullptr;
  int64_t size = 0;
  float* get(int64_t floats) {
    if (floats > size) {
      std::free(data);
      size = ceil_div(floats, 16) * 16;
      data = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
      if (!data) {
        size = 0;
        throw std::bad_alloc();
      }
    }
    return data;
  }
  ~Scratch() { std::free(data); }
};

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

// GELU by tanh: x * (1 + tanh z) / 2 = max(x, 0) - a * Q(a) with a = |x|, Q(a) = 1 / (1 + exp 2z) and
// z = sqrt(2 / pi) (a + 0.044715 a^3). Q is a polynomial in t = 2 a / 5.2 - 1 on [0, 5.2]. Error
// below 2e-7 absolute and 3e-7 relative near 0. NaN stays NaN.
static inline float activate(float x) {
  const float size = std::fabs(x), a = size > 5.2f ? 5.2f : size;
  const float t = a * (2.0f / 5.2f) - 1.0f;
  float q = -1.466390071e-03f;
  q = q * t + 8.427237209e-04f;
  q = q * t + 8.830935175e-03f;
  q = q * t - 8.301307952e-03f;
  q = q * t - 1.865974344e-02f;
  q = q * t + 2.945450163e-02f;
  q = q * t + 3.348819599e-03f;
  q = q * t - 4.034581384e-02f;
  q = q * t + 5.412482724e-02f;
  q = q * t - 2.770134792e-02f;
  q = q * t - 6.603182164e-02f;
  q = q * t + 1.577849697e-01f;
  q = q * t - 1.032460349e-01f;
  q = q * t - 9.406188712e-02f;
  q = q * t + 2.470124764e-01f;
  q = q * t - 2.323697458e-01f;
  q = q * t + 1.216046683e-01f;
  q = q * t - 3.530209295e-02f;
  q = q * t + 4.482273374e-03f;
  return (0.0f > x ? 0.0f : x) - a * q;
}

// The epilogue, in place, while the block is still in L1.
static inline void finish(float* y, int64_t ldy, int64_t rows, int64_t cols, const float* bias) {
  for (int64_t t = 0; t < rows; ++t) {
    float* row = y + t * ldy;
#pragma GCC ivdep
    for (int64_t c = 0; c < cols; ++c) row[c] = activate(row[c] + bias[c]);
  }
}

// Factor f has a_f blocks, each (b_f out, c_f in). Set by the caller, checked there.
struct Sizes {
  int64_t a1, b1, c1, a2, b2, c2, tile, panel1, panel2, split;
};

// Blocks are served in units of about 64 rows: several thin ones, or a piece of a thick one.
struct Units {
  int64_t blocks, height, group, piece, pieces;
  Units(int64_t blocks, int64_t height) : blocks(blocks), height(height) {
    group = height < 64 ? least(blocks, 64 / height) : 1;
    piece = least(height, 96);
    pieces = ceil_div(height, piece);
  }
  int64_t count() const { return ceil_div(blocks, group) * pieces; }
  int64_t room() const { return group * piece; }
};

static int32_t run(const float* x, const float* w1, const float* w2, const float* bias, float* y,
                   int64_t rows, const Sizes& s) {
  // Tiles of equal height, at most s.tile tokens: no thread waits for another's sliver.
  const int64_t tiles = ceil_div(rows, s.tile), high = ceil_div(rows, tiles);
  // Tokens of a tile in memory: whole vectors. What lies between the tokens and the end is zero
  // in x and never reaches y.
  const int64_t pad = 16 * ceil_div(high, 16);
  // Features as rows: xt[c][t] = x[t0 + t][from + c], from column "from" on.
  auto columns = [&](const float* from, int64_t ld, int64_t tn, int64_t many, float* xt) {
    transpose(from, ld, xt, pad, tn, many);
    for (int64_t c = 0; tn < pad && c < many; ++c)
      std::memset(xt + c * pad + tn, 0, (pad - tn) * sizeof(float));
  };
  const int64_t n = s.a1 * s.c1, middle = s.a1 * s.b1;
  // Input blocks are transposed a few at a time: what was just written is multiplied from L1 or L2.
  const int64_t group1 = s.c1 < 64 ? least(s.a1, 64 / s.c1) : 1, units1 = ceil_div(s.a1, group1);
  auto first = [&](int64_t t0, int64_t tn, int64_t unit, float* h, float* xt) {
    const int64_t begin = unit * group1, end = least(begin + group1, s.a1);
    columns(x + t0 * n + begin * s.c1, n, tn, (end - begin) * s.c1, xt);
    for (int64_t block = begin; block < end; ++block)
      brgemm(s.b1, pad, s.c1, s.c1, pad, s.a1 * pad, false, w1 + block * s.b1 * s.c1,
             xt + (block - begin) * s.c1 * pad, h + block * pad, false);
  };
  const int64_t m = s.a2 * s.b2;
  const Units u(s.a2, s.b2);
  // A unit of factor 2, transposed back into y and finished there.
  auto second = [&](int64_t t0, int64_t tn, int64_t unit, const float* h, float* z) {
    const int64_t begin = unit / u.pieces * u.group, end = least(begin + u.group, s.a2);
    const int64_t row = unit % u.pieces * u.piece, tall = least(u.piece, s.b2 - row);
    for (int64_t block = begin; block < end; ++block)
      brgemm(tall, pad, s.c2, s.c2, pad, pad, false, w2 + (block * s.b2 + row) * s.c2,
             h + block * s.c2 * pad, z + (block - begin) * s.b2 * pad, false);
    const int64_t from = begin * s.b2 + row, many = (end - begin - 1) * s.b2 + tall;
    transpose(z, pad, y + t0 * m + from, m, many, tn);
    finish(y + t0 * m + from, m, tn, many, bias + from);
  };
  static thread_local Scratch memory, shared;
  const int64_t room = least(s.a1, group1) * s.c1 * pad, units2 = u.count();
  if (s.split && tiles <= 16) {
    // Few rows: the threads share the blocks of each factor, and all tokens share one intermediate.
    float* h = shared.get(tiles * middle * pad);
    const int32_t failed = parallel(tiles * units1, [&](int64_t task) {
      const int64_t tile = task / units1, t0 = tile * high;
      if (t0 < rows)
        first(t0, least(high, rows - t0), task % units1, h + tile * middle * pad, memory.get(room));
    });
    if (failed) return failed;
    return parallel(tiles * units2, [&](int64_t task) {
      const int64_t tile = task / units2, t0 = tile * high;
      if (t0 < rows)
        second(t0, least(high, rows - t0), task % units2, h + tile * middle * pad,
               memory.get(u.room() * pad));
    });
  }
  return parallel(tiles, [&](int64_t tile) {
    const int64_t t0 = tile * high, tn = least(high, rows - t0);
    if (tn <= 0) return;
    float* h = memory.get((middle + u.room()) * pad + room);
    float *z = h + middle * pad, *xt = z + u.room() * pad;
    for (int64_t unit = 0; unit < units1; ++unit) first(t0, tn, unit, h, xt);
    for (int64_t unit = 0; unit < units2; ++unit) second(t0, tn, unit, h, z);
  });
}

extern "C" int32_t structc_run(const float* x, const float* w1, const float* w2, const float* bias,
                               float* y, int64_t rows, const Sizes* sizes) {
  try {
    return run(x, w1, w2, bias, y, rows, *sizes);
  } catch (...) {
    return 2;  // out of memory; an exception may not cross into C
  }
}
