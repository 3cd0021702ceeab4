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
