// A word of packed keys and values is a pair of bfloat16.
constexpr int64_t PER_WORD = 2;
using Word = Pairs;
static inline Word load_words(const uint32_t* at) { return reinterpret_cast<Pairs>(_mm512_loadu_si512(at)); }
static inline Word spread(uint32_t word) { return reinterpret_cast<Pairs>(_mm512_set1_epi32(word)); }
static inline Vector multiply_add(Word a, Word b, Vector sum) {
  return reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
}

// Values in rows of pairs of keys, zero where nobody may see them; says whether one that may be seen is no
// number.
static bool pack_values(const uint16_t* V, int64_t ld, int64_t dv, int64_t wide, uint64_t seen, uint32_t* to) {
  bool odd = false;
  for (int64_t j = 0; j < 64; j += 2, to += wide) {
    const bool left = seen >> j & 1, right = seen >> (j + 1) & 1;
    const uint16_t *even = V + j * ld, *next = even + ld;
    int any = 0;
    for (int64_t e = 0; e < dv; ++e) {
      const uint32_t a = left ? even[e] : 0, b = right ? next[e] : 0;
      any |= (a & 0x7f80) == 0x7f80 || (b & 0x7f80) == 0x7f80;
      to[e] = a | b << 16;
    }
    for (int64_t e = dv; e < wide; ++e) to[e] = 0;
    odd |= any != 0;
  }
  return odd;
}
