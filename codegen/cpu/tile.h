// A program on tiles of tokens: rows of x are the A operand as they lie in memory; what is between the
// steps stays in L1 and L2.

template <class Tail, class To>
static inline void finish(const float* sums, int64_t cols, const float* bias, To* to) {
  if (!Tail::any) return narrow(sums, cols, to);
  constexpr int SOME = 32;  // in registers between the sum and the rounding
  float v[SOME];
  int64_t c = 0;
  for (; c + SOME <= cols; c += SOME) {
#pragma GCC ivdep
    for (int i = 0; i < SOME; ++i)
      v[i] = Tail::apply(Tail::bias ? sums[c + i] + bias[c + i] : sums[c + i]);
    narrow(v, SOME, to + c);
  }
  if (c == cols) return;
#pragma GCC ivdep
  for (int64_t i = 0; i < cols - c; ++i)
    v[i] = Tail::apply(Tail::bias ? sums[c + i] + bias[c + i] : sums[c + i]);
  narrow(v, cols - c, to + c);
}

// Rows of tokens somewhere, `ld` apart.
struct Rows {
  T* at;
  int64_t ld;
};

// One unit of a step for the tokens of a tile: some columns of out from in.
using Unit = void (*)(const Stage& f, int64_t tokens, int64_t unit, Rows in, Rows out);
struct Step {
  Unit unit;
  int64_t (*units)(const Stage& f, int64_t tokens);
};

// ------------------------------------------------------------------ products

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

// Where in a row of the input the columns of one block begin: evenly spaced, or listed.
struct Even {
  int64_t count, space;
  int64_t operator[](int64_t i) const { return i * space; }
};
struct Listed {
  int64_t count;
  const int64_t* at;
  int64_t operator[](int64_t i) const { return at[i]; }
};

static inline int64_t panels(const Stage& f, int64_t) { return f.a * Panels(f.b, f.panel).count; }

// A panel of a factor with d = 1. A shuffle before it costs nothing: the columns of A are then a stride
// apart, r of them side by side in each of the blocks before, and the factor is packed in that order.
template <class Tail>
static void panel(const Stage& f, int64_t tokens, int64_t unit, Rows in, Rows out) {
  const Panels p(f.b, f.panel);
  const int64_t block = unit / p.count, at = unit % p.count, many = f.blocks > 1 ? f.blocks : 1;
  const int64_t r = f.c / many, space = f.a * r;
  const Even places = {r == 1 ? 1 : many, space};
  const T* A = in.at + block * (f.blocks > 1 ? r : f.c);
  const int64_t depth = many * rounded(r);
  multiply<Tail>(tokens, p.columns(at), places, r == 1 ? f.c : r, r == 1 ? space : 1, A, in.ld,
                 static_cast<const T*>(f.w) + (block * p.padded() + p.start(at)) * depth, p.width(at),
                 out.at + block * f.b + p.start(at), out.ld, f.bias + block * f.b + p.start(at));
}

static inline int64_t rows_of_blocks(const Stage& f, int64_t) {
  return f.out / f.b * Panels(f.b, f.panel).count;
}

// A panel of one row of blocks of a block-sparse matrix. index: where the blocks of each row begin
// (one more than rows), then the first input of each block.
template <class Tail>
static void sparse(const Stage& f, int64_t tokens, int64_t unit, Rows in, Rows out) {
  const Panels p(f.b, f.panel);
  const int64_t row = unit / p.count, at = unit % p.count, begin = f.index[row];
  const Listed places = {f.index[row + 1] - begin, f.index + f.out / f.b + 1 + begin};
  const int64_t depth = rounded(f.c);
  multiply<Tail>(tokens, p.columns(at), places, f.c, 1, in.at, in.ld,
                 static_cast<const T*>(f.w) +
                     (begin * p.padded() + p.start(at) * places.count) * depth,
                 p.width(at), out.at + row * f.b + p.start(at), out.ld,
                 f.bias + row * f.b + p.start(at));
}

// ------------------------------------------------------------------ factors with d > 1

constexpr int STRIP = 2 * LANES;             // along d
constexpr int TOGETHER = LANES == 16 ? 4 : 2;  // tokens whose sums fit into registers

static inline int64_t strips(const Stage& f, int64_t) { return f.a * ceil_div(f.d, STRIP); }

