// A word of packed keys and values is a float.
constexpr int64_t PER_WORD = 1;
using Word = Vector;
static inline Word load_words(const uint32_t* at) { return *reinterpret_cast<const Vector*>(at); }
static inline Word spread(uint32_t word) {
  float v;
  std::memcpy(&v, &word, sizeof v);
  return Vector{} + v;
}
static inline Vector multiply_add(Word a, Word b, Vector sum) { return sum + a * b; }

// Values in rows of `wide`, zero where nobody may see them; says whether one that may be seen is no number.
static bool pack_values(const float* V, int64_t ld, int64_t dv, int64_t wide, uint64_t seen, uint32_t* to) {
  bool odd = false;
  for (int64_t j = 0; j < 64; ++j, to += wide) {
    float* row = reinterpret_cast<float*>(to);
    if (!(seen >> j & 1)) {
      std::memset(row, 0, wide * sizeof(float));
      continue;
    }
    const float* from = V + j * ld;
    float zero = 0;
    for (int64_t e = 0; e < dv; ++e) row[e] = from[e], zero += from[e] * 0.0f;
    for (int64_t e = dv; e < wide; ++e) row[e] = 0;
    odd |= zero != 0;  // 0 times a NaN or an infinity
  }
  return odd;
}
