// Exact softmax attention, a tile of queries at a time: scores, softmax and sums stay in L1 and L2, panels
// of keys that no query of the tile sees are skipped, and a matrix of all scores never exists. Scores are
// powers of two inside: what is multiplied by log2 e once needs no multiplication in each exponential.

constexpr int64_t PANEL = 64;   // keys that are packed together
constexpr int64_t TOGETHER = 4;  // panels whose scores a tile holds at a time
constexpr int64_t GROUP = 16, GROUPS = 6;  // queries whose edges are cut together; of a tile
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr float NONE = -INFINITY;
typedef int32_t Lanes __attribute__((vector_size(4 * LANES), aligned(4)));

struct Call {
  int64_t batch, heads, group, nq, nk, d, dv;  // group: query heads that share a head of keys
  int64_t q[3], k[3], v[3], o[3];               // strides of batch, head, token
  int64_t causal, offset, window, sinks;        // window 0: none
  int64_t threads, tile;
  int64_t bias_kind, bias[4];                   // strides of batch, head, query, key
  int64_t lags_head, keys_batch, blocks[4], block_q, block_k;
  const T *Q, *K, *V;
  T* O;
  float* lse;
  const void* bias_at;
  const float *lags, *sink;
  const uint8_t *keys, *blocks_at;
  uint32_t* packed;                             // of all heads, or null: each thread packs its own
  float scale, softcap;

  Call(const int64_t* s, const void* const* p, const float* f) {
    int64_t* to[] = {&batch, &heads, &group, &nq, &nk, &d, &dv};
    for (int64_t* t : to) *t = *s++;
    for (int64_t* strides : {q, k, v, o})
      for (int i = 0; i < 3; ++i) strides[i] = *s++;
    for (int64_t* t : {&causal, &offset, &window, &sinks, &threads, &tile, &bias_kind}) *t = *s++;
    for (int i = 0; i < 4; ++i) bias[i] = *s++;
    lags_head = *s++;
    keys_batch = *s++;
    for (int i = 0; i < 4; ++i) blocks[i] = *s++;
    block_q = *s++;
    block_k = *s++;
    Q = static_cast<const T*>(p[0]);
    K = static_cast<const T*>(p[1]);
    V = static_cast<const T*>(p[2]);
    O = static_cast<T*>(const_cast<void*>(p[3]));
    lse = static_cast<float*>(const_cast<void*>(p[4]));
    bias_at = p[5];
    lags = static_cast<const float*>(p[6]);
    keys = static_cast<const uint8_t*>(p[7]);
    blocks_at = static_cast<const uint8_t*>(p[8]);
    sink = static_cast<const float*>(p[9]);
    packed = static_cast<uint32_t*>(const_cast<void*>(p[10]));
    scale = f[0];
    softcap = f[1];
  }

  // Words (a float, or a pair of bfloat16) of a packed panel of keys, and of one of values.
  int64_t deep() const { return ceil_div(d, PER_WORD); }
  int64_t wide() const { return ceil_div(dv, LANES) * LANES; }
  int64_t panels() const { return ceil_div(nk, PANEL); }
  int64_t key_words() const { return deep() * PANEL; }
  int64_t value_words() const { return PANEL / PER_WORD * wide(); }
  // Packed words of one head: keys, values, then for each panel two that say which keys nobody may see
  // and one that says whether a value is no number.
  int64_t head_words() const { return panels() * (key_words() + value_words() + 4); }
  bool plain() const { return !bias_at && !lags && softcap == 0 && scale > 0; }
};

static inline uint64_t below(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; }

// ------------------------------------------------------------------ products

