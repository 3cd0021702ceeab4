// structc tile kernel feature_1_relu: y = x W1, then relu; float32.

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

// max(x, 0), written so that NaN stays NaN.
static inline float activate(float x) { return 0.0f > x ? 0.0f : x; }

// The epilogue, in place, while the block is still in L1.
static inline void finish(float* y, int64_t ldy, int64_t rows, int64_t cols, const float* bias) {
  for (int64_t t = 0; t < rows; ++t) {
    float* row = y + t * ldy;
#pragma GCC ivdep
    for (int64_t c = 0; c < cols; ++c) row[c] = activate(row[c]);
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
  const int64_t n = s.a1 * s.c1, m = s.a1 * s.b1;
  const Units u(s.a1, s.b1);
  // Input blocks lo .. hi of a tile, features as rows.
  auto load = [&](int64_t t0, int64_t tn, int64_t lo, int64_t hi, float* xt) {
    columns(x + t0 * n + lo * s.c1, n, tn, (hi - lo) * s.c1, xt);
  };
  // A unit of the factor, from input blocks that start at block lo, transposed back into y.
  auto only = [&](int64_t t0, int64_t tn, int64_t unit, int64_t lo, const float* xt, float* z) {
    const int64_t begin = unit / u.pieces * u.group, end = least(begin + u.group, s.a1);
    const int64_t row = unit % u.pieces * u.piece, tall = least(u.piece, s.b1 - row);
    for (int64_t block = begin; block < end; ++block)
      brgemm(tall, pad, s.c1, s.c1, pad, pad, false, w1 + (block * s.b1 + row) * s.c1,
             xt + (block - lo) * s.c1 * pad, z + (block - begin) * s.b1 * pad, false);
    const int64_t from = begin * s.b1 + row, many = (end - begin - 1) * s.b1 + tall;
    transpose(z, pad, y + t0 * m + from, m, many, tn);
    finish(y + t0 * m + from, m, tn, many, nullptr);
  };
  static thread_local Scratch memory;
  const int64_t units = u.count(), room = u.group * s.c1 * pad;
  // One group of blocks of one tile: its inputs are transposed once for all pieces.
  auto serve = [&](int64_t t0, int64_t tn, int64_t group) {
    const int64_t lo = group * u.group, hi = least(lo + u.group, s.a1);
    float* xt = memory.get(room + u.room() * pad);
    load(t0, tn, lo, hi, xt);
    for (int64_t piece = 0; piece < u.pieces; ++piece)
      only(t0, tn, group * u.pieces + piece, lo, xt, xt + room);
  };
  const int64_t groups = units / u.pieces;
  if (s.split)  // few rows: the threads share the groups of blocks
    return parallel(tiles * groups, [&](int64_t task) {
      const int64_t t0 = task / groups * high;
      if (t0 < rows) serve(t0, least(high, rows - t0), task % groups);
    });
  return parallel(tiles, [&](int64_t tile) {
    const int64_t t0 = tile * high, tn = least(high, rows - t0);
    for (int64_t group = 0; tn > 0 && group < groups; ++group) serve(t0, tn, group);
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
