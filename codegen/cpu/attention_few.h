// ------------------------------------------------------------------ a few queries

// A few queries, as in decoding: packing all keys and values would cost more than the attention. Rows of K
// and V are read where they are, once for all query heads of a group. Ranges of keys are shared among
// threads; what each finds is put together by the sums of its rows.

constexpr int64_t FEW_ROWS = 16;        // of queries that go through the keys together
constexpr int64_t FEW_PANELS = 4;       // the least range of keys
constexpr int64_t FEW_BYTES = 1 << 17;  // of keys and values that are worth a thread of their own

// Lanes of `a` and `b` whose number has not, or has, the bit H, added to those H away.
template <int H>
static inline Vector fold(Vector a, Vector b) {
  Lanes own, other;
#pragma GCC unroll 16
  for (int l = 0; l < LANES; ++l) {
    own[l] = l & H ? LANES + l : l;
    other[l] = l & H ? LANES + (l ^ H) : l ^ H;
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}

// The sum of each of LANES vectors, in its lane.
template <int H>
static inline void fold_all(Vector* v) {
#pragma GCC unroll 16
  for (int i = 0; i < H; ++i) v[i] = fold<H>(v[i], v[i + H]);
  if constexpr (H > 1) fold_all<H / 2>(v);
}

// Words of a row from word `at` on, zero past its end.
static inline Word some_words(const T* row, int64_t at, int64_t count) {
  const int64_t left = count - at * PER_WORD;
  const T* from = row + at * PER_WORD;
  if (left >= LANES * PER_WORD) return load_words(reinterpret_cast<const uint32_t*>(from));
#ifdef __AVX512F__
  const uint32_t bits = static_cast<uint32_t>((1ull << left) - 1);
  const __m512i part = PER_WORD == 1 ? _mm512_maskz_loadu_epi32(static_cast<__mmask16>(bits), from)
                                     : _mm512_maskz_loadu_epi16(bits, from);
  return reinterpret_cast<Word>(part);
#else
  uint32_t part[LANES] = {};
  std::memcpy(part, from, left * sizeof(T));
  return load_words(part);
#endif
}

// Values of a row from `at` on, zero past its end.
static inline Vector some_values(const T* row, int64_t at, int64_t count) {
  if (at + LANES <= count) return ::widen(row + at);
#ifdef __AVX512F__
  const uint32_t bits = (1u << (count - at)) - 1;
  if (PER_WORD == 1)
    return reinterpret_cast<Vector>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), row + at));
  const __m256i half = _mm512_castsi512_si256(_mm512_maskz_loadu_epi16(bits, row + at));
  return reinterpret_cast<Vector>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#else
  T part[LANES] = {};
  std::memcpy(part, row + at, (count - at) * sizeof(T));
  return ::widen(part);
#endif
}

struct Few : Tile {
  // Scores of a row against LANES keys from `at` on; keys past the last one give those of the last.
  void score(const T* K, int64_t ld, int64_t r, int64_t count, float* to) const {
    const int64_t deep = c.deep();
    const uint32_t* query = q + r * ceil_div(deep, LANES) * LANES;
    Vector sums[LANES];
#pragma GCC unroll 16
    for (int64_t j = 0; j < LANES; ++j) {
      const T* row = K + least(j, count - 1) * ld;
      Vector sum = {};
      for (int64_t w = 0; w < deep; w += LANES)
        sum = multiply_add(load_words(query + w), some_words(row, w, c.d), sum);
      sums[j] = sum;
    }
    fold_all<LANES / 2>(sums);
    store(to, sums[0]);
  }