// C (HIGH x WIDE vectors) = or += A * B, A in words, B in rows of `ldb` words.
template <bool MORE, int HIGH, int WIDE>
static void cell(int64_t deep, const uint32_t* A, int64_t lda, const uint32_t* B, int64_t ldb, float* C,
                 int64_t ldc) {
  Vector sums[HIGH][WIDE];
#pragma GCC unroll 16
  for (int i = 0; i < HIGH; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < WIDE; ++v)
      sums[i][v] = MORE ? *reinterpret_cast<const Vector*>(C + i * ldc + LANES * v) : Vector{};
  for (int64_t k = 0; k < deep; ++k, B += ldb) {
    Word b[WIDE];
#pragma GCC unroll 8
    for (int v = 0; v < WIDE; ++v) b[v] = load_words(B + LANES * v);
#pragma GCC unroll 16
    for (int i = 0; i < HIGH; ++i) {
      const Word a = spread(A[i * lda + k]);
#pragma GCC unroll 8
      for (int v = 0; v < WIDE; ++v) sums[i][v] = multiply_add(a, b[v], sums[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < HIGH; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < WIDE; ++v) *reinterpret_cast<Vector*>(C + i * ldc + LANES * v) = sums[i][v];
}

constexpr int MOST = LANES == 16 ? 4 : 2;
constexpr int ROWS_OF[] = {0, LANES == 16 ? 12 : 8, LANES == 16 ? 12 : 6, 8, 6};

template <bool MORE, int WIDE>
static void strip(int64_t rows, int64_t deep, const uint32_t* A, int64_t lda, const uint32_t* B,
                  int64_t ldb, float* C, int64_t ldc) {
  constexpr int HIGH = ROWS_OF[WIDE];
  int64_t r = 0;
  for (; r + HIGH <= rows; r += HIGH)
    cell<MORE, HIGH, WIDE>(deep, A + r * lda, lda, B, ldb, C + r * ldc, ldc);
  for (; r + 4 <= rows; r += 4) cell<MORE, 4, WIDE>(deep, A + r * lda, lda, B, ldb, C + r * ldc, ldc);
  for (; r < rows; ++r) cell<MORE, 1, WIDE>(deep, A + r * lda, lda, B, ldb, C + r * ldc, ldc);
}

template <bool MORE>
static void product(int64_t rows, int64_t cols, int64_t deep, const uint32_t* A, int64_t lda,
                    const uint32_t* B, int64_t ldb, float* C, int64_t ldc) {
  for (int64_t at = 0; at < cols;) {
    const int64_t vectors = (cols - at) / LANES;
    const int64_t wide = ceil_div(vectors, ceil_div(vectors, MOST));
    switch (wide) {
      case 1: strip<MORE, 1>(rows, deep, A, lda, B + at, ldb, C + at, ldc); break;
      case 2: strip<MORE, 2>(rows, deep, A, lda, B + at, ldb, C + at, ldc); break;
#ifdef __AVX512F__
      case 3: strip<MORE, 3>(rows, deep, A, lda, B + at, ldb, C + at, ldc); break;
      case 4: strip<MORE, 4>(rows, deep, A, lda, B + at, ldb, C + at, ldc); break;
#endif
    }
    at += wide * LANES;
  }
}

// ------------------------------------------------------------------ exponentials

// 2^x, two roundings at most; 0 below -126. NaN stays NaN.
static inline Vector exp2(Vector x) {
#ifdef __AVX512F__
  const __m512 v = _mm512_max_ps(_mm512_set1_ps(-150.0f), reinterpret_cast<__m512>(x));
  const __m512 n = _mm512_roundscale_ps(v, 8);
  const Vector r = reinterpret_cast<Vector>(_mm512_sub_ps(v, n));
#else
  const Vector low = x - x - 150.0f, v = low > x ? low : x;
  const Vector magic = x - x + 12582912.0f, n = (v + magic) - magic, r = v - n;
#endif
  Vector p = r * 1.546973617e-4f + 1.340043694e-3f;
  p = p * r + 9.618025590e-3f;
  p = p * r + 5.550327202e-2f;
  p = p * r + 2.402265121e-1f;
  p = p * r + 6.931472067e-1f;
  p = p * r + 1.0f;
#ifdef __AVX512F__
  return reinterpret_cast<Vector>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), n));
#else
  const Lanes bits = (__builtin_convertvector(n < -126.0f ? n - n - 126.0f : n, Lanes) + 127) << 23;
  const Vector power = reinterpret_cast<Vector>(bits);
  return v < -126.0f ? v - v : p * power;
#endif
}

static inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
static inline float sum_of(Vector v) {
  float s = 0;
  for (int i = 0; i < LANES; ++i) s += v[i];
  return s;
}
static inline float max_of(Vector v) {
  float m = v[0];
  for (int i = 1; i < LANES; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
static inline Vector load(const float* at) { return *reinterpret_cast<const Vector*>(at); }
static inline void store(float* at, Vector v) { *reinterpret_cast<Vector*>(at) = v; }

// Scores in [left, right) of a panel whose bit is 0 become -inf.
static inline void hide(float* s, uint64_t bits, int64_t left, int64_t right) {
#ifdef __AVX512F__
  for (int64_t c = left; c < right; c += LANES)
    _mm512_mask_storeu_ps(s + c, static_cast<__mmask16>(~bits >> c), _mm512_set1_ps(NONE));
#else
  Lanes one;
  for (int i = 0; i < LANES; ++i) one[i] = 1 << i;
  for (int64_t c = left; c < right; c += LANES) {
    const Lanes some = Lanes{} + static_cast<int32_t>(bits >> c & ((1ull << LANES) - 1));
    store(s + c, (some & one) != 0 ? load(s + c) : Vector{} + NONE);
  }
#endif
}

// ------------------------------------------------------------------ packing

// A bias as a power of two. The lowest number would become -inf, which hides: where all keys of a row have
// it, they are seen alike.
static inline float in_twos(float bias) {
  const float b = LOG2E * bias;
  return b < -3e38f && bias > NONE ? -3e38f : b;
}

struct Packed {
  const uint32_t *keys, *values;
  const uint64_t* seen;
  const uint32_t* odd;
};

static Packed packed_at(const Call& c, const uint32_t* at) {
  const uint32_t* values = at + c.panels() * c.key_words();
  const uint32_t* seen = values + c.panels() * c.value_words();
  return {at, values, reinterpret_cast<const uint64_t*>(seen), seen + 2 * c.panels()};
}

// Which keys of a panel any query of a sequence may see.
static uint64_t keys_seen(const Call& c, int64_t b, int64_t panel) {
  const int64_t first = panel * PANEL;
  uint64_t bits = below(c.nk - first);
  if (c.keys)
    for (int64_t j = 0; j < least(PANEL, c.nk - first); ++j)
      if (!c.keys[b * c.keys_batch + first + j]) bits &= ~(1ull << j);
  return bits;
}

// (words, 64) = 64 rows of K transposed, zero for keys that nobody may see.
static void pack_keys(const Call& c, const T* K, uint64_t seen, uint32_t* to) {
  const int64_t deep = c.deep(), ld = c.k[2];
  for (int64_t j = 0; j < PANEL; j += 16) {
    int64_t w = 0;
#ifdef __AVX512F__
    for (; w < deep; w += 16) {
      __m512i t[16], out[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t left = seen >> (j + i) & 1 ? least(16 * PER_WORD, c.d - w * PER_WORD) : 0;
        const T* from = K + (left ? (j + i) * ld + w * PER_WORD : 0);
        if (PER_WORD == 1) t[i] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << left) - 1u), from);
        else t[i] = _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << left) - 1ull), from);
      }
      transpose(t, out);
      for (int64_t i = 0; i < least(16, deep - w); ++i)
        _mm512_storeu_si512(to + (w + i) * PANEL + j, out[i]);
    }
#else
    for (; w < deep; ++w)
      for (int64_t i = 0; i < 16; ++i) {
        uint32_t word = 0;
        if (seen >> (j + i) & 1) std::memcpy(&word, K + (j + i) * ld + w, sizeof word);
        to[w * PANEL + j + i] = word;
      }
