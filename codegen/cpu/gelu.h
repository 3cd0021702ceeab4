// Exact GELU: x * Phi(x) = max(x, 0) - a * Q(a) with a = |x| and Q(a) = erfc(a / sqrt 2) / 2. Q is a
// polynomial in t = 2 a / 5.5 - 1 on [0, 5.5]: no division, no exponential. Error below 2e-7
// absolute and 3e-7 relative near 0; beyond 5.5 the correction is at most 1e-7. NaN stays NaN.
static inline float gelu(float x) {
  const float size = std::fabs(x), a = size > 5.5f ? 5.5f : size;
  const float t = a * (2.0f / 5.5f) - 1.0f;
  float q = -1.369615648e-03f;
  q = q * t + 2.469802389e-03f;
  q = q * t + 6.770694028e-03f;
  q = q * t - 1.742163640e-02f;
  q = q * t - 7.401639590e-03f;
  q = q * t + 5.262673195e-02f;
  q = q * t - 3.168039480e-02f;
  q = q * t - 7.107909985e-02f;
  q = q * t + 1.274555500e-01f;
  q = q * t - 2.297580567e-02f;
  q = q * t - 1.616868979e-01f;
  q = q * t + 2.148375835e-01f;
  q = q * t - 5.150901401e-02f;
  q = q * t - 1.766036958e-01f;
  q = q * t + 2.718825951e-01f;
  q = q * t - 2.068465575e-01f;
  q = q * t + 9.455896805e-02f;
  q = q * t - 2.500731109e-02f;
  q = q * t + 2.979762703e-03f;
  return (0.0f > x ? 0.0f : x) - a * q;
}