// sums (BETAS, `space` apart, for each token, `apart` from token to token) over gamma of vectors along
// delta. Weights are float32 as stored.
template <int BETAS, int TOKENS, int WIDE>
static inline void strip(const Stage& f, const T* x, int64_t ldx, const float* w, float* sums,
                         int64_t apart, int64_t space) {
  Vector s[BETAS][TOKENS][WIDE] = {};
  for (int64_t c = 0; c < f.c; ++c, x += f.d, w += f.d) {
    Vector v[TOKENS][WIDE];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
      for (int i = 0; i < WIDE; ++i) v[t][i] = widen(x + t * ldx + LANES * i);
#pragma GCC unroll 4
    for (int b = 0; b < BETAS; ++b)
#pragma GCC unroll 2
      for (int i = 0; i < WIDE; ++i) {
        const Vector u = *reinterpret_cast<const Vector*>(w + b * f.c * f.d + LANES * i);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) s[b][t][i] += u * v[t][i];
      }
  }
#pragma GCC unroll 4
  for (int b = 0; b < BETAS; ++b)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
      for (int i = 0; i < WIDE; ++i)
        *reinterpret_cast<Vector*>(sums + t * apart + b * space + LANES * i) = s[b][t][i];
}

// As strip, for `left` lanes: a vector that would reach past them starts earlier, and repeats some.
template <int BETAS, int TOKENS>
static inline void any_strip(const Stage& f, int64_t left, const T* x, int64_t ldx, const float* w,
                             float* sums, int64_t apart, int64_t space) {
  if (left == STRIP) return strip<BETAS, TOKENS, 2>(f, x, ldx, w, sums, apart, space);
  if (left >= LANES) {
    const int64_t last = left - LANES;
    strip<BETAS, TOKENS, 1>(f, x, ldx, w, sums, apart, space);
    if (last) strip<BETAS, TOKENS, 1>(f, x + last, ldx, w + last, sums + last, apart, space);
    return;
  }
  for (int b = 0; b < BETAS; ++b)
    for (int t = 0; t < TOKENS; ++t)
      for (int64_t i = 0; i < left; ++i) {
        float sum = 0.0f;
        for (int64_t c = 0; c < f.c; ++c)
          sum += w[(b * f.c + c) * f.d + i] * widen(x[t * ldx + c * f.d + i]);
        sums[t * apart + b * space + i] = sum;
      }
}

// All betas of a strip for some tokens.
template <int TOKENS>
static inline void betas(const Stage& f, int64_t left, const T* x, int64_t ldx, const float* w,
                         float* sums, int64_t apart, int64_t space) {
  int64_t b = 0;
  for (; b + 2 <= f.b; b += 2)
    any_strip<2, TOKENS>(f, left, x, ldx, w + b * f.c * f.d, sums + b * space, apart, space);
  if (b < f.b)
    any_strip<1, TOKENS>(f, left, x, ldx, w + b * f.c * f.d, sums + b * space, apart, space);
}