#endif
  }
}

// One panel: keys transposed, values in rows; what nobody may see is zero, or a NaN there would spread.
static void pack(const Call& c, int64_t b, int64_t h, int64_t panel, uint32_t* at) {
  const Packed p = packed_at(c, at);
  const uint64_t bits = keys_seen(c, b, panel);
  const_cast<uint64_t*>(p.seen)[panel] = bits;
  if (!bits) return;  // nobody looks at it
  uint32_t* keys = const_cast<uint32_t*>(p.keys) + panel * c.key_words();
  uint32_t* values = const_cast<uint32_t*>(p.values) + panel * c.value_words();
  const T* K = c.K + b * c.k[0] + h * c.k[1] + panel * PANEL * c.k[2];
  const T* V = c.V + b * c.v[0] + h * c.v[1] + panel * PANEL * c.v[2];
  pack_keys(c, K, bits, keys);
  const bool odd = pack_values(V, c.v[2], c.dv, c.wide(), bits, values);
  const_cast<uint32_t*>(p.odd)[panel] = odd;
}

// ------------------------------------------------------------------ a tile of queries

// A panel that a tile looks at: for each group of queries the columns [left, right) that one of them may
// see, in whole vectors.
struct Live {
  int64_t panel;
  bool partial;
  int16_t left[GROUPS], right[GROUPS];
};

struct Tile {
  const Call& c;
  Packed packed;
  int64_t b, kv, head, first, rows, per_head;  // rows: per_head queries from `first` of heads from `head`
  uint32_t* q;
  float *s, *sums, *top, *total;
  uint32_t* p;

  int64_t position(int64_t r) const { return first + r % per_head; }
  int64_t head_of(int64_t r) const { return head + r / per_head; }
  int64_t lowest() const { return first + c.offset; }
  int64_t highest() const { return first + per_head - 1 + c.offset; }

  // Panels that may be seen at all, and by which rows.
  bool live(int64_t panel, Live& found) const {
    const int64_t c0 = panel * PANEL, c1 = least(c0 + PANEL, c.nk);
    const uint64_t seen = packed.seen[panel];
    if (!seen) return false;
    const int64_t first_seen = __builtin_ctzll(seen), past_seen = 64 - __builtin_clzll(seen);
    const int64_t low = lowest(), high = highest(), w = c.window;
    const bool sunk = c0 < c.sinks;
    if (c.causal && c0 > high) return false;
    if (!c.causal && w && !sunk && c0 >= high + w) return false;
    if (w && !sunk && c1 <= low - w + 1) return false;
    bool full = ~seen == 0 && c1 - c0 == PANEL;
    if (c.causal) full = full && c1 - 1 <= low;
    else if (w) full = full && (c1 <= c.sinks || c1 - 1 < low + w);
    if (w) full = full && (c1 <= c.sinks || c0 > high - w);
    found.panel = panel;
    found.partial = !full;
    bool any = false;
    for (int64_t g = 0; g * GROUP < rows; ++g) {
      int64_t left = full ? 0 : first_seen, right = full ? PANEL : past_seen;
      if (!full && per_head == rows) {
        const int64_t least_at = low + g * GROUP, most_at = least(least_at + GROUP - 1, high);
        if (c.causal) right = least(right, most_at + 1 - c0);
        else if (w) right = least(right, most_at + w - c0);
        if (w && least_at - w + 1 > c0 + left) left = least_at - w + 1 - c0;
        if (w && sunk) {  // the sinks, and what lies between them and the window
          const int64_t end = least(c.sinks - c0, c.causal ? most_at + 1 - c0 : PANEL);
          if (left >= right || right < end) right = least(end, past_seen);
          left = first_seen;
        }
      }
      found.left[g] = left / LANES * LANES;
      found.right[g] = right <= left ? found.left[g] : least(PANEL, ceil_div(right, LANES) * LANES);
      any = any || right > left;
    }
    if (!any) return false;
    return !(c.bias_at || c.blocks_at) || by_tensors(found);
  }