  // Sums of some rows += weights times values, for the keys in a list.
  template <int ROWS>
  void add(const T* V, const uint8_t* list, int64_t many, const float* weights, float* to) const {
    const int64_t ld = TOGETHER * PANEL, wide = c.wide();
    for (int64_t e = 0; e < c.dv; e += 2 * LANES) {
      const bool two = e + LANES < c.dv;
      Vector left[ROWS], right[ROWS] = {};
      for (int r = 0; r < ROWS; ++r) {
        left[r] = load(to + r * wide + e);
        if (two) right[r] = load(to + r * wide + e + LANES);
      }
      for (int64_t i = 0; i < many; ++i) {
        const T* row = V + list[i] * c.v[2];
        const Vector a = some_values(row, e, c.dv), b = two ? some_values(row, e + LANES, c.dv) : Vector{};
        for (int r = 0; r < ROWS; ++r) {
          const float weight = weights[r * ld + list[i]];
          left[r] += a * weight;
          right[r] += b * weight;
        }
      }
      for (int r = 0; r < ROWS; ++r) {
        store(to + r * wide + e, left[r]);
        if (two) store(to + r * wide + e + LANES, right[r]);
      }
    }
  }

  void values(const Live& l, int64_t n) const {
    const int64_t ld = TOGETHER * PANEL, wide = c.wide();
    const T* V = c.V + b * c.v[0] + kv * c.v[1] + l.panel * PANEL * c.v[2];
    uint64_t all = ~0ull;
    if (l.partial)
      for (int64_t r = 0; r < rows; ++r) all &= bits(r, l.panel);
    uint8_t list[PANEL];
    int64_t many = 0;
    for (int64_t j = l.left[0]; j < l.right[0]; ++j)
      if (all >> j & 1) list[many++] = static_cast<uint8_t>(j);
    const float* weights = s + n * PANEL;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add<4>(V, list, many, weights + r * ld, sums + r * wide);
    for (; r + 3 <= rows; r += 3) add<3>(V, list, many, weights + r * ld, sums + r * wide);
    for (; r < rows; ++r) add<1>(V, list, many, weights + r * ld, sums + r * wide);
    if (!l.partial) return;
    for (r = 0; r < rows; ++r) {  // what one row sees and another does not may be no number
      many = 0;
      for (uint64_t own = bits(r, l.panel) & ~all; own; own &= own - 1)
        list[many++] = static_cast<uint8_t>(__builtin_ctzll(own));
      if (many) add<1>(V, list, many, weights + r * ld, sums + r * wide);
    }
  }

