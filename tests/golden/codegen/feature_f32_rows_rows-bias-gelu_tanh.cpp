// structc tile kernel feature_f32_rows_rows-bias-gelu_tanh

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

// PyTorch's own thread pool, so that torch.set_num_threads holds and no second OpenMP is loaded.
// Exceptions inside the loop come back as a nonzero result.
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t, int64_t, void*), void* context);

static inline void release();  // what a thread does when its share of the work is done

template <class Body>
static int32_t parallel(int64_t tasks, const Body& body) {
  return torch_parallel_for(
      0, tasks, 1,
      [](int64_t begin, int64_t end, void* context) {
        const Body& run = *static_cast<const Body*>(context);
        for (int64_t task = begin; task < end; ++task) run(task);
        release();
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Ask for bytes that will be read soon, one cache line after the other.
static inline void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

// Memory of one thread that outlives the call: a fresh allocation would fault in its pages each time.
struct Scratch {
  void* data = nullptr;
  int64_t size = 0;
  template <class Value>
  Value* get(int64_t values) {
    const int64_t bytes = values * static_cast<int64_t>(sizeof(Value));
    if (bytes > size) {
      std::free(data);
      size = ceil_div(bytes, 64) * 64;
      data = std::aligned_alloc(64, size);
      if (!data) {
        size = 0;
        throw std::bad_alloc();
      }
    }
    return static_cast<Value*>(data);
  }
  ~Scratch() { std::free(data); }
};

// One block factor I_a (x) 1_{b x c} (x) I_d. `parts`: into how many equal pieces each block's output
// is cut, one for each group of a next factor that reads through a shuffle; `group` is that factor's c;
// `shuffle` says whether a shuffle stands behind this one. `add` is the input that is added to its
// output, or -1; gain, shift and eps are of a normalisation.
struct Stage {
  int64_t a, b, c, d, panel, parts, shuffle, add, group;
  const void* w;
  const float *bias, *gain, *shift;
  float eps;
  int64_t in() const { return a * c * d; }
  int64_t out() const { return a * b * d; }
};

// What a call hands over: sizes are tile, split, then a, b, c, d, panel, parts, shuffle, add and the bits
// of eps of each stage; weights are the packed factor, bias, gain and shift (or null) of each stage.
template <int N>
struct Chain {
  int64_t tile, split;
  Stage stage[N];
  Chain(const int64_t* sizes, const void* const* weights) : tile(sizes[0]), split(sizes[1]) {
    for (int i = 0; i < N; ++i) {
      const int64_t* s = sizes + 2 + 9 * i;
      auto vector = [&](int at) { return static_cast<const float*>(weights[4 * i + at]); };
      const int32_t bits = static_cast<int32_t>(s[8]);
      float eps;
      std::memcpy(&eps, &bits, sizeof eps);
      stage[i] = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], 0, weights[4 * i],
                  vector(1), vector(2), vector(3), eps};
      if (i) stage[i - 1].group = s[2];
    }
  }
  // Features between the factors: the widest of those that share a buffer.
  int64_t room(int parity) const {
    int64_t most = 0;
    for (int i = parity; i + 1 < N; i += 2) most = stage[i].out() > most ? stage[i].out() : most;
    return most;
  }
};

// Everything is float32. The micro-kernel C (M x N) = A (M x K) * B (K x N), row-major, is oneDNN's
// JIT batch-reduce GEMM as PyTorch exports it. It is declared here because the header that declares it
// takes twenty seconds to compile; a self-test at load notices when it is not what we think it is.
using T = float;
namespace at::native::cpublas {
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C,
            const float* A, const float* B, float* C, bool is_vnni);
}
using at::native::cpublas::brgemm;
static inline void release() {}

static inline float widen(float v) { return v; }
static inline void narrow(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, count * sizeof(float));
}

// The epilogue, in place, while the block is still in L1.
template <class Tail>
static inline void finish(float* y, int64_t ldy, int64_t rows, int64_t cols, const float* bias) {
  if (!Tail::any) return;
  for (int64_t t = 0; t < rows; ++t) {
    float* row = y + t * ldy;
#pragma GCC ivdep
    for (int64_t c = 0; c < cols; ++c) row[c] = Tail::apply(Tail::bias ? row[c] + bias[c] : row[c]);
  }
}

// out (rows x cols) = tail(A (rows x k) * B (k x width, packed)).
template <class Tail>
static inline void multiply(int64_t rows, int64_t cols, int64_t k, const float* A, int64_t lda,
                            const float* B, int64_t width, float* out, int64_t ldo,
                            const float* bias) {
  brgemm(rows, cols, k, lda, width, ldo, false, A, B, out, false);
  finish<Tail>(out, ldo, rows, cols, bias);
}

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