  // What masks in memory leave of a panel.
  bool by_tensors(Live& found) const {
    bool any = true;
    if (c.bias_kind == 2 || c.blocks_at) {
      uint64_t all = ~0ull, some = 0;
      const bool alike = c.bias_kind != 2 && per_head == rows &&
                         position(0) / c.block_q == position(rows - 1) / c.block_q;
      for (int64_t r = 0; r < (alike ? 1 : rows); ++r) {
        uint64_t bits = alike ? ~0ull : range_bits(r, found.panel);
        if (c.bias_kind == 2) bits &= mask_bits(r, found.panel);
        if (c.blocks_at) bits &= block_bits(r, found.panel);
        all &= bits;
        some |= bits;
      }
      any = some & packed.seen[found.panel];
      found.partial = found.partial || ~all;
    }
    return any;
  }

  uint64_t range_bits(int64_t r, int64_t panel) const {
    const int64_t i = position(r) + c.offset, c0 = panel * PANEL, w = c.window;
    uint64_t bits = ~0ull;
    if (w) bits = ~below(i - w + 1 - c0) & (c.causal ? ~0ull : below(i + w - c0));
    bits |= w ? below(c.sinks - c0) : 0;
    return c.causal ? bits & below(i + 1 - c0) : bits;
  }

  uint64_t mask_bits(int64_t r, int64_t panel) const {
    const int64_t c0 = panel * PANEL, count = least(PANEL, c.nk - c0), step = c.bias[3];
    const uint8_t* at = static_cast<const uint8_t*>(c.bias_at) + b * c.bias[0] +
                        head_of(r) * c.bias[1] + position(r) * c.bias[2] + c0 * step;
#ifdef __AVX512BW__
    if (step == 1 && count == PANEL) return _mm512_test_epi8_mask(_mm512_loadu_si512(at), _mm512_loadu_si512(at));
#endif
    if (step == 0) return *at ? ~0ull : 0;
    uint64_t bits = 0;
    for (int64_t j = 0; j < count; ++j) bits |= static_cast<uint64_t>(at[j * step] != 0) << j;
    return bits;
  }

  uint64_t block_bits(int64_t r, int64_t panel) const {
    const int64_t c0 = panel * PANEL, end = least(c0 + PANEL, c.nk);
    const uint8_t* at = c.blocks_at + b * c.blocks[0] + head_of(r) * c.blocks[1] +
                        position(r) / c.block_q * c.blocks[2];
    uint64_t bits = 0;
    for (int64_t j = c0; j < end;) {
      const int64_t block = j / c.block_k, next = least((block + 1) * c.block_k, end);
      if (at[block * c.blocks[3]]) bits |= below(next - c0) & ~below(j - c0);
      j = next;
    }
    return bits;
  }

  uint64_t bits(int64_t r, int64_t panel) const {
    uint64_t found = packed.seen[panel] & range_bits(r, panel);
    if (c.bias_kind == 2) found &= mask_bits(r, panel);
    if (c.blocks_at) found &= block_bits(r, panel);
    return found;
  }

