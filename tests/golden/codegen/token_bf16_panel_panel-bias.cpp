// structc tile kernel token_bf16_panel_panel-bias

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

// Values are bfloat16, sums are float32. The micro-kernel C (M x N) = A (M x K) * B (K x N), B with pairs
// of rows interleaved, is oneDNN's JIT batch-reduce GEMM as PyTorch exports it (AMX where there is one).
// It is declared here because the header that declares it takes twenty seconds to compile; a self-test at
// load notices when it is not what we think it is.
using T = uint16_t;
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add_C,
            const c10::BFloat16* A, const c10::BFloat16* B, float* C, bool is_vnni);
void brgemm_release(bool is_vnni);
}
using at::native::cpublas::brgemm;
// A thread that used AMX gives its tiles back, or each context switch saves eight kilobytes more.
static inline void release() { at::native::cpublas::brgemm_release(true); }

static inline float widen(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// To the nearest, ties to even; NaN stays NaN.
static inline void narrow(const float* from, int64_t count, uint16_t* to) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[i] = static_cast<uint16_t>(from[i] != from[i] ? 0x7fc0u : rounded);
  }
}

// The epilogue on a row of sums, and the rounding.
template <class Tail>
static inline void finish(float* sums, int64_t cols, const float* bias, uint16_t* to) {
  if (Tail::any) {
#pragma GCC ivdep
    for (int64_t c = 0; c < cols; ++c) sums[c] = Tail::apply(Tail::bias ? sums[c] + bias[c] : sums[c]);
  }
  narrow(sums, cols, to);
}

// out (rows x cols) = tail(A (rows x k) * B (k x width, packed)).
template <class Tail>
static inline void multiply(int64_t rows, int64_t cols, int64_t k, const uint16_t* A, int64_t lda,
                            const uint16_t* B, int64_t width, uint16_t* out, int64_t ldo,
                            const float* bias) {
  static thread_local Scratch memory;
  float* sums = memory.get<float>(rows * width);
  brgemm(rows, width, k, lda, width, width, false, reinterpret_cast<const c10::BFloat16*>(A),
         reinterpret_cast<const c10::BFloat16*>(B), sums, true);
  for (int64_t t = 0; t < rows; ++t) finish<Tail>(sums + t * width, cols, bias, out + t * ldo);
}

// Rows of x are the A operand as they lie in memory; each factor is packed once, transposed and cut
// into panels of columns that stay in L1 or L2 while a tile of tokens passes.

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

// One unit of a stage for the tokens of a tile: out[:, its columns] from in.
using Step = void (*)(const Stage& f, int64_t tokens, int64_t unit, const T* in, T* out, int64_t ldo);

// A panel of a factor with d = 1. A shuffle behind it costs nothing: each block is cut into one part for
// each group of the next factor, written where that group reads; the next factor is packed with its
// inputs in that order.
template <class Tail>
static void panel(const Stage& f, int64_t tokens, int64_t unit, const T* in, T* out, int64_t ldo) {
  const int64_t wide = f.b / f.parts;
  const Panels p(wide, f.panel);
  const int64_t part = unit / p.count, at = unit % p.count;
  const int64_t block = part / f.parts, group = part % f.parts;
  const int64_t to = group * f.group + block * wide + p.start(at);  // one part: the block's own place
  multiply<Tail>(tokens, p.columns(at), f.c, in + block * f.c, f.in(),
                 static_cast<const T*>(f.w) + (part * p.padded() + p.start(at)) * f.c, p.width(at),
                 out + (f.parts > 1 ? to : block * f.b + p.start(at)), ldo,
                 f.bias + block * f.b + p.start(at));
}

// The outputs of one beta of a factor with d > 1: sums over gamma of vectors along delta. Weights are
// float32 as stored.
template <class Tail>
static void strided(const Stage& f, int64_t tokens, int64_t unit, const T* in, T* out, int64_t ldo) {
  constexpr int64_t LANES = 64;
  const float* w = static_cast<const float*>(f.w) + unit * f.c * f.d;
  for (int64_t t = 0; t < tokens; ++t) {
    const T* x = in + t * f.in() + unit / f.b * f.c * f.d;
    T* y = out + t * ldo + unit * f.d;
    for (int64_t from = 0; from < f.d; from += LANES) {
      const int64_t many = least(LANES, f.d - from);
      float sums[LANES] = {};
      for (int64_t c = 0; c < f.c; ++c) {
        const T* v = x + c * f.d + from;
        const float* u = w + c * f.d + from;
        if (many == LANES) {
          for (int64_t i = 0; i < LANES; ++i) sums[i] += u[i] * widen(v[i]);
        } else {
          for (int64_t i = 0; i < many; ++i) sums[i] += u[i] * widen(v[i]);
        }
      }
      if (Tail::any)
        for (int64_t i = 0; i < many; ++i)
          sums[i] = Tail::apply(Tail::bias ? sums[i] + f.bias[unit * f.d + from + i] : sums[i]);
      narrow(sums, many, y + from);
    }
  }
}

// What is done to whole rows of a stage's output, while the tile is in L2: y = norm(y + z).
using Rows = void (*)(const Stage& f, int64_t tokens, T* y, const T* z);

struct None {
  static constexpr bool mean = false, any = false;
};
struct Layer {
  static constexpr bool mean = true, any = true;
};
struct Rms {
  static constexpr bool mean = false, any = true;
};

