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