  void take_queries() const {
    const int64_t deep = c.deep();
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = c.Q + b * c.q[0] + head_of(r) * c.q[1] + position(r) * c.q[2];
      q[(r + 1) * deep - 1] = 0;
      std::memcpy(q + r * deep, from, c.d * sizeof(T));
    }
  }

  // scale, cap and bias of the scores of a row, all in powers of two.
  void modify(int64_t r, int64_t panel, int64_t left, int64_t right, float* s) const {
    const int64_t c0 = panel * PANEL, end = least(right, c.nk - c0), i = position(r), h = head_of(r);
    if (c.softcap != 0) {
      const float in = 2 * LOG2E * c.scale / c.softcap;
      for (int64_t j = left; j < right; j += LANES) {  // cap tanh(x / cap), from 2^(2 x log2 e / cap)
        const Vector x = load(s + j) * in, y = x > 60.0f ? x - x + 60.0f : x;
        const Vector e = exp2(y);
        store(s + j, c.softcap * LOG2E * ((e - 1.0f) / (e + 1.0f)));
      }
    } else {
      for (int64_t j = left; j < right; j += LANES) store(s + j, load(s + j) * (c.scale * LOG2E));
    }
    if (c.lags) {
      const float* lag = c.lags + h * c.lags_head + i - c0 + c.nk - 1;
      for (int64_t j = left; j < end; ++j) s[j] += LOG2E * lag[-j];
    }
    const int64_t step = c.bias[3], at = b * c.bias[0] + h * c.bias[1] + i * c.bias[2] + c0 * step;
    if (c.bias_kind == 1) {
      const float* bias = static_cast<const float*>(c.bias_at) + at;
      for (int64_t j = left; j < end; ++j) s[j] += in_twos(bias[j * step]);
    } else if (c.bias_kind == 3) {
      const T* bias = static_cast<const T*>(c.bias_at) + at;
      for (int64_t j = left; j < end; ++j) s[j] += in_twos(::widen(bias[j * step]));
    }
  }

  // Scores of some panels, then what they add to the sums.
  void some(const Live* live, int64_t count) const {
    const int64_t deep = c.deep(), wide = c.wide(), ld = TOGETHER * PANEL;
    const bool plain = c.plain();
    for (int64_t n = 0; n < count; ++n) {
      const Live& l = live[n];
      const uint32_t* keys = packed.keys + l.panel * c.key_words();
      in_runs(l, [&](int64_t from, int64_t to, int64_t left, int64_t right) {
        product<false>(to - from, right - left, deep, q + from * deep, deep, keys + left, PANEL,
                       s + from * ld + n * PANEL + left, ld);
      });
      if (!plain || l.partial)
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t left = l.left[r / GROUP], right = l.right[r / GROUP];
          if (left == right) continue;
          float* row = s + r * ld + n * PANEL;
          if (!plain) modify(r, l.panel, left, right, row);
          if (l.partial) hide(row, bits(r, l.panel), left, right);
        }
    }
    for (int64_t r = 0; r < rows; ++r) soften(r, live, count, plain ? c.scale * LOG2E : 1.0f);
    for (int64_t n = 0; n < count; ++n) {
      const Live& l = live[n];
      if (packed.odd[l.panel] && l.partial) {
        carefully(l, n);
        continue;
      }
      const uint32_t* values = packed.values + l.panel * c.value_words();
      in_runs(l, [&](int64_t from, int64_t to, int64_t left, int64_t right) {
        product<true>(to - from, wide, (right - left) / PER_WORD, p + (from * ld + n * PANEL + left) / PER_WORD,
                      ld / PER_WORD, values + left / PER_WORD * wide, wide, sums + from * wide, wide);
      });
    }
  }

  // Neighbouring groups that look at the same columns, as one.
  template <class Body>
  void in_runs(const Live& l, const Body& body) const {
    const int64_t groups = ceil_div(rows, GROUP);
    for (int64_t g = 0; g < groups;) {
      int64_t end = g + 1;
      while (end < groups && l.left[end] == l.left[g] && l.right[end] == l.right[g]) ++end;
      if (l.left[g] < l.right[g]) body(g * GROUP, least(end * GROUP, rows), l.left[g], l.right[g]);
      g = end;
    }
  }

  // The softmax of a row goes on: p = 2^(scale s - top), sums and total follow where top has grown.
  void soften(int64_t r, const Live* live, int64_t count, float scale) const {
    const int64_t ld = TOGETHER * PANEL, wide = c.wide(), g = r / GROUP;
    float* row = s + r * ld;
    Vector most = Vector{} + NONE;
    for (int64_t n = 0; n < count; ++n)
      for (int64_t j = live[n].left[g]; j < live[n].right[g]; j += LANES)
        most = larger(load(row + n * PANEL + j), most);
    const float before = top[r], now = max_of(most) * scale;
    const float peak = now > before ? now : before, base = peak == NONE ? 0.0f : peak;
    Vector all = Vector{};
    for (int64_t n = 0; n < count; ++n)
      for (int64_t j = live[n].left[g]; j < live[n].right[g]; j += LANES) {
        float* at = row + n * PANEL + j;
        const Vector e = exp2(load(at) * scale - base);
        all += e;
        store(at, e);
      }
    if (PER_WORD > 1)
      for (int64_t n = 0; n < count; ++n) {
        const int64_t at = n * PANEL + live[n].left[g];
        narrow(row + at, live[n].right[g] - live[n].left[g], reinterpret_cast<T*>(p) + r * ld + at);
      }
    float keep = 1.0f;
    if (peak != before) {
      keep = before == NONE ? 0.0f : std::exp2(before - base);
      for (int64_t j = 0; j < wide; j += LANES) store(sums + r * wide + j, load(sums + r * wide + j) * keep);
    }
    total[r] = total[r] * keep + sum_of(all);
    top[r] = peak;
  }

  // A panel with values that are no numbers: what a row does not see may not reach it, and 0 * NaN would.
  void carefully(const Live& l, int64_t n) const {
    const int64_t ld = TOGETHER * PANEL, wide = c.wide();
    for (int64_t r = 0; r < rows; ++r) {
      const uint64_t seen = bits(r, l.panel);
      for (int64_t j = 0; j < least(PANEL, c.nk - l.panel * PANEL); ++j)
        if (seen >> j & 1) {
          const T* row = c.V + b * c.v[0] + kv * c.v[1] + (l.panel * PANEL + j) * c.v[2];
          for (int64_t e = 0; e < c.dv; ++e) sums[r * wide + e] += s[r * ld + n * PANEL + j] * ::widen(row[e]);
        }
    }
  }

  void write() const {
    const int64_t wide = c.wide();
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = position(r), h = head_of(r);
      float share = total[r], peak = top[r], keep = 1.0f;
      if (c.sink) {  // one more column, which meets no value
        const float extra = c.sink[h] * LOG2E, base = extra > peak ? extra : peak;
        keep = peak == NONE ? 0.0f : std::exp2(peak - base);
        share = share * keep + (extra == NONE ? 0.0f : std::exp2(extra - base));
        peak = base;
      }
      const float inverse = share == 0 ? 0.0f : keep / share;
      float* at = sums + r * wide;
      for (int64_t j = 0; j < wide; j += LANES) store(at + j, load(at + j) * inverse);
      narrow(at, c.dv, c.O + b * c.o[0] + h * c.o[1] + i * c.o[2]);
      c.lse[(b * c.heads + h) * c.nq + i] = share == 0 ? NONE : (peak + std::log2(share)) * LN2;
    }
  }

  void run() const {
    take_queries();
    std::memset(sums, 0, rows * c.wide() * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) top[r] = NONE, total[r] = 0;
    Live found[TOGETHER];
    int64_t count = 0;
    const auto look = [&](int64_t from, int64_t to) {
      for (int64_t at = from; at < to; ++at)
        if (live(at, found[count]) && ++count == TOGETHER) some(found, count), count = 0;
    };
    const int64_t past = c.causal ? highest() + 1 : c.window ? highest() + c.window : c.nk;
    const int64_t until = past <= 0 ? 0 : least(c.panels(), ceil_div(past, PANEL));
    const int64_t sunk = c.window ? least(c.panels(), ceil_div(c.sinks, PANEL)) : 0;
    const int64_t from = c.window ? (lowest() - c.window + 1) / PANEL : 0;
    look(0, sunk);
    look(from < sunk ? sunk : from, until);
    if (count) some(found, count);
    write();
  }
};

