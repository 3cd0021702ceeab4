// structc tile kernel token_1_bias_gelu: y = x W1 + bias, then gelu; float32.

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

// How the n columns of a packed factor are cut into panels of a multiple of 16 columns, as even as
// that allows: 160 columns at a width of 64 become 64 + 48 + 48. The packing follows the same rule.
struct Panels {
  int64_t n, base, extra, count;
  Panels(int64_t n, int64_t width) : n(n) {
    const int64_t units = ceil_div(n, 16);
    count = ceil_div(units, width / 16);
    base = units / count;
    extra = units % count;
  }
  int64_t start(int64_t p) const { return 16 * (p * base + least(p, extra)); }
  int64_t width(int64_t p) const { return 16 * (base + (p < extra)); }
  int64_t columns(int64_t p) const { return least(width(p), n - start(p)); }
  int64_t padded() const { return 16 * ceil_div(n, 16); }
};

// Exact GELU: x * Phi(x) = max(x, 0) - a * Q(a) with a = |x| and Q(a) = erfc(a / sqrt 2) / 2. Q is a
// polynomial in t = 2 a / 5.5 - 1 on [0, 5.5]: no division, no exponential. Error below 2e-7
// absolute and 3e-7 relative near 0; beyond 5.5 the correction is at most 1e-7. NaN stays NaN.
static inline float activate(float x) {
  const float size = std::fabs(x), a = size > 5.5f ? 5.5f : size;
  const float t = a * (2.0f / 5.5f) - 1.0f;
  float q = -1.369615648e-03f;
  q = q * t + 2.469802389e-03f;
  q = q * t + 6.770694028e-03f;
  q = q * t - 1.742163640e-02f;
  q = q * t - 7.401639590e-03f;
  q = q * t + 5.262673195e-02f;
  q = q * t - 3.168039480e-02f;
  q = q * t - 7.107909985e-02f;
  q = q * t + 1.274555500e-01f;
  q = q * t - 2.297580567e-02f;
  q = q * t - 1.616868979e-01f;
  q = q * t + 2.148375835e-01f;
  q = q * t - 5.150901401e-02f;
  q = q * t - 1.766036958e-01f;
  q = q * t + 2.718825951e-01f;
  q = q * t - 2.068465575e-01f;
  q = q * t + 9.455896805e-02f;
  q = q * t - 2.500731109e-02f;
  q = q * t + 2.979762703e-03f;
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

static int32_t run(const float* x, const float* w1, const float* w2, const float* bias, float* y,
                   int64_t rows, const Sizes& s) {
  // Tiles of equal height, at most s.tile tokens: no thread waits for another's sliver.
  const int64_t tiles = ceil_div(rows, s.tile), high = ceil_div(rows, tiles);
  const int64_t n = s.a1 * s.c1, m = s.a1 * s.b1, b2 = s.b1;
  const Panels p2(s.b1, s.panel2);
  const int64_t units = s.a1 * p2.count;
  // A panel of the factor for the tokens t0 .. t0 + tn, written straight to y and finished there.
  auto only = [&](int64_t t0, int64_t tn, int64_t unit) {
    const int64_t block = unit / p2.count, p = unit % p2.count;
    float* out = y + t0 * m + block * b2 + p2.start(p);
    brgemm(tn, p2.columns(p), s.c1, n, p2.width(p), m, false, x + t0 * n + block * s.c1,
           w1 + (block * p2.padded() + p2.start(p)) * s.c1, out, false);
    finish(out, m, tn, p2.columns(p), bias + block * b2 + p2.start(p));
  };
  if (s.split)  // few rows: the threads share the panels
    return parallel(tiles * units, [&](int64_t task) {
      const int64_t t0 = task / units * high;
      if (t0 < rows) only(t0, least(high, rows - t0), task % units);
    });
  return parallel(tiles, [&](int64_t tile) {
    const int64_t t0 = tile * high, tn = least(high, rows - t0);
    for (int64_t unit = 0; tn > 0 && unit < units; ++unit) only(t0, tn, unit);
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