// The lower, or the upper, halves of two vectors in turn. GCC before 12 knows its own word alone.
#ifdef __clang__
#define MIXED __builtin_shufflevector
#define ORDER(...) __VA_ARGS__
#else
typedef int Lanes __attribute__((vector_size(4 * LANES)));
#define MIXED __builtin_shuffle
#define ORDER(...) (Lanes{__VA_ARGS__})
#endif
static inline Vector lower(Vector a, Vector b) {
#ifdef __AVX512F__
  return MIXED(a, b, ORDER(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
#else
  return MIXED(a, b, ORDER(0, 8, 1, 9, 2, 10, 3, 11));
#endif
}
static inline Vector upper(Vector a, Vector b) {
#ifdef __AVX512F__
  return MIXED(a, b, ORDER(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
#else
  return MIXED(a, b, ORDER(4, 12, 5, 13, 6, 14, 7, 15));
#endif
}

// to[i * MANY + b] = from[b][i] for a vector of i: each round interleaves halves.
template <int MANY>
static inline void interleave(const float* from, float* to) {
  Vector v[MANY], n[MANY];
  for (int b = 0; b < MANY; ++b) v[b] = *reinterpret_cast<const Vector*>(from + b * STRIP);
#pragma GCC unroll 4
  for (int round = 1; round < MANY; round *= 2) {
#pragma GCC unroll 8
    for (int b = 0; b < MANY / 2; ++b) {
      n[2 * b] = lower(v[b], v[b + MANY / 2]);
      n[2 * b + 1] = upper(v[b], v[b + MANY / 2]);
    }
#pragma GCC unroll 16
    for (int b = 0; b < MANY; ++b) v[b] = n[b];
  }
  for (int b = 0; b < MANY; ++b) *reinterpret_cast<Vector*>(to + b * LANES) = v[b];
}

static inline void weave(int64_t many, int64_t left, const float* from, float* to) {
  int64_t i = 0;
  for (; i + LANES <= left; i += LANES) switch (many) {
      case 2: interleave<2>(from + i, to + i * 2); break;
      case 4: interleave<4>(from + i, to + i * 4); break;
      case 8: interleave<8>(from + i, to + i * 8); break;
      default:
        for (int64_t b = 0; b < many; ++b)
          for (int64_t j = i; j < i + LANES; ++j) to[j * many + b] = from[b * STRIP + j];
    }
  for (; i < left; ++i)
    for (int64_t b = 0; b < many; ++b) to[i * many + b] = from[b * STRIP + i];
}

// A strip of all outputs of one alpha. WOVEN: outputs go through the shuffle behind, (b, d) to (d, b).
template <class Tail, bool WOVEN>
static void strided(const Stage& f, int64_t tokens, int64_t unit, Rows in, Rows out) {
  static thread_local Scratch memory;
  const int64_t many = ceil_div(f.d, STRIP), block = unit / many, from = unit % many * STRIP;
  const int64_t left = least(STRIP, f.d - from), apart = f.b * STRIP, to = block * f.b * f.d + from;
  // Less than a vector is left: it starts earlier, and what it repeats is not stored.
  const int64_t back = left < LANES && from ? LANES - left : 0;
  const float* w = static_cast<const float*>(f.w) + block * f.b * f.c * f.d + from - back;
  const T* x = in.at + block * f.c * f.d + from - back;
  float* sums = memory.get<float>((TOGETHER + 1) * apart);
  for (int64_t t = 0; t < tokens;) {
    const int64_t some = t + TOGETHER <= tokens ? TOGETHER : 1;
    float* direct = !WOVEN && !back ? in_place(out.at + t * out.ld + to) : nullptr;
    float* own = direct ? direct : sums;
    const int64_t row = direct ? out.ld : apart, space = direct ? f.d : STRIP;
    if (some == TOGETHER)
      betas<TOGETHER>(f, left + back, x + t * in.ld, in.ld, w, own, row, space);
    else
      betas<1>(f, left + back, x + t * in.ld, in.ld, w, own, row, space);
    own += back;
    for (int64_t i = 0; i < some; ++i, ++t, own += row) {
      T* y = out.at + t * out.ld + to;
      if (WOVEN) {
        float* woven = sums + TOGETHER * apart;
        weave(f.b, left, own, woven);
        finish<Tail>(woven, left * f.b, f.bias + from * f.b, out.at + t * out.ld + from * f.b);
      } else if (Tail::any || !direct) {
        for (int64_t b = 0; b < f.b; ++b)
          finish<Tail>(own + b * space, left, f.bias + to + b * f.d, y + b * f.d);
      }
    }
  }
}

// ------------------------------------------------------------------ what moves values alone

static inline int64_t eighths(const Stage&, int64_t tokens) { return ceil_div(tokens, 8); }

// Features of some tokens as they are, or those that `index` lists.
template <class Tail, bool LISTED>
static void move(const Stage& f, int64_t tokens, int64_t unit, Rows in, Rows out) {
  static thread_local Scratch memory;
  float* row = memory.get<float>(f.b);
  for (int64_t t = 8 * unit; t < least(tokens, 8 * unit + 8); ++t) {
    const T* x = in.at + t * in.ld;
    for (int64_t i = 0; i < f.b; ++i) row[i] = widen(x[LISTED ? f.index[i] : i]);
    finish<Tail>(row, f.b, f.bias, out.at + t * out.ld);
  }
}

// A shuffle of `blocks` blocks that no product can read through: runs of r features change places.
template <class Tail>
static void shuffle(const Stage& f, int64_t tokens, int64_t unit, Rows in, Rows out) {
  const int64_t p = f.blocks, r = f.panel, groups = f.b / p / r;
  for (int64_t t = 8 * unit; t < least(tokens, 8 * unit + 8); ++t) {
    const T* x = in.at + t * in.ld;
    T* y = out.at + t * out.ld;
    if (r == 1) {
      swap(p, groups, x, y);
      continue;
    }
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < p; ++i, y += r)
        std::memcpy(y, x + (i * groups + g) * r, r * sizeof(T));
  }
}

// ------------------------------------------------------------------ whole rows

// What is done to whole rows of a step's output, while the tile is in L2: y = norm(y * u + z).
using Whole = void (*)(const Stage& f, int64_t tokens, Rows y, Rows u, Rows z);

struct None {
  static constexpr bool mean = false, any = false;
};
struct Layer {
  static constexpr bool mean = true, any = true;
};
struct Rms {
  static constexpr bool mean = false, any = true;
};

// The sum over a row of f(value), in lanes.
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

template <bool MUL, bool ADD, class Norm>
static void whole(const Stage& f, int64_t tokens, Rows y, Rows u, Rows z) {
  static thread_local Scratch memory;
  const int64_t n = f.out;
  float* v = memory.get<float>(n);
  for (int64_t t = 0; t < tokens; ++t) {
    T* row = y.at + t * y.ld;
    const T *times = MUL ? u.at + t * u.ld : row, *plus = ADD ? z.at + t * z.ld : row;
#pragma GCC ivdep
    for (int64_t c = 0; c < n; ++c)
      v[c] = widen(row[c]) * (MUL ? widen(times[c]) : 1.0f) + (ADD ? widen(plus[c]) : 0.0f);
    if (Norm::any) {
      const float mean = Norm::mean ? sum(v, n, [](float a) { return a; }) / n : 0.0f;
      const float square = sum(v, n, [=](float a) { return (a - mean) * (a - mean); }) / n;
      const float scale = 1.0f / std::sqrt(square + f.eps);
#pragma GCC ivdep
      for (int64_t c = 0; c < n; ++c)
        v[c] = (v[c] - mean) * scale * f.gain[c] + (Norm::mean ? f.shift[c] : 0.0f);
    }
    narrow(v, n, row);
  }
}

// ------------------------------------------------------------------ the program

// Rows of a step's output in scratch memory; a power of two would put the rows of a tile into few sets
// of the cache.
static inline int64_t spaced(int64_t n) {
  const int64_t line = 64 / sizeof(T), whole = ceil_div(n, line) * line;
  return whole % (16 * line) ? whole : whole + line;
}

// All steps for tokens t0 .. t0 + tokens; `each(count, body)` runs the units of a step.
template <int N, class Each>
static int32_t chain(const Step (&steps)[N], const Whole (&wholes)[N], const Chain<N>& f,
                     const void* const* inputs, T* y, int64_t t0, int64_t tokens, Scratch& scratch,
                     const Each& each) {
  int64_t room = 0, alike[2] = {};  // kept outputs have rows of their own, the others take turns
  for (int i = 0; i + 1 < N; ++i) {
    const int64_t ld = spaced(f.stage[i].out);
    if (f.stage[i].keeps >= 0) room += ld;
    else if (ld > alike[i % 2]) alike[i % 2] = ld;
  }
  T* memory = scratch.get<T>((room + alike[0] + alike[1]) * tokens);
  T* turns[2] = {memory, memory + alike[0] * tokens};
  T* kept = turns[1] + alike[1] * tokens;
  Rows slots[SLOTS];
  for (int64_t i = 0; i < f.inputs; ++i)
    slots[i] = {const_cast<T*>(static_cast<const T*>(inputs[i])) + t0 * f.features[i], f.features[i]};
  Rows in = slots[0];
  for (int i = 0; i < N; ++i) {
    const Stage& s = f.stage[i];
    const int64_t ld = spaced(s.out);
    if (s.reads >= 0) in = slots[s.reads];
    Rows out = {y + t0 * s.out, s.out};
    if (i + 1 < N) out = {s.keeps >= 0 ? kept : turns[i % 2], ld};
    const int32_t failed = each(steps[i].units(s, tokens),
                                [&](int64_t unit) { steps[i].unit(s, tokens, unit, in, out); });
    if (failed) return failed;
    if (wholes[i]) {
      const Rows u = s.muls < 0 ? Rows{} : slots[s.muls], z = s.adds < 0 ? Rows{} : slots[s.adds];
      const int64_t few = ceil_div(tokens, 16);
      const int32_t lost = each(ceil_div(tokens, few), [&](int64_t at) {
        const int64_t t = at * few;
        auto from = [&](Rows r) { return Rows{r.at + t * r.ld, r.ld}; };
        wholes[i](s, least(few, tokens - t), from(out), from(u), from(z));
      });
      if (lost) return lost;
    }
    if (s.keeps >= 0) {
      slots[s.keeps] = out;
      kept += ld * tokens;
    }
    in = out;
  }
  return 0;
}

template <int N>
static int32_t run(const Step (&steps)[N], const Whole (&wholes)[N], const Chain<N>& f,
                   const void* const* inputs, T* y, int64_t rows) {
  static thread_local Scratch own, shared;
  if (rows <= 0) return 0;
  if (f.inputs > SLOTS) return 3;
  if (f.split && rows <= 16 * f.tile)  // few rows: the threads share the units of each step
    return chain(steps, wholes, f, inputs, y, 0, rows, shared,
                 [](int64_t count, const auto& body) { return parallel(count, body); });
  // Tiles of equal height, at most f.tile tokens: no thread waits for another's sliver.
  const int64_t tiles = ceil_div(rows, f.tile), high = ceil_div(rows, tiles);
  return parallel(tiles, [&](int64_t tile) {
    const int64_t t0 = tile * high;
    if (t0 >= rows) return;
    chain(steps, wholes, f, inputs, y, t0, least(high, rows - t0), own,
          [](int64_t count, const auto& body) {
            for (int64_t i = 0; i < count; ++i) body(i);
            return 0;
          });
  });
}