// ------------------------------------------------------------------ all tiles

struct Plan {
  int64_t together, per_head, parts;  // heads of a tile, their queries, tiles along the queries
  explicit Plan(const Call& c) {
    per_head = least(c.nq, c.tile);
    together = c.nq >= c.tile / 2 ? 1 : least(c.group, c.tile / (c.nq ? c.nq : 1));
    if (together < 1) together = 1;
    parts = ceil_div(c.nq, per_head ? per_head : 1);
  }
  int64_t groups(const Call& c) const { return ceil_div(c.group, together); }
  int64_t tiles(const Call& c) const { return groups(c) * parts; }  // of a head of keys
};

static void one_tile(const Call& c, const Plan& plan, int64_t bh, int64_t at, const uint32_t* packed) {
  static thread_local Scratch memory;
  const int64_t b = bh / (c.heads / c.group), kv = bh % (c.heads / c.group);
  const int64_t part = plan.parts - 1 - at % plan.parts, group = at / plan.parts;  // long rows first
  const int64_t first = part * plan.per_head, queries = least(plan.per_head, c.nq - first);
  const int64_t head = group * plan.together, heads = least(plan.together, c.group - head);
  const int64_t rows = heads * queries, ld = TOGETHER * PANEL;
  const int64_t some = plan.together * plan.per_head;
  float* f = memory.get<float>(some * (c.deep() + ld * 2 + c.wide() + 2) + 64);
  float *q = f, *s = q + ceil_div(some * c.deep(), 16) * 16, *sums = s + some * ld;
  float *p = PER_WORD > 1 ? sums + some * c.wide() : s, *top = sums + some * c.wide() + (PER_WORD > 1 ? some * ld / 2 : 0);
  Tile{c, packed_at(c, packed), b, kv, kv * c.group + head, first, rows, queries,
       reinterpret_cast<uint32_t*>(q), s, sums, top, top + some, reinterpret_cast<uint32_t*>(p)}
      .run();
}