// The sum over a row of f(value), in sixteen lanes.
template <class F>
static inline float sum(const float* v, int64_t n, const F& f) {
  float lanes[16] = {}, total = 0.0f;
  int64_t c = 0;
  for (; c + 16 <= n; c += 16)
    for (int i = 0; i < 16; ++i) lanes[i] += f(v[c + i]);
  for (; c < n; ++c) lanes[0] += f(v[c]);
  for (int i = 0; i < 16; ++i) total += lanes[i];
  return total;
}

template <bool ADD, class Norm>
static void whole_rows(const Stage& f, int64_t tokens, T* y, const T* z) {
  static thread_local Scratch memory;
  const int64_t n = f.out();
  float* v = memory.get<float>(n);
  for (int64_t t = 0; t < tokens; ++t, y += n, z += ADD ? n : 0) {
    for (int64_t c = 0; c < n; ++c) v[c] = widen(y[c]) + (ADD ? widen(z[c]) : 0.0f);
    if (Norm::any) {
      const float mean = Norm::mean ? sum(v, n, [](float a) { return a; }) / n : 0.0f;
      const float square = sum(v, n, [=](float a) { return (a - mean) * (a - mean); }) / n;
      const float scale = 1.0f / std::sqrt(square + f.eps);
      for (int64_t c = 0; c < n; ++c)
        v[c] = (v[c] - mean) * scale * f.gain[c] + (Norm::mean ? f.shift[c] : 0.0f);
    }
    narrow(v, n, y);
  }
}

static inline int64_t units(const Stage& f) {
  return f.d > 1 ? f.a * f.b : f.a * f.parts * Panels(f.b / f.parts, f.panel).count;
}

template <int N>
static int32_t run(const Step (&steps)[N], const Rows (&tails)[N], const Chain<N>& f,
                   const void* const* inputs, T* y, int64_t rows) {
  static thread_local Scratch memory;
  const T* x = static_cast<const T*>(inputs[0]);
  auto added = [&](const Stage& s, int64_t t0) {  // rows of the input that a stage adds
    return s.add < 0 ? nullptr : static_cast<const T*>(inputs[s.add]) + t0 * s.out();
  };
  const int64_t n = f.stage[0].in(), m = f.stage[N - 1].out();
  // Tiles of equal height, at most f.tile tokens: no thread waits for another's sliver.
  const int64_t tiles = ceil_div(rows, f.tile), high = ceil_div(rows, tiles);
  const int64_t room[2] = {f.room(0), f.room(1)};
  if (f.split && tiles <= 16) {
    // Few rows: the threads share the units of each factor; all tokens share the intermediates.
    T* h[2] = {memory.get<T>(rows * (room[0] + room[1])), nullptr};
    h[1] = h[0] + rows * room[0];
    const T* in = x;
    for (int i = 0; i < N; ++i) {
      const Stage& s = f.stage[i];
      const int64_t many = units(s), ldi = s.in(), ldo = s.out();
      T* out = i + 1 < N ? h[i % 2] : y;
      const int32_t failed = parallel(tiles * many, [&](int64_t task) {
        const int64_t t0 = task / many * high;
        if (t0 < rows)
          steps[i](s, least(high, rows - t0), task % many, in + t0 * ldi, out + t0 * ldo, ldo);
      });
      if (failed) return failed;
      if (tails[i]) {
        const int64_t few = ceil_div(rows, 16);
        const int32_t lost = parallel(16, [&](int64_t task) {
          const int64_t t0 = task * few;
          if (t0 < rows) tails[i](s, least(few, rows - t0), out + t0 * ldo, added(s, t0));
        });
        if (lost) return lost;
      }
      in = out;
    }
    return 0;
  }
  return parallel(tiles, [&](int64_t tile) {
    const int64_t t0 = tile * high, tn = least(high, rows - t0);
    if (tn <= 0) return;
    T* h[2] = {memory.get<T>(high * (room[0] + room[1])), nullptr};
    h[1] = h[0] + high * room[0];
    const T* in = x + t0 * n;
    for (int i = 0; i < N; ++i) {
      const Stage& s = f.stage[i];
      const int64_t many = units(s), ldo = s.out();
      T* out = i + 1 < N ? h[i % 2] : y + t0 * m;
      // While the last factor computes from L1 and L2, the next tile of x comes into L2.
      const bool last = N > 1 && i == N - 1;
      const int64_t next = last ? least(high, rows - t0 - tn) * n : 0, share = ceil_div(next, many);
      for (int64_t unit = 0; unit < many; ++unit) {
        fetch(x + (t0 + tn) * n + unit * share, least(share, next - unit * share) * sizeof(T));
        steps[i](s, tn, unit, in, out, ldo);
      }
      if (tails[i]) tails[i](s, tn, out, added(s, t0));
      in = out;
    }
  });
}

struct Plain {
  static constexpr bool any = false, bias = false;
  static inline float apply(float v) { return v; }
};

struct Bias {
  static constexpr bool any = true, bias = true;
  static inline float apply(float v) { return v; }
};

extern "C" int32_t structc_run(const void* const* inputs, const void* const* weights, void* y,
                               int64_t rows, const int64_t* sizes) {
  try {
    static constexpr Step steps[] = {panel<Plain>, panel<Bias>};
    static constexpr Rows tails[] = {nullptr, nullptr};
    return run(steps, tails, Chain<2>(sizes, weights), inputs,
               static_cast<T*>(y), rows);
  } catch (...) {
    return 2;  // out of memory; an exception may not cross into C
  }
}