// A tile of tokens is transposed in registers: features become rows, tokens columns. Factors are the A
// operand, stored (a, d, b, c). A permutation is then a stride and narrow blocks still fill vectors,
// which run along tokens.

// Blocks of the last factor are served in units of about 64 rows: several thin ones, or a piece of a
// thick one; with d > 1 a unit is one alpha.
struct Units {
  int64_t group, piece, pieces, count;
  explicit Units(const Stage& f) {
    const int64_t height = f.b * f.d;
    group = height < 64 ? least(f.a, 64 / height) : 1;
    piece = f.d > 1 ? height : least(height, 96);
    pieces = ceil_div(height, piece);
    count = ceil_div(f.a, group) * pieces;
  }
  int64_t room() const { return group * piece; }
};

// Blocks begin .. end of a factor: h from xt, whose first row is the first input of block `from`. Behind
// a shuffle output beta of block alpha is row beta * a + alpha.
static inline void blocks(const Stage& f, int64_t begin, int64_t end, int64_t from, const float* xt,
                          int64_t pad, float* h) {
  const float* w = static_cast<const float*>(f.w);
  for (int64_t block = begin; block < end; ++block)
    for (int64_t de = 0; de < f.d; ++de) {
      const int64_t row = f.shuffle ? block : block * f.b * f.d + de;
      brgemm(f.b, pad, f.c, f.c, f.d * pad, (f.shuffle ? f.a : f.d) * pad, false,
             w + (block * f.d + de) * f.b * f.c, xt + ((block - from) * f.c * f.d + de) * pad,
             h + row * pad, false);
    }
}

template <int N>
struct Feature {
  const Chain<N>& f;
  const float* x;
  float* y;
  int64_t rows, tiles, high, pad, group;

  Feature(const Chain<N>& f, const float* x, float* y, int64_t rows) : f(f), x(x), y(y), rows(rows) {
    // Tiles of equal height; in memory whole vectors of tokens. What lies between the tokens and the
    // end is zero in x and never reaches y.
    tiles = ceil_div(rows, f.tile);
    high = ceil_div(rows, tiles);
    pad = 16 * ceil_div(high, 16);
    // Input blocks are transposed a few at a time: what was just written is multiplied from L1 or L2.
    const int64_t height = f.stage[0].c * f.stage[0].d;
    group = height < 64 ? least(f.stage[0].a, 64 / height) : 1;
  }
  int64_t room_in() const { return group * f.stage[0].c * f.stage[0].d * pad; }
  int64_t units(int i) const {
    const Stage& s = f.stage[i];
    return i == N - 1 ? Units(s).count : i == 0 ? ceil_div(s.a, group) : s.a;
  }

  // Input blocks begin .. end of a tile, features as rows.
  void load(int64_t t0, int64_t tn, int64_t begin, int64_t end, float* xt) const {
    const int64_t n = f.stage[0].in(), wide = f.stage[0].c * f.stage[0].d, many = (end - begin) * wide;
    transpose(x + t0 * n + begin * wide, n, xt, pad, tn, many);
    for (int64_t c = 0; tn < pad && c < many; ++c)
      std::memset(xt + c * pad + tn, 0, (pad - tn) * sizeof(float));
  }

  // A unit of any stage but the last.
  void inner(int i, int64_t t0, int64_t tn, int64_t unit, const float* in, float* h, float* xt) const {
    const Stage& s = f.stage[i];
    if (i) return blocks(s, unit, unit + 1, 0, in, pad, h);
    const int64_t begin = unit * group, end = least(begin + group, s.a);
    load(t0, tn, begin, end, xt);
    blocks(s, begin, end, begin, xt, pad, h);
  }

  // A unit of the last stage from rows `in` (of block `from` on), transposed back into y and finished.
  template <class Tail>
  void last(int64_t t0, int64_t tn, int64_t unit, int64_t from, const float* in, float* z) const {
    const Stage& s = f.stage[N - 1];
    const Units u(s);
    const int64_t begin = unit / u.pieces * u.group, end = least(begin + u.group, s.a);
    const int64_t row = unit % u.pieces * u.piece, tall = least(u.piece, s.b * s.d - row);
    const float* w = static_cast<const float*>(s.w);
    for (int64_t block = begin; block < end; ++block)
      for (int64_t de = 0; de < s.d; ++de)
        brgemm(s.d > 1 ? s.b : tall, pad, s.c, s.c, s.d * pad, s.d * pad, false,
               w + ((block * s.d + de) * s.b + row) * s.c,
               in + ((block - from) * s.c * s.d + de) * pad,
               z + ((block - begin) * s.b * s.d + de) * pad, false);
    const int64_t m = s.out(), to = begin * s.b * s.d + row, many = (end - begin - 1) * s.b * s.d + tall;
    transpose(z, pad, y + t0 * m + to, m, many, tn);
    finish<Tail>(y + t0 * m + to, m, tn, many, s.bias + to);
  }
};