  void some_few(const Live* live, int64_t count) const {
    const int64_t ld = TOGETHER * PANEL;
    const bool plain = c.plain();
    for (int64_t n = 0; n < count; ++n) {
      const Live& l = live[n];
      const T* K = c.K + b * c.k[0] + kv * c.k[1] + l.panel * PANEL * c.k[2];
      const int64_t end = least(PANEL, c.nk - l.panel * PANEL);
      for (int64_t j = l.left[0]; j < l.right[0]; j += LANES)
        for (int64_t r = 0; r < rows; ++r)
          score(K + least(j, end - 1) * c.k[2], c.k[2], r, j < end ? least(LANES, end - j) : 1,
                s + r * ld + n * PANEL + j);
      if (plain && !l.partial) continue;
      for (int64_t r = 0; r < rows; ++r) {
        float* row = s + r * ld + n * PANEL;
        if (!plain) modify(r, l.panel, l.left[0], l.right[0], row);
        if (l.partial) hide(row, bits(r, l.panel), l.left[0], l.right[0]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) soften(r, live, count, plain ? c.scale * LOG2E : 1.0f);
    for (int64_t n = 0; n < count; ++n) values(live[n], n);
  }

  void take_few() const {
    const int64_t words = ceil_div(c.deep(), LANES) * LANES;
    std::memset(q, 0, rows * words * sizeof(uint32_t));
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(q + r * words, c.Q + b * c.q[0] + head_of(r) * c.q[1] + position(r) * c.q[2], c.d * sizeof(T));
    std::memset(sums, 0, rows * c.wide() * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) top[r] = NONE, total[r] = 0;
  }

  // Panels in [from, to), which a rule about keys has been written down for.
  void look(int64_t from, int64_t to) const {
    Live found[TOGETHER];
    int64_t count = 0;
    for (int64_t at = from; at < to; ++at)
      if (live(at, found[count]) && ++count == TOGETHER) some_few(found, count), count = 0;
    if (count) some_few(found, count);
  }

  // The sums of another range of keys, added to these.
  void take_in(const Few& other) const {
    const int64_t wide = c.wide();
    for (int64_t r = 0; r < rows; ++r) {
      const float peak = top[r] > other.top[r] ? top[r] : other.top[r];
      if (peak == NONE && other.total[r] == 0) continue;
      const float base = peak == NONE ? 0.0f : peak;
      const float mine = top[r] == NONE ? 0.0f : std::exp2(top[r] - base);
      const float theirs = other.top[r] == NONE ? 0.0f : std::exp2(other.top[r] - base);
      for (int64_t j = 0; j < wide; ++j)
        sums[r * wide + j] = mine * sums[r * wide + j] + theirs * other.sums[r * wide + j];
      total[r] = mine * total[r] + theirs * other.total[r];
      top[r] = peak;
    }
  }
};

static int32_t attend_few(const Call& c) {
  static thread_local Scratch shared;
  const int64_t panels = c.panels(), kv_heads = c.heads / c.group;
  const int64_t together = least(c.group, FEW_ROWS / c.nq), most = together * c.nq;
  const int64_t chunks = ceil_div(c.group, together), units = c.batch * kv_heads * chunks;
  const int64_t bytes = c.batch * kv_heads * c.nk * (c.d + c.dv) * static_cast<int64_t>(sizeof(T));
  const int64_t threads = least(c.threads, 1 + bytes / FEW_BYTES);
  const int64_t wanted = threads == 1 || units >= 4 * threads ? 1 : ceil_div(2 * threads, units);
  int64_t parts = least(wanted, ceil_div(panels, FEW_PANELS));
  if (parts < 1) parts = 1;
  const int64_t size = ceil_div(most * (c.wide() + 2), 16) * 16, each = ceil_div(panels, parts);
  // which keys of a panel may be seen, of all sequences; then sums, peaks and totals of each task
  uint64_t* seen = shared.get<uint64_t>(c.batch * panels + 8 + ceil_div(units * parts * size, 2) + 8);
  float* kept = reinterpret_cast<float*>(seen + ceil_div(c.batch * panels, 8) * 8);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t at = 0; at < panels; ++at) seen[b * panels + at] = keys_seen(c, b, at);
  const auto tile = [&](int64_t task, float* memory) {
    const int64_t unit = task / parts, bh = unit / chunks, b = bh / kv_heads, kv = bh % kv_heads;
    const int64_t head = unit % chunks * together, heads = least(together, c.group - head);
    const int64_t words = ceil_div(c.deep(), LANES) * LANES, ld = TOGETHER * PANEL;
    float *sums = kept + task * size, *top = sums + most * c.wide(), *s = memory + most * words;
    uint32_t* narrowed = reinterpret_cast<uint32_t*>(s + most * ld);
    const Packed packed{nullptr, nullptr, seen + b * panels, nullptr};
    return Few{{c, packed, b, kv, kv * c.group + head, 0, heads * c.nq, c.nq,
                reinterpret_cast<uint32_t*>(memory), s, sums, top, top + most, narrowed}};
  };
  const int32_t failed = parallel(units * parts, [&](int64_t task) {
    static thread_local Scratch own;
    const int64_t words = ceil_div(c.deep(), LANES) * LANES;
    const Few few = tile(task, own.get<float>(most * (words + 2 * TOGETHER * PANEL) + 64));
    const int64_t at = task % parts * each;
    few.take_few();
    few.look(at, least(at + each, panels));
    if (parts == 1) few.write();
  });
  if (failed || parts == 1) return failed;
  for (int64_t unit = 0; unit < units; ++unit) {
    const Few first = tile(unit * parts, nullptr);
    for (int64_t part = 1; part < parts; ++part) first.take_in(tile(unit * parts + part, nullptr));
    first.write();
  }
  return 0;
}
