// Exact GELU to 2e-5, for results that are rounded to bfloat16: as for float32, max(x, 0) - a * Q(a),
// with (1/2 - Q(a)) / a as a polynomial in s = 2 a^2 / 4.3^2 - 1 of half the degree. The error is
// absolute, and relative near 0 (below -3 values are that small themselves); beyond 4.3 the correction
// is at most 2e-5. NaN stays NaN.
static inline float gelu(float x) {
  const float size = std::fabs(x), a = size > 4.3f ? 4.3f : size;
  const float s = a * a * (2.0f / (4.3f * 4.3f)) - 1.0f;
  float q = 2.239966765e-03f;
  q = q * s - 6.606791168e-03f;
  q = q * s + 9.803669527e-03f;
  q = q * s - 1.509387884e-02f;
  q = q * s + 2.584639750e-02f;
  q = q * s - 3.950472176e-02f;
  q = q * s + 5.559673905e-02f;
  q = q * s - 8.005660772e-02f;
  q = q * s + 1.640533209e-01f;
  return (0.0f > x ? 0.0f : x) - a * (0.5f - a * q);
}