static void pack_head(const Call& c, int64_t bh, uint32_t* at) {
  const int64_t kv_heads = c.heads / c.group;
  for (int64_t panel = 0; panel < c.panels(); ++panel) pack(c, bh / kv_heads, bh % kv_heads, panel, at);
}

constexpr int64_t FEW = 4;  // queries that keys and values are not packed for
static int32_t attend_few(const Call& c);

static int32_t attend(const Call& c) {
  if (c.nq && c.nq <= FEW) return attend_few(c);
  const Plan plan(c);
  const int64_t kv_heads = c.heads / c.group, many = c.batch * kv_heads, tiles = plan.tiles(c);
  std::atomic<int64_t> next{0};
  if (!c.packed)  // as many heads as keep all threads busy: packed keys stay in its L2
    return parallel(least(c.threads, many), [&](int64_t) {
      static thread_local Scratch memory;
      uint32_t* at = memory.get<uint32_t>(c.head_words());
      for (int64_t bh; (bh = next++) < many;) {
        pack_head(c, bh, at);
        for (int64_t t = 0; t < tiles; ++t) one_tile(c, plan, bh, t, at);
      }
    });
  const int64_t panels = c.panels();
  const int32_t failed = parallel(least(c.threads, many * panels), [&](int64_t) {
    for (int64_t at; (at = next++) < many * panels;) {
      const int64_t bh = at / panels;
      pack(c, bh / kv_heads, bh % kv_heads, at % panels, c.packed + bh * c.head_words());
    }
  });
  if (failed) return failed;
  next = 0;
  return parallel(least(c.threads, many * tiles), [&](int64_t) {
    for (int64_t at; (at = next++) < many * tiles;) {
      const int64_t bh = at % many;
      one_tile(c, plan, bh, at / many, c.packed + bh * c.head_words());
    }
  });
}

extern "C" int32_t structc_run(const int64_t* sizes, const void* const* pointers, const float* reals) {
  try {
    return attend(Call(sizes, pointers, reals));
  } catch (...) {
    return 2;  // out of memory; an exception may not cross into C
  }
}