template <class Tail>
static int32_t run(const Chain<1>& f, const float* x, float* y, int64_t rows) {
  static thread_local Scratch memory;
  const Feature<1> g(f, x, y, rows);
  const Stage& s = f.stage[0];
  const Units u(s);
  // One group of blocks of one tile: its inputs are transposed once for all pieces.
  auto serve = [&](int64_t t0, int64_t tn, int64_t at) {
    const int64_t begin = at * u.group, end = least(begin + u.group, s.a);
    const int64_t room = u.group * s.c * s.d * g.pad;
    float* xt = memory.get<float>(room + u.room() * g.pad);
    g.load(t0, tn, begin, end, xt);
    for (int64_t piece = 0; piece < u.pieces; ++piece)
      g.template last<Tail>(t0, tn, at * u.pieces + piece, begin, xt, xt + room);
  };
  const int64_t groups = u.count / u.pieces;
  if (f.split)  // few rows: the threads share the groups of blocks
    return parallel(g.tiles * groups, [&](int64_t task) {
      const int64_t t0 = task / groups * g.high;
      if (t0 < rows) serve(t0, least(g.high, rows - t0), task % groups);
    });
  return parallel(g.tiles, [&](int64_t tile) {
    const int64_t t0 = tile * g.high, tn = least(g.high, rows - t0);
    for (int64_t at = 0; tn > 0 && at < groups; ++at) serve(t0, tn, at);
  });
}

template <class Tail, int N>
static int32_t run(const Chain<N>& f, const float* x, float* y, int64_t rows) {
  static thread_local Scratch memory, shared;
  const Feature<N> g(f, x, y, rows);
  const int64_t out = Units(f.stage[N - 1]).room() * g.pad, in = g.room_in();
  const int64_t room[2] = {f.room(0) * g.pad, f.room(1) * g.pad};
  if (f.split && g.tiles <= 16) {
    // Few rows: the threads share the units of each factor, and all tokens share the intermediates.
    float* h[2] = {shared.get<float>(g.tiles * (room[0] + room[1])), nullptr};
    h[1] = h[0] + g.tiles * room[0];
    for (int i = 0; i < N; ++i) {
      const int64_t many = g.units(i);
      const int32_t failed = parallel(g.tiles * many, [&](int64_t task) {
        const int64_t tile = task / many, t0 = tile * g.high, tn = least(g.high, rows - t0);
        if (tn <= 0) return;
        float* own = memory.get<float>(in + out);
        const float* from = i ? h[(i - 1) % 2] + tile * room[(i - 1) % 2] : nullptr;
        if (i < N - 1)
          g.inner(i, t0, tn, task % many, from, h[i % 2] + tile * room[i % 2], own);
        else
          g.template last<Tail>(t0, tn, task % many, 0, from, own);
      });
      if (failed) return failed;
    }
    return 0;
  }
  return parallel(g.tiles, [&](int64_t tile) {
    const int64_t t0 = tile * g.high, tn = least(g.high, rows - t0);
    if (tn <= 0) return;
    float* h[2] = {memory.get<float>(room[0] + room[1] + in + out), nullptr};
    h[1] = h[0] + room[0];
    float* own = h[1] + room[1];
    for (int i = 0; i < N - 1; ++i)
      for (int64_t unit = 0; unit < g.units(i); ++unit)
        g.inner(i, t0, tn, unit, i ? h[(i - 1) % 2] : nullptr, h[i % 2], own);
    for (int64_t unit = 0; unit < g.units(N - 1); ++unit)
      g.template last<Tail>(t0, tn, unit, 0, h[(N - 2) % 2], own);
  });
}

// GELU by tanh: x * (1 + tanh z) / 2 = max(x, 0) - a * Q(a) with a = |x|, Q(a) = 1 / (1 + exp 2z) and
// z = sqrt(2 / pi) (a + 0.044715 a^3). Q is a polynomial in t = 2 a / 5.2 - 1 on [0, 5.2]. Error
// below 2e-7 absolute and 3e-7 relative near 0. NaN stays NaN.
static inline float gelu_tanh(float x) {
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

struct Plain {
  static constexpr bool any = false, bias = false;
  static inline float apply(float v) { return v; }
};

struct BiasGeluTanh {
  static constexpr bool any = true, bias = true;
  static inline float apply(float v) { return gelu_tanh(v); }
};

extern "C" int32_t structc_run(const void* const* inputs, const void* const* weights, void* y,
                               int64_t rows, const int64_t* sizes) {
  try {
    return run<BiasGeluTanh>(Chain<2>(sizes, weights), static_cast<const T*>(*inputs),
               static_cast<T*>(y), rows);
  } catch (...) {
    return 2;  // out of memory; an exception may not cross into C
  }
}
