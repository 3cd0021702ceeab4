// structc tile kernel token_2: y = (x W1) W2; float32.

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



// Factor f has a_f blocks, each (b_f out, c_f in). Set by the caller, checked there.
struct Sizes {
  int64_t a1, b1, c1, a2, b2, c2, tile, panel1, panel2, split;
};

static int32_t run(const float* x, const float* w1, const float* w2, const float* bias, float* y,
                   int64_t rows, const Sizes& s) {
  // Tiles of equal height, at most s.tile tokens: no thread waits for another's sliver.
  const int64_t tiles = ceil_div(rows, s.tile), high = ceil_div(rows, tiles);
  const int64_t n = s.a1 * s.c1, middle = s.a1 * s.b1;
  const Panels p1(s.b1, s.panel1);
  const int64_t units1 = s.a1 * p1.count;
  // A panel of factor 1 for the tokens t0 .. t0 + tn: h[:, columns] = x[:, block] w1[block].
  auto first = [&](int64_t t0, int64_t tn, int64_t unit, float* h) {
    const int64_t block = unit / p1.count, p = unit % p1.count;
    brgemm(tn, p1.columns(p), s.c1, n, p1.width(p), middle, false, x + t0 * n + block * s.c1,
           w1 + (block * p1.padded() + p1.start(p)) * s.c1,
           h + block * s.b1 + p1.start(p), false);
  };

  const int64_t m = s.a2 * s.b2, b2 = s.b2;
  const Panels p2(s.b2, s.panel2);
  const int64_t units2 = s.a2 * p2.count;
  // A panel of factor 2, written straight to y and finished there.
  auto second = [&](int64_t t0, int64_t tn, int64_t unit, const float* h) {
    const int64_t block = unit / p2.count, p = unit % p2.count;
    float* out = y + t0 * m + block * b2 + p2.start(p);
    brgemm(tn, p2.columns(p), s.c2, middle, p2.width(p), m, false, h + block * s.c2,
           w2 + (block * p2.padded() + p2.start(p)) * s.c2, out, false);
  };
  static thread_local Scratch scratch;
  if (s.split && tiles <= 16) {
    // Few rows: the threads share the panels of each factor; all tokens share one intermediate.
    float* h = scratch.get(rows * middle);
    const int32_t failed = parallel(tiles * units1, [&](int64_t task) {
      const int64_t t0 = task / units1 * high;
      if (t0 < rows) first(t0, least(high, rows - t0), task % units1, h + t0 * middle);
    });
    if (failed) return failed;
    return parallel(tiles * units2, [&](int64_t task) {
      const int64_t t0 = task / units2 * high;
      if (t0 < rows) second(t0, least(high, rows - t0), task % units2, h + t0 * middle);
    });
  }
  return parallel(tiles, [&](int64_t tile) {
    const int64_t t0 = tile * high, tn = least(high, rows - t0);
    if (tn <= 0) return;
    float* h = scratch.get(high * middle);
    for (int64_t unit = 0; unit < units1; ++unit) first(t0, tn, unit, h);
    // While factor 2 computes from L1 and L2, the next tile of x comes into L2.
    const int64_t next = least(high, rows - t0 - tn) * n, share = ceil_div(next, units2);
    for (int64_t unit = 0; unit < units2; ++unit) {
      fetch(x + (t0 + tn) * n + unit * share, least(share, next - unit * share));
      second(t0, tn, unit, h);
    }
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
